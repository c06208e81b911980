"""`align check`: everything that can be known of a run before a model is loaded.

First what concerns the recipe itself and its local files: no torch, no Ray, no vLLM, an answer at once. Then what needs
libraries: the tokenizer, data functions, rewards, eval tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.table import Table

from alignment.config import GRPOConfig, SFTConfig
from alignment.metrics import check_trackers
from recipes.data import StageData, stage_data
from recipes.errors import RecipeError, shorten
from recipes.plan import plan
from recipes.schema import LoadedRecipe, Recipe
from recipes.source import Key
from recipes.versions import check_versions
from rewards.loader import check_reward
from rollout.data import row_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = list[dict[str, Any]]
ASSUMPTION = "smallest drop: the paired 95% interval leaves out zero when 20% of the items change sides"


def check(loaded: LoadedRecipe) -> Iterator[RenderableType]:
    """Check a recipe part by part and yield what a person should see of each.

    Raises RecipeError with every problem of the first part that has any.
    """
    rows = check_files(loaded)
    yield from plan(loaded.recipe, rows)
    check_versions()
    yield from check_libraries(loaded, rows)


def check_files(loaded: LoadedRecipe) -> dict[Key, Rows]:
    """See that local files exist and hold the right columns; the rows of each dataset that is a file, by its key.

    Raises RecipeError. Imports neither torch nor Ray nor vLLM.
    """
    recipe, problems = loaded.recipe, _Problems(loaded)
    rows: dict[Key, Rows] = {}
    with problems.at(("trackers",)):
        check_trackers(recipe.trackers)
    for key, name in _local_paths(recipe):
        path = recipe.folder / Path(name).expanduser()
        if not path.exists():
            problems.add(key, f"no such file or folder: {path}")
    for data in stage_data(recipe):
        if data.is_file:
            _load(recipe, data, rows, problems)
    problems.stop()
    return rows


def check_libraries(loaded: LoadedRecipe, rows: Mapping[Key, Rows]) -> Iterator[RenderableType]:
    """Check the data, tokenizer, rewards and eval tasks with the libraries that read them; no model is loaded.

    rows: what `check_files` has read. Raises RecipeError.
    """
    recipe, problems, found = loaded.recipe, _Problems(loaded), dict(rows)
    for data in stage_data(recipe):
        if data.key not in found:
            _load(recipe, data, found, problems)
        if isinstance(data.stage, GRPOConfig) and data.key in found:
            for index, reward in enumerate(data.stage.rewards):
                with problems.at((*data.stage_key, "rewards", index)):
                    check_reward(reward, recipe.folder, set(found[data.key][0]))
    problems.stop()
    with problems.at(("model",)):
        tokenizer = _tokenizer(recipe, found, problems)
    problems.stop()
    tables = [_check_lengths(recipe, found, tokenizer, problems)]
    if recipe.evals.tasks:
        with problems.at(("evals",)):
            tables.append(_check_evals(recipe, tokenizer))
    problems.stop()
    yield from tables


class _Problems:
    """Collects ValueErrors as problems of a key: `with problems.at(key): ...`."""

    def __init__(self, loaded: LoadedRecipe) -> None:
        self.source = loaded.source
        self.found: list[str] = []

    def add(self, key: Key, message: str) -> None:
        self.found.append(self.source.problem(key, message))

    @contextmanager
    def at(self, key: Key) -> Iterator[None]:
        try:
            yield
        except ValueError as error:
            self.add(key, shorten(str(error)))

    def stop(self) -> None:
        """Raise RecipeError when there are problems."""
        if self.found:
            raise RecipeError(self.found)


def _local_paths(recipe: Recipe) -> Iterator[tuple[Key, str]]:
    """Key and name of every file and folder that must be local, the data's aside."""
    path = recipe.model.path
    if path is not None and (path.startswith((".", "~", "/")) or path.count("/") > 1):  # not a hub's `owner/name`
        yield ("model", "path"), path
    if recipe.model.chat_template is not None:
        yield ("model", "chat_template"), recipe.model.chat_template
    if recipe.data_dir is not None:
        yield ("data_dir",), recipe.data_dir
    for index, task in enumerate(recipe.evals.tasks):
        if task.endswith((".yaml", ".yml")):
            yield ("evals", "tasks", index), task


def _load(recipe: Recipe, data: StageData, rows: dict[Key, Rows], problems: _Problems) -> None:
    with problems.at(data.key):
        rows[data.key] = data.load(recipe)
    if isinstance(data.stage, SFTConfig) and data.key in rows:
        with problems.at(data.stage_key):
            data.stage.check_schedule(data.stage.total_steps(len(rows[data.key])))


def _tokenizer(recipe: Recipe, rows: Mapping[Key, Rows], problems: _Problems) -> PreTrainedTokenizerBase:
    """The policy's tokenizer; the model's own context must hold the recipe's lengths."""
    from alignment.model import load_tokenizer, model_config

    texts = row_texts(chain.from_iterable(rows[data.key] for data in stage_data(recipe)))
    tokenizer = load_tokenizer(recipe.model, recipe.folder, texts)
    context = model_config(recipe.model, tokenizer, recipe.folder).get_text_config().max_position_embeddings
    if recipe.rollout.max_length > context:
        problems.add(("rollout", "max_length"), f"{recipe.rollout.max_length} tokens, the model's context is {context}")
    for data in stage_data(recipe):
        if isinstance(data.stage, SFTConfig) and data.stage.max_length > context:
            message = f"{data.stage.max_length} tokens, the model's context is {context}"
            problems.add((*data.stage_key, "max_length"), message)
    return tokenizer


def _check_lengths(
    recipe: Recipe, rows: Mapping[Key, Rows], tokenizer: PreTrainedTokenizerBase, problems: _Problems
) -> Table:
    table = Table(
        "stage", "rows", "tokens on average", "longest", "limit", title=f"Data, with {len(tokenizer):,} token ids"
    )
    for stage, data in zip(recipe.stages, stage_data(recipe), strict=True):
        with problems.at(data.key):
            lengths, limit = _lengths(recipe, data, rows[data.key], tokenizer)
            mean = sum(lengths) / len(lengths)
            table.add_row(stage.name, f"{len(lengths):,}", f"{mean:,.1f}", f"{max(lengths):,}", limit)
    return table


def _lengths(recipe: Recipe, data: StageData, rows: Rows, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], str]:
    """Tokens of each row, and what is done about long ones. Raises ValueError for a prompt too long to answer."""
    from alignment.sft_data import make_sft_rows
    from rollout.prompts import check_lengths, make_prompts

    if isinstance(data.stage, GRPOConfig):
        prompts = make_prompts(rows, tokenizer, data.source)
        check_lengths(prompts, recipe.rollout.max_length, data.stage.max_new_tokens, data.source)
        room = recipe.rollout.max_length - data.stage.max_new_tokens
        return [len(prompt.token_ids) for prompt in prompts], f"{room:,} for a prompt"
    trajectories, counts = make_sft_rows(rows, tokenizer, data.stage, data.source)
    data.stage.check_schedule(data.stage.total_steps(len(trajectories)))
    note = f"{data.stage.max_length:,}: {counts['cut']:,} rows cut, {counts['dropped']:,} left out"
    return [len(row.token_ids) for row in trajectories], note


def _check_evals(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Table:
    from alignment.evals import check_tasks
    from alignment.tax import detectable_drop

    table = Table("eval", "items", "tokens at most", "smallest drop", title="Evals", caption=ASSUMPTION)
    length = recipe.rollout.max_length
    for task in check_tasks(recipe.evals, recipe.folder, length, tokenizer, recipe.seed, recipe.data_folder):
        drop = f"{100 * detectable_drop(task.n):.1f} points"
        table.add_row(task.name, f"{task.n:,}", f"{task.longest_prompt:,} + {task.max_new_tokens:,} new", drop)
    return table
