"""A recipe is read, overridden, validated and written again; every mistake in it is named with file, line and key."""

from __future__ import annotations

from pathlib import Path

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

import alignment.config
from recipes.schema import Recipe, Stage, difference, json_schema, load_recipe, resolved
from recipes.source import RecipeError
from rewards.config import RewardConfig
from rollout.config import Config, RolloutConfig

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"
SOURCE, KIND = "exactly one of `path`, `function` and `from`", "exactly one of: sft, reward_model, sample, grpo"
GOOD = """\
name: small
model: {init: {}}
rollout:
  max_length: 64
stages:
  - sft:
      data: {path: pairs.jsonl}
      epochs: 2
      learning_rate: 1e-3
      max_length: 64
  - grpo:
      name: maths
      prompts: {path: prompts.jsonl}
      rewards: [{function: "my.py:f"}]
      steps: 10
      max_new_tokens: 16
"""
CONFIGS = tuple(one for one in vars(alignment.config).values() if isinstance(one, type) and issubclass(one, Config))
CONFIGS += (RewardConfig, RolloutConfig, Recipe, Stage)


def write(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text)
    return path


def error_of(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_recipe_is_read_with_its_defaults(tmp_path: Path):
    recipe = load_recipe(write(tmp_path, GOOD)).recipe
    assert [(stage.kind, stage.name) for stage in recipe.stages] == [("sft", "sft"), ("grpo", "maths")]
    assert recipe.stages[0].config.learning_rate == 0.001
    assert recipe.start_of(recipe.stages[0]) is None
    assert recipe.start_of(recipe.stages[1]) is recipe.stages[0]
    assert recipe.folder == tmp_path.resolve() and recipe.data_folder is None
    assert load_recipe(tmp_path / "small.yaml", ["data_dir=d"]).recipe.data_folder == recipe.folder / "d"


def test_a_branch_starts_from_the_stage_it_names(tmp_path: Path):
    recipe = load_recipe(
        write(tmp_path, GOOD + "  - sft: {name: control, from: sft, data: {path: a.jsonl}, steps: 1}\n")
    ).recipe
    assert recipe.start_of(recipe.stages[2]) is recipe.stages[0]


MISTAKES = {
    "unknown key": ("      steps: 10", "      stesp: 10", 15, "stages.1.grpo.stesp", "did you mean 'steps'?"),
    "unknown section": ("rollout:", "rolout:", 3, "rolout", "did you mean 'rollout'?"),
    "unknown stage": ("  - grpo:", "  - gpro:", 11, "stages.1.gpro", "did you mean 'grpo'?"),
    "unknown key in a list": ('"my.py:f"', '"my.py:f", wight: 1', 14, "stages.1.grpo.rewards.0.wight", "'weight'"),
    "wrong type": ("      epochs: 2", "      epochs: two", 8, "stages.0.sft.epochs", "not 'two'"),
    "a number for a section": ("model: {init: {}}", "model: 3", 2, "model", "should be a section of keys, not 3"),
    "not one of the choices": ("      steps: 10", "      steps: 10\n      truncated: cut", 16, "truncated", "'mask'"),
    "too small": (
        "max_length: 64\nstages",
        "max_length: 1\nstages",
        4,
        "rollout.max_length",
        "greater than or equal to 2",
    ),
    "infinite": ("learning_rate: 1e-3", "learning_rate: .inf", 9, "stages.0.sft.learning_rate", "finite number"),
    "missing key": ("      steps: 10\n", "", 11, "stages.1.grpo.steps", "this key is required"),
    "top-p": ("      steps: 10", "      steps: 10\n      top_p: 0.9", 16, "stages.1.grpo.top_p", "full distribution"),
    "two durations": (
        "      epochs: 2",
        "      epochs: 2\n      steps: 3",
        6,
        "stages.0.sft",
        "exactly one of `epochs`",
    ),
    "no model": ("{init: {}}", "{}", 2, "model", "exactly one of `path` and `init`"),
    "no data": ("{path: prompts.jsonl}", "{}", 13, "stages.1.grpo.prompts", SOURCE),
    "indivisible": (
        "      steps: 10",
        "      steps: 10\n      prompts_per_step: 10\n      updates_per_batch: 4",
        11,
        "stages.1.grpo",
        "`updates_per_batch` (4) does not divide `prompts_per_step` (10)",
    ),
    "schedule": (
        "      steps: 10",
        "      steps: 10\n      warmup_steps: 11",
        11,
        "stages.1.grpo",
        "are 11, more than the 10",
    ),
    "constant decay": (
        "      steps: 10",
        "      steps: 10\n      decay_steps: 3",
        11,
        "stages.1.grpo",
        "needs `schedule",
    ),
    "reserved name": ('"my.py:f"}', '"my.py:mean"}', 11, "stages.1.grpo", "a reward cannot be called `mean`"),
    "rewards alike": ('"my.py:f"}', '"my.py:f"}, {function: "b:f"}', 11, "stages.1.grpo", "two rewards are called `f`"),
    "idle reference": (
        "      steps: 10",
        "      steps: 10\n      reference: sft",
        11,
        "stages.1.grpo",
        "while `kl` is 0",
    ),
    "later stage": (
        "      epochs: 2",
        "      epochs: 2\n      from: maths",
        9,
        "stages.0.sft.from",
        "no earlier policy stage",
    ),
    "no such stage": (
        "      steps: 10",
        "      steps: 10\n      from: sftt",
        16,
        "stages.1.grpo.from",
        "did you mean 'sft'?",
    ),
    "no such reference": (
        "      steps: 10",
        "      steps: 10\n      kl: 0.1\n      reference: x",
        17,
        "reference",
        "no earlier",
    ),
    "same names": ("      name: maths", "      name: sft", 12, "stages.1.grpo.name", "two stages are called `sft`"),
    "no room": ("max_new_tokens: 16", "max_new_tokens: 64", 16, "stages.1.grpo.max_new_tokens", "no room for a prompt"),
    "micro-batch": (
        "rollout:",
        "train: {tokens_per_rank: 32}\nrollout:",
        7,
        "stages.0.sft",
        "does not fit `train.tokens",
    ),
    "capacity of what": ("      steps: 10", "      steps: 10\n      capacity: 1", 16, "capacity", "`train.balance"),
    "no stage": (GOOD[GOOD.index("  - sft") :], "  []\n", 5, "stages", "at least 1 item"),
    "two kinds": ("      max_new_tokens: 16", "    sft: {}", 11, "stages.1", KIND),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_is_named_with_file_line_and_key(tmp_path: Path, mistake: str):
    old, new, line, key, words = MISTAKES[mistake]
    assert GOOD.count(old) == 1
    path = write(tmp_path, GOOD.replace(old, new))
    if mistake == "two kinds":
        path.write_text(path.read_text().replace("    sft: {}", "    sft: {data: {path: a.jsonl}, steps: 1}"))
    message = error_of(path)
    found = next((one for one in message.splitlines() if words in one), message)
    assert found.startswith(f"{path}:{line}: ") and key in found and words in found, message
    assert len(message.splitlines()) <= 3


def test_all_mistakes_are_named_at_once_on_one_screen(tmp_path: Path):
    text = (
        GOOD.replace("epochs: 2", "epochs: two")
        .replace("steps: 10", "stesp: 10")
        .replace("max_length: 64\nst", "max_length: x\nst")
    )
    assert len(error_of(write(tmp_path, text)).splitlines()) == 4
    message = error_of(write(tmp_path, GOOD + "".join(f"key{i}: 1\n" for i in range(50))))
    assert len(message.splitlines()) == 21 and message.endswith("... and 30 more")


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("name: a\nname: b\n", 2, "`name` stands twice"),
        ("name: [a\nmodel: b\n", 2, "not YAML"),
        ("name: !!python/name:os.system a\n", 1, "not YAML: could not determine a constructor"),
        ("name: &a {b: *a}\n", None, "not YAML"),
        ("? [a, b]\n: 1\n", 1, "a key must be plain text"),
        ("name: a\x00b\n", None, "not YAML"),
        ("- a\n", None, "a recipe is a YAML mapping"),
        ("", None, "a recipe is a YAML mapping"),
    ],
)
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str, line: int | None, words: str):
    path = write(tmp_path, text)
    message = error_of(path)
    assert message.startswith(f"{path}:{line}: " if line else f"{path}: ") and words in message


def test_files_that_cannot_be_read_are_named(tmp_path: Path):
    message = error_of(tmp_path / "none.yaml")
    assert message.startswith(f"{tmp_path}/none.yaml: cannot read this recipe: ") and "No such file" in message
    (tmp_path / "small.yaml").write_bytes(b"name: \xff")
    assert "'utf-8' codec can't decode" in error_of(tmp_path / "small.yaml")


def test_numbers_with_an_exponent_are_numbers(tmp_path: Path):
    text = GOOD.replace("{path: prompts.jsonl}", "{function: 'a:b', args: {a: 1e-6, b: -2.5E+3, c: 3, d: 1e-6x}}")
    values = load_recipe(write(tmp_path, text)).recipe.stages[1].config.prompts.args
    assert values == {"a": 1e-6, "b": -2500.0, "c": 3, "d": "1e-6x"}


def test_sections_can_be_shared_by_anchor_and_merge(tmp_path: Path):
    text = GOOD.replace("sft:\n", "sft: &both\n").replace("epochs: 2", "steps: 2")
    text += "  - sft:\n      <<: *both\n      name: more\n      steps: 7\n"
    first, _, more = load_recipe(write(tmp_path, text)).recipe.stages
    assert (first.config.steps, more.config.steps) == (2, 7)
    assert more.config.learning_rate == first.config.learning_rate == 0.001


def test_overrides_reach_any_key(tmp_path: Path):
    overrides = ["stages.1.grpo.steps=20", "stages.1.grpo.kl=1e-2", "rollout.replicas=2", "evals.tasks=[a, b]"]
    overrides += ["stages.1.grpo.rewards.0.weight=0.5", "stages.0.sft.epochs=", "stages.0.sft.steps=3", "train.shard=2"]
    recipe = load_recipe(write(tmp_path, GOOD), overrides).recipe
    sft, grpo = (stage.config for stage in recipe.stages)
    assert (grpo.steps, grpo.kl, grpo.rewards[0].weight, sft.epochs, sft.steps) == (20, 0.01, 0.5, None, 3)
    assert (recipe.rollout.replicas, recipe.train.shard, recipe.evals.tasks) == (2, 2, ("a", "b"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rollout.max_lenght=3", "rollout.max_lenght: unknown key; did you mean 'max_length'?"),
        ("stages.1.grpo.steps=many", "stages.1.grpo.steps: should be a valid integer"),
        ("stages.2.grpo.steps=1", "no such key in `[{'sft'"),
        ("stages.math.steps=1", "items of lists count from 0"),
        ("name.first=1", "no such key in `'small'`"),
        ("rollout.max_length", "write KEY=VALUE"),
        ("..=3", "write KEY=VALUE"),
        ("name=[a", "not YAML"),
    ],
)
def test_wrong_override_is_named(tmp_path: Path, override: str, words: str):
    message = error_of(write(tmp_path, GOOD), override)
    assert message.startswith(f"--set {override}: ") and words in message


def test_resolved_recipe_can_be_run_from_elsewhere(tmp_path: Path):
    recipe = load_recipe(DEMO, ["data_dir=../data"]).recipe
    copy = tmp_path / "recipe.yaml"
    copy.write_text(yaml.safe_dump(resolved(recipe), sort_keys=False))
    again = load_recipe(copy).recipe
    assert again == recipe and again.data_folder == DEMO.parent / ".." / "data"
    assert difference(resolved(recipe), yaml.safe_load(copy.read_text())) == []


def test_difference_names_the_changed_keys(tmp_path: Path):
    path = write(tmp_path, GOOD)
    old = resolved(load_recipe(path).recipe)
    path.write_text(GOOD + "  - sft: {name: more, data: {path: a.jsonl}, steps: 1}\n")
    new = resolved(load_recipe(path, ["stages.1.grpo.steps=20", "model.init.vocab_size=300"]).recipe)
    lines = difference(old, new)
    assert lines[:2] == ["model.init.vocab_size: 512 -> 300", "stages.1.grpo.steps: 10 -> 20"]
    assert "stages.2.sft.steps: (absent) -> 1" in lines
    assert "stages.2.sft.steps: 1 -> (absent)" in difference(new, old)


def test_recipes_have_few_keys_and_each_is_explained():
    """A key that several sections have is learnt, and counted, once."""
    own = {config: [name for name in config.model_fields if name in config.__annotations__] for config in CONFIGS}
    assert len(set().union(*own.values())) < 80
    for config, names in own.items():
        for name in names:
            text = config.model_fields[name].description
            assert text and "\n" not in text and len(text) <= 120, f"{config.__name__}.{name} needs one doc line"


def test_every_config_of_the_recipe_is_counted():
    found: set[type[BaseModel]] = {
        base for config in CONFIGS for base in config.__mro__ if base.__name__ in json_schema()["$defs"]
    }
    assert {config.__name__ for config in found} == set(json_schema()["$defs"])


def test_json_schema_accepts_recipes_and_refuses_mistakes():
    schema = json_schema()
    demo = yaml.safe_load(DEMO.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(demo, schema)
    for mistake in ({"modle": 1}, {"stages": [{"sft": demo["stages"][0]["sft"], "grpo": demo["stages"][1]["grpo"]}]}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**demo, **mistake}, schema)
    assert list(schema["$defs"]["Stage"]["properties"]) == ["sft", "reward_model", "sample", "grpo"]
