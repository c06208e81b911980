"""`align check` finds what is wrong with data, rewards, prompts and evals before a model is loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from alignment.tax import detectable_drop
from recipes.check import check, check_files, check_libraries
from recipes.plan import plan
from recipes.schema import load_recipe
from recipes.source import RecipeError

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """\
name: small
model: {init: {vocab_size: 300}}
rollout: {max_length: 32}
train: {shard: 2}
evals: {tasks: [sums.yaml]}
stages:
  - sft:
      data: {path: pairs.jsonl}
      epochs: 2
      batch_size: 8
      max_length: 16
  - grpo:
      prompts: {path: prompts.json, columns: {prompt: question}}
      rewards: [{function: "my.py:reward"}]
      steps: 10
      prompts_per_step: 6
      completions: 4
      updates_per_batch: 3
      max_new_tokens: 8
"""
REWARD = "def reward(prompts, completions, answer, **kwargs):\n    return [0.0] * len(prompts)\n"
TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: sums.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: prompt
doc_to_target: completion
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A valid recipe with its files."""
    pairs = [{"prompt": f"{i} + {i} =", "completion": f" {2 * i}"} for i in range(20)]
    lines = "\n".join(map(json.dumps, pairs))
    (tmp_path / "pairs.jsonl").write_text(lines)
    (tmp_path / "sums.jsonl").write_text(lines)
    (tmp_path / "prompts.json").write_text(
        json.dumps([{"question": p["prompt"], "answer": p["completion"]} for p in pairs])
    )
    (tmp_path / "my.py").write_text(REWARD)
    (tmp_path / "sums.yaml").write_text(TASK)
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path / "small.yaml"


def errors(recipe: Path, *overrides: str) -> list[str]:
    """The lines that `align check` prints for a wrong recipe."""
    with pytest.raises(RecipeError) as caught:
        list(check(load_recipe(recipe, overrides), []))
    return str(caught.value).splitlines()


def printed(sections) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        for section in sections:
            console.print(section)
    return capture.get()


def test_batch_arithmetic_is_printed_resolved(recipe: Path):
    loaded = load_recipe(recipe)
    text = printed(plan(loaded.recipe, check_files(loaded)))
    # 20 rows x 2 epochs / 8 a step = 5 steps; 8 sequences x 16 tokens, 4 of them on each of two ranks.
    assert "5, 2.00 epochs" in text and "8 sequences of at most 16 tokens, 1 update" in text
    assert "at most 128 a step, 64 per rank in an update" in text
    # 6 x 4 = 24 sequences in 3 updates of 2 groups, one group a rank: 4 x 32 tokens.
    assert "6 prompts x 4 completions = 24 sequences" in text and "3 per step, of 8 sequences each" in text
    assert "at most 768 a step, 128 per rank in an update" in text
    assert "prompt 24 + new 8 = 32 at most" in text and "pairs.jsonl, 20 rows" in text


@pytest.mark.parametrize(
    ("file", "content", "line", "key", "words"),
    [
        ("pairs.jsonl", None, 8, "stages.0.sft.data.path", "pairs.jsonl: no such file"),
        ("prompts.json", None, 13, "stages.1.grpo.prompts.path", "prompts.json: no such file"),
        ("sums.yaml", None, 5, "evals.tasks.0", "no such file or folder"),
        ("pairs.jsonl", "", 8, "stages.0.sft.data.path", "the dataset is empty"),
        ("prompts.json", "[]", 13, "stages.1.grpo.prompts.path", "the dataset is empty"),
        ("pairs.jsonl", '{"prompt": "a"}', 8, "stages.0.sft.data.path", "row 0: needs `prompt` and `completion`"),
        ("prompts.json", '[{"text": "a"}]', 13, "stages.1.grpo.prompts.path", "row 0: no column `question`"),
        ("pairs.jsonl", '{"prompt": "a"\n', 8, "stages.0.sft.data.path", "line 1: not valid JSON"),
    ],
)
def test_wrong_files_are_named_at_once(recipe: Path, file: str, content: str | None, line: int, key: str, words: str):
    if content is None:
        (recipe.parent / file).unlink()
    else:
        (recipe.parent / file).write_text(content)
    with pytest.raises(RecipeError) as caught:
        check_files(load_recipe(recipe))
    assert str(caught.value).startswith(f"{recipe}:{line}: {key}: ") and words in str(caught.value)


def test_missing_prompt_column_is_named(recipe: Path):
    found = errors(recipe, "stages.1.grpo.prompts.columns={}")
    assert (
        len(found) == 1 and "row 0: needs `prompt`; there are: question, answer (`columns: {prompt: NAME}`" in found[0]
    )


def test_every_missing_file_is_named_together(recipe: Path):
    for name in ("pairs.jsonl", "sums.yaml"):
        (recipe.parent / name).unlink()
    assert len(errors(recipe, "model.init=", "model.path=./nowhere", "model.chat_template=x.jinja")) == 4
    assert "no such file or folder" in errors(recipe, "data_dir=elsewhere")[0]


def test_data_are_read_from_the_data_folder(recipe: Path):
    folder = recipe.parent / "data"
    folder.mkdir()
    for name in ("pairs.jsonl", "prompts.json"):
        (recipe.parent / name).rename(folder / name)
    assert "no such file" in errors(recipe)[0]
    assert len(check_files(load_recipe(recipe, ["data_dir=data"]))) == 2


def test_schedule_longer_than_the_epochs_is_refused(recipe: Path):
    assert "are 6, more than the 5 optimiser steps" in errors(recipe, "stages.0.sft.warmup_steps=6")[0]
    check_files(load_recipe(recipe, ["stages.0.sft.warmup_steps=5"]))


def test_good_recipe_passes_and_shows_what_its_evals_can_see(recipe: Path):
    text = printed(check(load_recipe(recipe), []))
    drop = f"{100 * detectable_drop(20):.1f} points"
    assert "sums" in text and drop in text and "24 for a prompt" in text


def test_eval_items_in_training_rows_are_a_warning_that_names_stage_task_and_rows(recipe: Path):
    text = printed(check(load_recipe(recipe), []))
    lines = [" ".join(line.split()) for line in text.splitlines() if "20 of 20" in line]
    assert lines == [f"│ {stage} │ sums │ 20 of 20 │ 0, 1, 2, 3, 4 │ 0 0 │" for stage in ("sft", "grpo")]
    other = "\n".join(json.dumps({"prompt": f"7 + {i} =", "completion": f" {i + 7}"}) for i in range(100, 120))
    (recipe.parent / "sums.jsonl").write_text(other)
    text = printed(check(load_recipe(recipe), []))
    assert " of 20" not in text and "none" in text


LIBRARY_MISTAKES = {
    "data function": (
        "stages.0.sft.data={function: 'my.py:rows'}",
        "stages.0.sft.data.function",
        "has no function 'rows'",
    ),
    "no module": (
        "stages.1.grpo.rewards.0.function=nowhere:f",
        "stages.1.grpo.rewards.0",
        "No module named 'nowhere'",
    ),
    "no file": ("stages.1.grpo.rewards.0.function=mine.py:reward", "stages.1.grpo.rewards.0", "did you mean 'my.py'?"),
    "no function": (
        "stages.1.grpo.rewards.0.function=my.py:rewrd",
        "stages.1.grpo.rewards.0",
        "did you mean 'reward'?",
    ),
    "wrong argument": ("stages.1.grpo.rewards.0.args={depth: 1}", "stages.1.grpo.rewards.0", "'depth'"),
    "long prompt": ("rollout.max_length=12", "stages.1.grpo.prompts.path", "exceed the context of 12"),
    "no task": ("evals.tasks=[gsm9k_of_mars]", "evals", "gsm9k_of_mars"),
    "eval too long": ("evals.max_new_tokens=30", "evals", "sums"),
    "no such limit": (
        "evals.keep={smus: -0.1}",
        "evals.keep",
        "no benchmark or group is called `smus`; did you mean 'sums'?",
    ),
    "no tokenizer": ("model={path: ./folder}", "model", "folder"),
}


@pytest.mark.parametrize("mistake", LIBRARY_MISTAKES)
def test_what_libraries_refuse_is_named_before_a_model_is_loaded(recipe: Path, mistake: str):
    override, key, words = LIBRARY_MISTAKES[mistake]
    (recipe.parent / "folder").mkdir()
    found = errors(recipe, override)
    assert len(found) <= 10 and any(f": {key}: " in line and words in line for line in found), found


def test_lengths_past_the_models_own_context_are_refused(recipe: Path):
    overrides = ["rollout.max_length=200000", "train.tokens_per_rank=300000", "stages.0.sft.max_length=300000"]
    found = errors(recipe, *overrides)
    assert len(found) == 2 and "rollout.max_length: 200000 tokens, the model's context is" in found[0]
    assert "stages.0.sft.max_length: 300000 tokens" in found[1]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import nothing_like_this\n" + REWARD, "No module named 'nothing_like_this'"),
        ("def reward(prompts, completions):\n    return []\n", "add **kwargs"),
        ("def reward(prompts, completions, solution, **kwargs):\n    return []\n", "needs 'solution'"),
        ("def reward(prompts, completions, **kwargs) return []\n", "SyntaxError"),
        ("reward = 3\n", "not a function"),
    ],
)
def test_wrong_reward_is_named(recipe: Path, code: str, words: str):
    (recipe.parent / "my.py").write_text(code)
    found = errors(recipe)
    assert found[0].startswith(f"{recipe}:14: stages.1.grpo.rewards.0: ") and words in "\n".join(found)


def test_the_first_part_and_the_schema_need_no_heavy_library(recipe: Path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom recipes.cli import main\nfrom recipes.check import check_files\n"
        "from recipes.plan import plan\nfrom recipes.schema import load_recipe\nmain(['schema'])\n"
        f"loaded = load_recipe(Path({str(recipe)!r}))\nlist(plan(loaded.recipe, check_files(loaded)))\n"
        "heavy = {'torch', 'ray', 'vllm', 'transformers', 'trl', 'lm_eval', 'datasets', 'pyarrow'} & set(sys.modules)\n"
        "sys.exit(f'loaded: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["title"] == "Recipe"


def test_real_gsm8k_passes(shared_data: Path, recipe: Path):
    data = "{path: gsm8k/test.jsonl, columns: {prompt: question, completion: answer}, limit: 200}"
    overrides = [
        f"data_dir={shared_data}",
        f"stages.0.sft.data={data}",
        f"stages.1.grpo.prompts={data}",
        "evals.tasks=[]",
    ]
    loaded = load_recipe(recipe, [*overrides, "rollout.max_length=1024", "stages.0.sft.max_length=1024"])
    table = next(check_libraries(loaded, check_files(loaded), []))
    assert [list(map(str, table.columns[i].cells)) for i in (0, 1)] == [["sft", "grpo"], ["200", "200"]]
    assert list(table.columns[4].cells) == ["1,024: 0 cut, 0 dropped", "1,016 for a prompt"]
