"""`train: auto` and `rollout: auto`: the layout that is predicted to be best, chosen once for a run."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest
import ray
import yaml
from test_run import align, finish, metrics

from alignment.config import TrainConfig
from hybrid_engine import actors
from hybrid_engine.actors import at_hand
from hybrid_engine.cluster import GIB, cluster
from hybrid_engine.forecast import Work
from hybrid_engine.layout import misfits
from hybrid_engine.prospect import prospect, ranked
from recipes.cli import main
from recipes.resume import RunFolder
from recipes.scale import configuration, model_of, settled
from recipes.schema import AUTO, json_schema, load_recipe, resolved
from recipes.source import RecipeError
from rollout.config import RolloutConfig
from rollout.vllm.environment import Installed

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
SMALL = """
name: small
model: {init: {preset: deepseek-v2-nano, vocab_size: 300}}
train: auto
rollout: {replicas: auto, max_length: 64, max_num_seqs: 64, memory: 0.25}
stages:
  - sft:
      data: {function: "recipes.skills:sft_rows", args: {addition: 60, sorting: 0, reversing: 0}}
      steps: 2
      batch_size: 8
      max_length: 64
  - grpo:
      prompts: {function: "recipes.skills:skill_prompts", args: {skill: addition, count: 60}}
      rewards: [{function: "rewards.exact_match:exact_match"}]
      steps: 2
      prompts_per_step: 4
      completions: 4
      max_new_tokens: 8
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL)
    return path


def test_auto_becomes_a_layout_that_the_check_accepts(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_recipe(small)
    assert loaded.auto == ("train", "rollout")
    found, said = settled(loaded, None, None)
    recipe, cores = found.recipe, len(os.sched_getaffinity(0))
    assert not found.auto and recipe.rollout.max_length == 64
    assert max(recipe.train.world, recipe.rollout.world * recipe.rollout.replicas) <= cores
    assert f"train: auto is replicate {recipe.train.replicate}, shard {recipe.train.shard}" in said
    assert main(["check", str(small)]) == 0
    assert said in " ".join(capsys.readouterr().out.split())
    copy = small.with_name("copy.yaml")
    copy.write_text(yaml.safe_dump(resolved(recipe)))
    assert load_recipe(copy).recipe == recipe


def test_the_demo_may_be_auto_and_other_keys_stand_beside() -> None:
    beside = "rollout={replicas: auto, max_num_seqs: 512, max_length: 128}"
    recipe = settled(load_recipe(RECIPES / "demo.yaml", ["train=auto", beside]), None, None)[0].recipe
    assert recipe.rollout.max_num_seqs == 512
    assert not list(misfits(recipe.train, recipe.rollout, configuration(recipe).to_dict()))


def test_a_run_that_goes_on_keeps_its_layout(small: Path) -> None:
    """Whatever machine it goes on, and whatever would be chosen there."""
    other = ["train={shard: 2, expert: 2}", "rollout.replicas=2"]
    folder = RunFolder(small.parent / "run", load_recipe(small, other).recipe, accept_changes=False)
    folder.close()
    found, said = settled(load_recipe(small), folder.path / "recipe.yaml", None)
    assert (found.recipe.train.shard, found.recipe.train.expert, found.recipe.rollout.replicas) == (2, 2, 2)
    assert "was begun" in said and "replicas 2" in said
    RunFolder(folder.path, found.recipe, accept_changes=False).close()
    longer = load_recipe(small, ["rollout={replicas: auto, max_length: 96}"])
    with pytest.raises(RecipeError, match=r"rollout\.max_length: 64 -> 96"):
        RunFolder(folder.path, settled(longer, folder.path / "recipe.yaml", None)[0].recipe, accept_changes=False)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train=best", "train: should be a section of keys or `auto`, not 'best'"),
        ("model=auto", "model: should be a section of keys, not 'auto'"),
        ("train={shard: best}", "train.shard: should be a valid integer"),
        ("train={shard: auto, expert: 2}", "train.expert: `shard: auto` chooses this, too: leave it out"),
        ("rollout={replicas: auto, tensr: 2}", "rollout.tensr: unknown key; did you mean 'tensor'?"),
        ("model={path: ./nowhere}", "model.path: no model to plan for: model.path: "),
    ],
)
def test_a_wrong_word_is_one_clear_error(
    small: Path, override: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", str(small), "--output", str(small.parent / "run"), "--set", override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and f"--set {override}" in line


def test_the_schema_knows_auto(small: Path) -> None:
    recipe = yaml.safe_load(SMALL)
    jsonschema.validate(recipe, json_schema())
    for wrong in ({"train": "best"}, {"model": "auto"}, {"rollout": {"replicas": "many"}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(recipe | wrong, json_schema())
    for section, keys in AUTO.items():
        assert json_schema()["properties"][section]["anyOf"][0] == {"const": "auto"}
        assert {*keys} <= json_schema()["$defs"][f"{section.title()}Config"]["properties"].keys()


# -- which layout -----------------------------------------------------------------------------------------------------

LITE = load_recipe(RECIPES / "deepseek_v2_lite_one_gpu.yaml").recipe
AUTO_LITE = ["train={shard: auto, dtype: bfloat16, tokens_per_rank: 4096}"]
AUTO_LITE += ["rollout={replicas: auto, dtype: bfloat16, max_length: 2048, memory: 0.45, eager: false}"]


def test_a_cluster_string_decides(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    recipe = str(RECIPES / "deepseek_v2_lite_one_gpu.yaml")
    assert main(["plan", recipe, "--cluster", "1x8xH100-80GB", "--set", *AUTO_LITE]) == 0
    said = next(line for line in capsys.readouterr().out.splitlines() if "auto is" in line)
    assert "train: auto is replicate" in said and "rollout: auto is replicas" in said and "8 H100-80GB" in said
    assert main(["plan", recipe, "--cluster", "1x1xH100-80GB+16GiB", "--set", *AUTO_LITE]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train: no layout fits 1 x 1 H100-80GB" in line and "--set train=" in line


def test_what_stays_resident_comes_first_and_all_stages_fit() -> None:
    model, machines = model_of(configuration(LITE)), cluster("1x8xH100-80GB")
    work = Work(groups=32, rows=8, prompt=1024, new=1024, longest=1024, samples=True)
    longer = Work(groups=32, rows=1, prompt=0, new=8192, longest=8192)
    train = LITE.train.model_copy(update={"tokens_per_rank": 8192})
    found = ranked(model, train, LITE.rollout, machines, [work, longer])
    assert found and [each.order for each in found] == sorted(each.order for each in found)
    assert max(found[0].resident("device").values()) <= machines.memory - 2 * GIB
    for each in found:
        assert prospect(model, each.train, each.rollout, machines, longer).solved().error is None


def test_on_processors_one_rank_is_best_and_the_others_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    model, work = model_of(configuration(load_recipe(RECIPES / "demo.yaml").recipe)), Work(8, 4, 56, 8, 8, samples=True)
    found = ranked(model, TrainConfig(), RolloutConfig(), cluster(None), [work])
    assert found[0].train.world == found[0].rollout.world == found[0].rollout.replicas == 1
    for each in found:
        assert not (each.rollout.tensor > 1 and each.rollout.data > 1)
    given = TrainConfig(shard=2)
    found = ranked(model, given, RolloutConfig(), cluster(None), [replace(work, samples=False)], ["rollout"])
    assert found and all(each.train is given for each in found)


# -- the machines at hand ---------------------------------------------------------------------------------------------


def test_cuda_devices_are_those_that_ray_and_torch_report(monkeypatch: pytest.MonkeyPatch) -> None:
    assert at_hand(None) is None
    monkeypatch.setattr(actors, "installed", lambda: Installed((0, 32), "cuda"))
    monkeypatch.setattr(actors, "start_ray", lambda address: address is None)
    asked, stopped = [], []
    one = SimpleNamespace(options=lambda **how: SimpleNamespace(remote=lambda: asked.append(how)))
    monkeypatch.setattr(ray, "remote", lambda function: one)
    monkeypatch.setattr(ray, "shutdown", lambda: stopped.append(1))
    monkeypatch.setattr(ray, "get", lambda ref: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(ray, "nodes", lambda: [{"Resources": {"CPU": 8.0}}])
    with pytest.raises(ValueError, match=r"no CUDA device: .*write the layout"):
        at_hand(None)
    hosts = [{"Resources": {"GPU": 8.0, "memory": size * GIB}} for size in (900.5, 1000)]
    monkeypatch.setattr(ray, "nodes", lambda: [*hosts, {"Resources": {}}])
    assert at_hand("head:1") == "2x8xH100-80GB+900GiB" and len(stopped) == 1
    assert asked == [{"num_gpus": 1}]
    found = cluster(at_hand(None))
    assert (found.hosts, found.devices, found.host_memory) == (2, 8, 900 * GIB) and len(stopped) == 2
    monkeypatch.setattr(ray, "get", lambda ref: "NVIDIA L4")
    with pytest.raises(
        ValueError, match=r"NVIDIA L4: hybrid_engine/hardware.yaml has figures of NVIDIA H100 80GB HBM3, "
    ):
        at_hand(None)


def test_a_device_without_figures_is_an_error_of_the_recipe(
    small: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def unknown(address: str | None) -> str:
        raise ValueError("NVIDIA L4: write the layout")

    monkeypatch.setattr("recipes.scale.at_hand", unknown)
    assert main(["run", str(small), "--output", str(small.parent / "run")]) == 2
    assert capsys.readouterr().err == f"align: {small}:4: train: NVIDIA L4: write the layout\n"


@pytest.mark.slow
def test_a_run_with_auto_runs_and_is_continued(small: Path) -> None:
    run = small.parent / "run"
    assert "train: auto is" in finish(align("run", str(small), "--output", str(run)))
    assert len(metrics(run, "02-grpo")) == 2
    assert isinstance(yaml.safe_load((run / "recipe.yaml").read_text())["train"]["shard"], int)
    assert "was begun" in finish(align("run", str(small), "--output", str(run)))
