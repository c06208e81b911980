"""`align run` as a person runs it: the run folder, a kill in the middle, Ctrl-C, and what the next call makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from recipes.resume import RunFolder
from recipes.schema import load_recipe
from rollout.config import RolloutConfig
from rollout.vllm.environment import environment

RECIPE = """
name: small
model: {init: {preset: deepseek-v2-nano, vocab_size: 300}}
rollout: {max_length: 64, max_num_seqs: 64, memory: 0.25}
train: {tokens_per_rank: 2048}
evals: {tasks: [TASKS/addition.yaml, TASKS/sorting.yaml], limit: 40}
stages:
  - sft:
      data: {function: "recipes.skills:sft_rows", args: {addition: 300, sorting: 300, reversing: 100}}
      steps: 12
      batch_size: 32
      max_length: 64
      learning_rate: 2.0e-3
      checkpoint_every: 5
  - grpo:
      prompts: {function: "recipes.skills:skill_prompts", args: {skill: addition, count: 200}}
      rewards:
        - {function: "my_rewards.py:digits", weight: 0.5}
        - {function: "rewards.exact_match:exact_match"}
      steps: 6
      prompts_per_step: 8
      completions: 4
      max_new_tokens: 8
      learning_rate: 1.0e-3
      kl: 0.01
      checkpoint_every: 2
"""

# As one would write it for TRL's GRPOTrainer: nothing here knows this project.
REWARDS = '''
def digits(prompts, completions, completion_ids, answer, trainer_state=None, log_metric=None, log_extra=None, **kwargs):
    """Share of characters that are digits or spaces."""
    assert len(prompts) == len(completions) == len(answer)
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    log_extra("length", [len(c) for c in completions])
    return [sum(c.isdigit() or c == " " for c in text) / max(1, len(text)) for text in completions]
'''


def write_recipe(folder: Path, recipe: str = RECIPE, rewards: str = REWARDS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tasks = Path(__file__).resolve().parent.parent / "recipes" / "tasks"
    (folder / "my_rewards.py").write_text(rewards)
    (folder / "small.yaml").write_text(recipe.replace("TASKS", str(tasks)))
    return folder / "small.yaml"


def run_whole(folder: Path, recipe: Path) -> tuple[Path, Path, str]:
    """Recipe, run folder and output of an uninterrupted run."""
    return recipe, folder / "run", finish(align("run", str(recipe), "--output", str(folder / "run")))


def align(*arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "recipes.cli", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == code, output[-4000:]
    return output


def metrics(run: Path, stage: str) -> list[dict]:
    rows = [json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith("time/")} for row in rows]


def wait_for_step(run: Path, stage: str, step: int, process: subprocess.Popen) -> None:
    path = run / stage / "metrics.jsonl"
    while not (path.is_file() and path.read_text().count("\n") >= step):
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.02)


def left_behind(pids: list[int]) -> list[str]:
    return [f"{p.pid} {p.name()}" for p in psutil.process_iter(["status"]) if p.pid in pids and _lives(p)]


def _lives(process: psutil.Process) -> bool:
    return process.info["status"] not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


def descendants(process: subprocess.Popen) -> list[int]:
    return [child.pid for child in psutil.Process(process.pid).children(recursive=True)]


def assert_nothing_left(pids: list[int]) -> None:
    deadline = time.monotonic() + 90  # after a kill -9, Ray's agents look for their parent now and then
    while left_behind(pids) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left_behind(pids)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    return run_whole(folder, write_recipe(folder))


def test_the_run_folder_holds_what_the_readme_says(whole: tuple[Path, Path, str]) -> None:
    _, run, output = whole
    for name in ("recipe.yaml", "versions.json", "tax.json", "report.html"):
        assert (run / name).is_file(), name
    for stage, steps in (("01-sft", 12), ("02-grpo", 6)):
        assert [row["step"] for row in metrics(run, stage)] == list(range(1, steps + 1))
        assert (run / stage / "evals" / "samples.jsonl").read_text().count("\n") == 80
        assert (run / stage / "checkpoints").is_dir()
    row = json.loads((run / "02-grpo" / "metrics.jsonl").read_text().splitlines()[-1])
    expected = {"reward/mean", "reward/digits", "reward/exact_match", "kl"}
    expected |= {"mismatch/k3", "mismatch/max", "mismatch/p99", "tokens/completion"}
    assert {f"time/{phase}" for phase in ("generate", "handover", "train", "step")} | expected <= row.keys()
    sample = json.loads((run / "02-grpo" / "samples.jsonl").read_text().splitlines()[0])
    assert {"step", "prompt", "completion", "reward", "parts"} <= sample.keys()
    assert sample["logged"] == {"length": len(sample["completion"])}
    assert row["logged/progress"] == 5 / 6  # TRL counts the steps before this one
    tables = json.loads((run / "tax.json").read_text())
    ends = [(table["before"], table["stage"]) for table in tables]
    assert ends == [("base", "sft"), ("sft", "grpo"), ("base", "grpo")]
    fields = {"benchmark", "before", "after", "difference", "low", "high", "gained", "lost", "n"}
    assert all(fields <= row.keys() and row["n"] == 40 for table in tables for row in table["rows"])
    assert "addition" in output and "sft → grpo" in output


def test_a_stage_is_done_when_its_table_is_written(tmp_path: Path) -> None:
    """A kill between the results of the evals and the table must not lose the table."""
    recipe = load_recipe(write_recipe(tmp_path), []).recipe
    folder = RunFolder(tmp_path / "run", recipe, accept_changes=False)
    stage = folder.stage(recipe.stages[0])
    stage.final.mkdir(parents=True)
    stage.save_evals([], [])
    assert not folder.is_done(recipe.stages[0])
    folder.add_tax("sft", {("base", "evals"): []}, [])
    assert folder.is_done(recipe.stages[0])
    folder.close()


def test_final_loads_in_transformers_as_it_is(whole: tuple[Path, Path, str]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for stage in ("01-sft", "02-grpo"):
        model, info = AutoModelForCausalLM.from_pretrained(whole[1] / stage / "final", output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        tokenizer = AutoTokenizer.from_pretrained(whole[1] / stage / "final")
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id is not None


@pytest.mark.slow
def test_final_loads_in_vllm_as_it_is(whole: tuple[Path, Path, str]) -> None:
    code = (
        "import sys; from vllm import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], enforce_eager=True, max_model_len=64, max_num_seqs=8, gpu_memory_utilization=0.3)\n"
        "outputs = llm.generate(['add 4 5 ='], SamplingParams(max_tokens=4, temperature=0))\n"
        "print('SAID', repr(outputs[0].outputs[0].text))"
    )
    variables = os.environ | environment(RolloutConfig(memory=0.25))
    final = str(whole[1] / "02-grpo" / "final")
    done = subprocess.run([sys.executable, "-c", code, final], env=variables, capture_output=True, text=True)
    assert "SAID" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow
def test_a_run_joins_the_ray_cluster_that_it_is_told(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    try:
        recipe, run = write_recipe(tmp_path), tmp_path / "run"
        finish(align("run", str(recipe), "--output", str(run), "--ray", cluster.address))
        assert len(metrics(run, "02-grpo")) == 6
        assert cluster.head_node.remaining_processes_alive()
    finally:
        cluster.shutdown()


@pytest.mark.slow
def test_a_reward_that_raises_stops_the_run_by_name_and_mended_it_goes_on(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    rewards = tmp_path / "my_rewards.py"
    rewards.write_text(REWARDS.replace("    return [", "    1 / (trainer_state.global_step - 3)\n    return ["))
    output = finish(align("run", str(recipe), "--output", str(run)), code=1)
    assert "reward 'digits' (my_rewards.py:digits)" in output and "ZeroDivisionError" in output
    assert len(metrics(run, "02-grpo")) == 3
    rewards.write_text(REWARDS)
    finish(align("run", str(recipe), "--output", str(run)))
    assert [row["step"] for row in metrics(run, "02-grpo")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("budget", ["memory={disk: DISK}", pytest.param("seed=0", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stage", "step"), [("02-grpo", 3)])
def test_killed_and_continued_the_metrics_are_those_of_the_whole_run(
    whole: tuple[Path, Path, str], tmp_path: Path, stage: str, step: int, budget: str
) -> None:
    """Within a budget of memory, against a whole run without one, and without."""
    recipe, run, within = whole[0], tmp_path / "run", budget.replace("DISK", str(tmp_path))
    process = align("run", str(recipe), "--output", str(run), "--set", within)
    wait_for_step(run, stage, step, process)
    while not (run / stage / "checkpoints" / "step-00000002").is_dir():  # it is written in the background
        time.sleep(0.02)
    pids = descendants(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert_nothing_left(pids)
    output = finish(align("run", str(recipe), "--output", os.path.relpath(run), "--set", within))
    assert "continuing after step 2" in output
    assert ("Memory, phase by phase" in output) == ("memory" in budget)
    for name in ("01-sft", "02-grpo"):
        for found, expected in zip(metrics(run, name), metrics(whole[1], name), strict=True):
            if "memory" in budget:
                assert found.pop("memory/measured") > 0 and found.pop("memory/predicted") > 0
            found = {key: value for key, value in found.items() if not key.startswith("memory/")}
            assert found.keys() == expected.keys()
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    assert (run / "02-grpo" / "samples.jsonl").read_text() == (whole[1] / "02-grpo" / "samples.jsonl").read_text()
    assert json.loads((run / "tax.json").read_text()) == json.loads((whole[1] / "tax.json").read_text())


def test_ctrl_c_saves_and_leaves_nothing_behind(whole: tuple[Path, Path, str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = align("run", str(whole[0]), "--output", str(run), "--set", "evals.tasks=[]")
    wait_for_step(run, "01-sft", 1, process)
    pids = descendants(process)
    process.send_signal(signal.SIGINT)
    output = finish(process, code=130)
    assert "continues the run" in output
    assert_nothing_left(pids)
    done = len(metrics(run, "01-sft"))
    assert [path.name for path in (run / "01-sft" / "checkpoints").glob("step-*")] == [f"step-{done:08d}"]
    assert metrics(run, "01-sft") == metrics(whole[1], "01-sft")[:done]


def test_a_finished_run_starts_nothing(whole: tuple[Path, Path, str]) -> None:
    recipe, run, _ = whole
    begun = time.monotonic()
    assert "report.html" in finish(align("run", str(recipe), "--output", str(run)))
    assert time.monotonic() - begun < 60
    assert not (run / "03-grpo").exists()


def test_a_changed_recipe_is_refused_with_the_difference(whole: tuple[Path, Path, str]) -> None:
    recipe, run, _ = whole
    output = finish(align("run", str(recipe), "--output", str(run), "--set", "stages.1.grpo.kl=0.5"), code=2)
    assert "stages.1.grpo.kl: 0.01 -> 0.5" in output and "--accept-changes" in output
    assert yaml.safe_load((run / "recipe.yaml").read_text())["stages"][1]["grpo"]["kl"] == 0.01
