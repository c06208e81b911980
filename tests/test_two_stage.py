"""Sampled preferences, a reward model, GRPO on its score, held-out rewards and the gate, as a person runs them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_run import align, finish, metrics, run_whole, wait_for_step, write_recipe
from transformers import AutoModelForSequenceClassification

from recipes.resume import RunFolder
from recipes.schema import load_recipe

RECIPE = """
name: small
model: {init: {preset: deepseek-v2-nano, vocab_size: 300}}
rollout: {max_length: 64, max_num_seqs: 64, memory: 0.25}
train: {tokens_per_rank: 2048}
evals:
  tasks: {skills: [TASKS/addition.yaml, TASKS/sorting.yaml]}
  limit: 40
  keep: {addition: 0.9, skills: -0.9}
  during: {every: 2, items: 10}
stages:
  - sft:
      data: {function: "recipes.skills:sft_rows", args: {addition: 300, sorting: 300, reversing: 100}}
      steps: 12
      batch_size: 32
      max_length: 64
      learning_rate: 2.0e-3
      keep: warn
  - sample:
      prompts: {function: "recipes.skills:skill_prompts", args: {skill: reversing, count: 90}}
      rewards: [{function: "my_rewards.py:letters", name: letters}]
      prompts_per_step: 40
      completions: 4
      max_new_tokens: 8
  - reward_model:
      name: judge
      data: {from: sample}
      steps: 6
      batch_size: 8
      max_length: 64
      learning_rate: 1.0e-3
      checkpoint_every: 2
      on_error: drop
  - grpo:
      prompts: {function: "recipes.skills:skill_prompts", args: {skill: reversing, count: 200}}
      rewards:
        - {model: judge, normalize: running}
        - {function: "my_rewards.py:letters", weight: 0.1}
      steps: 5
      prompts_per_step: 8
      completions: 4
      max_new_tokens: 8
      learning_rate: 1.0e-3
      checkpoint_every: 3
      held_out: 0.2
      keep: rollback
"""
RULES = """
def letters(completions, **kwargs):
    return [sum(c.isalpha() for c in text) / 8 for text in completions]
"""


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    folder = tmp_path_factory.mktemp("whole")
    return run_whole(folder, write_recipe(folder, RECIPE, RULES))


def test_completions_become_preferences_and_a_reward_model(whole: tuple[Path, Path, str]) -> None:
    _, run, output = whole
    sampled = rows(run / "02-sample" / "final" / "rows.jsonl")
    assert len(sampled) == 90 * 4 and len({row["prompt"] for row in sampled}) <= 90
    assert "sample: 360 rows" in output
    for pair in rows(run / "02-sample" / "final" / "pairs.jsonl"):
        assert pair["score_chosen"] > pair["score_rejected"]
    last = metrics(run, "03-judge")[-1]
    assert {"held_out/accuracy", "held_out/calibration_error", "held_out/length_correlation"} <= last.keys()
    model, info = AutoModelForSequenceClassification.from_pretrained(
        run / "03-judge" / "final", output_loading_info=True
    )
    assert model.num_labels == 1 and not any(info.values())
    assert not (run / "03-judge" / "evals").exists()  # benchmarks are a policy's


def test_the_reward_models_score_is_the_reward(whole: tuple[Path, Path, str]) -> None:
    _, run, _ = whole
    keys = set().union(*metrics(run, "04-grpo"))  # where one of two does not vary, a step has no correlation
    assert {"reward/judge", "reward/judge/std", "correlation/judge,letters", "correlation/judge,length"} <= keys
    sample = rows(run / "04-grpo" / "samples.jsonl")[0]
    model = AutoModelForSequenceClassification.from_pretrained(run / "03-judge" / "final")
    from transformers import AutoTokenizer

    tok = AutoTokenizer.from_pretrained(run / "tokenizer")
    ids = tok(sample["prompt"] + sample["completion"] + tok.eos_token)["input_ids"]
    with torch.no_grad():
        assert model(torch.tensor([ids])).logits.item() == pytest.approx(sample["parts"]["judge"], abs=1e-4)


def test_held_out_reward_and_evals_within_the_stage(whole: tuple[Path, Path, str]) -> None:
    _, run, _ = whole
    kept = json.loads((run / "04-grpo" / "held_out.json").read_text())
    assert list(kept["values"]) == ["0", "2", "4", "5"] and list(kept["scale"]) == ["judge"]
    assert abs(sum(kept["values"]["0"])) < sum(map(abs, kept["values"]["0"]))
    within = rows(run / "04-grpo" / "evals.jsonl")
    assert [row["step"] for row in within] == [2, 4]
    assert {"addition", "sorting", "skills"} == within[0]["scores"].keys()
    assert within[0]["reward/held_out"] == pytest.approx(sum(kept["values"]["2"]) / len(kept["values"]["2"]))
    assert rows(run / "04-grpo" / "metrics.jsonl")[1]["time/evals"] > 0


def test_broken_limit_rolls_back_and_says_so(whole: tuple[Path, Path, str]) -> None:
    _, run, output = whole
    sft, lost, grpo, whole_way = json.loads((run / "tax.json").read_text())
    assert sft["gate"] and "rolled back to the weights that the stage started from" in lost["gate"]
    assert any(line.startswith("addition: ") for line in lost["gate"]) and lost["evals"] == "evals-breached"
    assert (grpo["before"], whole_way["before"], whole_way["after"]) == ("sft", "base", "grpo")
    assert [row["benchmark"] for row in grpo["rows"]] == ["held-out reward", "addition", "sorting", "skills"]
    assert grpo["rows"][0]["difference"] == 0 and (run / "04-grpo" / "evals-breached" / "results.json").is_file()
    weights = [load_file(run / stage / "final" / "model.safetensors") for stage in ("01-sft", "04-grpo")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "rolled back" in output


def test_broken_limit_stops_with_its_own_exit_code(whole: tuple[Path, Path, str]) -> None:
    recipe, run, _ = whole
    changed = ("--set", "stages.0.sft.keep=stop", "--accept-changes")
    output = finish(align("run", str(recipe), "--output", str(run), *changed), code=3)
    assert "sft: addition: " in output and "lies below its limit of +0.9" in output
    finish(align("run", str(recipe), "--output", str(run), "--accept-changes"))


def test_recipe_of_the_run_folder_is_a_recipe(whole: tuple[Path, Path, str]) -> None:
    assert load_recipe(whole[1] / "recipe.yaml").recipe.stages[1].sample.completions == 4


def test_stopped_stage_goes_back_once_the_recipe_says_so(whole: tuple[Path, Path, str], tmp_path: Path) -> None:
    recipe = load_recipe(whole[0]).recipe
    folder = RunFolder(tmp_path / "run", recipe, accept_changes=False)
    grpo = recipe.stages[3]
    folder.stage(grpo).final.mkdir(parents=True)
    folder.add_tax("grpo", {("sft", "evals"): []}, ["addition: too low"])
    assert not folder.is_done(grpo)  # its recipe says `rollback`, and it has not gone back
    folder.stage(grpo).rolled_back.write_text("0")
    assert folder.is_done(grpo)
    folder.close()


@pytest.mark.slow
def test_kills_in_sampling_and_in_the_reward_model_change_nothing(
    whole: tuple[Path, Path, str], tmp_path: Path
) -> None:
    recipe, run = write_recipe(tmp_path, RECIPE, RULES), tmp_path / "run"
    for stage, step in (("02-sample", 1), ("03-judge", 3), ("04-grpo", 3)):
        process = align("run", str(recipe), "--output", str(run))
        wait_for_step(run, stage, step, process)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finish(align("run", str(recipe), "--output", str(run)))
    for stage in ("02-sample", "03-judge", "04-grpo"):
        for ours, theirs in zip(metrics(run, stage), metrics(whole[1], stage), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6, nan_ok=True), stage
    same = ("02-sample/final/rows.jsonl", "tax.json")
    assert all((run / name).read_text() == (whole[1] / name).read_text() for name in same)
