"""The recipes of the project, on the real files where they read such."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_run import align, finish, metrics

from alignment.config import InitConfig
from alignment.model import preset_config, train_tokenizer
from recipes.check import check
from recipes.schema import load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
TURNS = "\n\nHuman: {}\n\nAssistant: {}"
GROUPS = {"reasoning": "addition", "knowledge": "sorting", "instruction": "reversing"}
GSM8K = RECIPES / "gsm8k_bbh.yaml"


def test_the_recipe_on_real_files_passes_its_check(shared_data: Path) -> None:
    assert len(list(check(load_recipe(GSM8K, []), []))) > 3


def test_the_control_differs_from_the_demo_in_the_second_stage_alone() -> None:
    demo, control = (load_recipe(RECIPES / f"{name}.yaml", []).recipe for name in ("demo", "demo_control"))
    shared = {"name", "stages"}
    assert demo.model_dump(exclude=shared) == control.model_dump(exclude=shared)
    assert demo.stages[0] == control.stages[0]
    assert control.stages[1].config.data == control.stages[0].config.data


@pytest.mark.slow
def test_the_recipe_on_real_files_runs(shared_data: Path, tmp_path: Path) -> None:
    less = ["stages.0.sft.steps=2", "stages.0.sft.warmup_steps=1", "stages.1.grpo.steps=2", "evals.limit=8"]
    output = finish(align("run", str(GSM8K), "--output", str(tmp_path / "run"), "--set", *less))
    steps = metrics(tmp_path / "run", "02-grpo")
    assert len(steps) == 2
    assert all({"reward/correct", "reward/form", "mismatch/k3"} <= step.keys() for step in steps if step["updates"])
    for task in ("boolean_expressions", "multistep_arithmetic_two", "object_counting", "navigate", "humaneval"):
        assert task in output


def test_the_papers_recipe_passes_its_check_on_stand_ins(tmp_path: Path) -> None:
    """DeepSeek-V2's true configuration with a small tokenizer, a few rows in each format, one local eval per group."""
    rows = {
        "sft": [{"prompt": f"{i}?", "completion": f"{i}!"} for i in range(2000)],
        "problems": [{"prompt": f"1+{i}", "answer": str(i + 1)} for i in range(500)]
        + [{"prompt": f"def f{i}", "tests": f"assert f{i}() == 1"} for i in range(500)],
        "helpful": [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(2000)],
        "safety": [{"chosen": TURNS.format(i, "no"), "rejected": TURNS.format(i, "yes")} for i in range(2000)],
        "prompts": [{"prompt": f"{i}?"} for i in range(2000)],
    }
    for name, found in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    tokenizer = train_tokenizer(InitConfig(vocab_size=300), ["1+1=2"])
    preset_config(InitConfig(preset="deepseek-v2"), tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tasks = ", ".join(f"{group}: [tasks/{task}.yaml]" for group, task in GROUPS.items())
    stand_ins = [f"data_dir={tmp_path}", f"model.path={tmp_path / 'model'}", f"evals.tasks={{{tasks}}}"]
    sections = list(check(load_recipe(RECIPES / "deepseek_v2_paper.yaml", stand_ins), []))
    assert len(sections) > 7
    recipe = load_recipe(RECIPES / "deepseek_v2_paper.yaml").recipe
    assert recipe.train.world == 128 == recipe.rollout.world * recipe.rollout.replicas
    assert [stage.name for stage in recipe.stages][-2:] == ["reasoning", "preference"]


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 60 and max(map(len, path.read_text().splitlines())) <= 150
