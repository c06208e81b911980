"""The recipes of the project, on the real files where they read such."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_run import align, finish, metrics

from recipes.check import check
from recipes.schema import load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
GSM8K = RECIPES / "gsm8k_bbh.yaml"


def test_the_recipe_on_real_files_passes_its_check(shared_data: Path) -> None:
    assert len(list(check(load_recipe(GSM8K, [])))) > 3


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
    for task in ("boolean_expressions", "multistep_arithmetic_two", "object_counting", "navigate"):
        assert task in output
