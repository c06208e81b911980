"""Reads a run folder, finished or not, into what the report shows."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from alignment.grpo import BENCHMARK
from alignment.metrics import read
from alignment.tax import load_results, row_from_json
from recipes.progress import step_tokens
from recipes.resume import StageFolder

SAMPLED_PROMPTS, SAMPLED_COMPLETIONS, LONGEST_TEXT, MOST_LOST = 4, 4, 3000, 5


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of the recipe, begun or not. metrics: one row per step. planned: steps it asks for, if it says so.

    samples: rows of `samples.jsonl`, one list for each prompt that is shown. experts: rows of `experts.jsonl`. evals:
    rows of `evals.jsonl`, a checkpoint each. finished: whether its weights are there.
    """

    folder: str
    metrics: list[dict[str, Any]]
    planned: int | None
    samples: list[list[dict[str, Any]]]
    experts: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    finished: bool

    @property
    def seconds(self) -> float:
        """Time of all steps: `time/step` where there is one, else the phases together."""
        return sum(row.get("time/step") or sum(phases(row).values()) for row in self.metrics)

    @property
    def tokens(self) -> float:
        """Tokens that all steps worked on."""
        return sum(map(step_tokens, self.metrics))


@dataclass(frozen=True, slots=True)
class LostItem:
    """An item that was answered better before: what was asked, the reference answer, and both completions."""

    benchmark: str
    prompt: str
    target: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run folder; empty where a file is not there yet.

    tables: those of `tax.json`, their `rows` as TaxRows, and the items `lost` of benchmarks that got worse.
    contamination: what `align check` found in the training rows (`recipes.contamination.summary`); None: unknown.
    """

    recipe: Mapping[str, Any]
    recipe_text: str
    versions: Mapping[str, Any]
    tables: list[dict[str, Any]]
    stages: list[Stage]
    contamination: list[dict[str, Any]] | None


def read_run(run_dir: Path) -> Run:
    """Raises ValueError when `run_dir` is no run folder, or a file in it is damaged."""
    recipe = _load(run_dir / "recipe.yaml", yaml.safe_load)
    if recipe is None:
        raise ValueError(
            f"{run_dir} is no run folder: it has no recipe.yaml; give the folder that `align run --output` wrote"
        )
    tables = []
    for table in _load(run_dir / "tax.json", json.loads) or []:  # a reward and benchmarks have no scale in common
        by_scale = groupby(map(row_from_json, table["rows"]), lambda row: row.benchmark == BENCHMARK)
        tables += [{"gate": [], "evals": "evals"} | table | {"rows": list(rows)} for _, rows in by_scale]
    stages = [_stage(run_dir, number, *next(iter(s.items()))) for number, s in enumerate(recipe["stages"], start=1)]
    folders = {name.split("-", 1)[1]: run_dir / name for name in ("00-base", *(stage.folder for stage in stages))}
    return Run(
        recipe=recipe,
        recipe_text=(run_dir / "recipe.yaml").read_text(encoding="utf-8"),
        versions=_load(run_dir / "versions.json", json.loads) or {},
        tables=[table | {"lost": _lost_items(table, folders)} for table in tables],
        stages=stages,
        contamination=_load(run_dir / "contamination.json", json.loads),
    )


def _load(path: Path, parser: Callable[[str], Any]) -> Any:
    """What the file holds; None if there is none."""
    try:
        return parser(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; the file was edited or damaged") from error


def _stage(run_dir: Path, number: int, kind: str, config: Mapping[str, Any]) -> Stage:
    folder = StageFolder(run_dir, number, config.get("name") or kind)
    files = (folder.metrics, folder.samples, folder.experts, folder.path / "evals.jsonl")
    metrics, samples, *rest = (read(path) if path.is_file() else [] for path in files)
    return Stage(folder.path.name, metrics, config.get("steps"), _choose(samples), *rest, folder.final.is_dir())


def _lost_items(table: Mapping[str, Any], folders: Mapping[str, Path]) -> list[LostItem]:
    """Of each benchmark that got worse, the items that lost most, if both evals are there to show them."""
    worse = {row.benchmark for row in table["rows"] if row.verdict < 0}
    places = ((table["before"], "evals"), (table["after"], table["evals"]))
    evals = [folders[name] / place for name, place in places if name in folders]
    if not worse or sum((e / name).is_file() for e in evals for name in ("results.json", "samples.jsonl")) < 4:
        return []
    lost, samples = [], [read(folder / "samples.jsonl") for folder in evals]
    for old, new in zip(*(load_results(folder / "results.json") for folder in evals), strict=True):
        changes = (new.values - old.values) * (1 if old.higher_is_better else -1)
        for item in np.argsort(changes, kind="stable")[:MOST_LOST] if worse & {old.task, old.name} else ():
            if changes[item] < 0:  # a task's first filter, which its result is of, comes first
                pair = [[row for row in side if row["task"] == old.task][item] for side in samples]
                target, answers = str(pair[0]["target"]), map(_answer, pair)
                lost.append(LostItem(old.task, pair[0]["arguments"][0][0], target, *answers))
    return lost


def _answer(sample: Mapping[str, Any]) -> str:
    """The completion, or the choices with their log-likelihoods."""
    pairs = zip(sample["arguments"], sample["resps"], strict=True)
    answers = ((arguments[-1], responses[0]) for arguments, responses in pairs)
    return "\n".join(got if isinstance(got, str) else f"{np.ravel(got)[0]:.2f}  {text}" for text, got in answers)


def _choose(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of a few prompts, from the first step to the last, the best completions and the worst.

    A masked completion, which has no reward, is the worst.
    """
    groups = [list(group) for _, group in groupby(rows, key=itemgetter("step", "prompt_index"))]
    places = np.linspace(0, len(groups) - 1, min(SAMPLED_PROMPTS, len(groups)), dtype=int)
    half, chosen = SAMPLED_COMPLETIONS // 2, []
    for group in (groups[place] for place in places):
        ranked = sorted(group, key=lambda row: (row["reward"] is None, -(row["reward"] or 0.0)))
        chosen.append(ranked[:half] + ranked[half:][-half:])
    return chosen


def shown_text(value: str | list[dict[str, Any]]) -> str:
    """A string as it is, chat messages with their roles; the middle of a very long one is left out."""
    text = value if isinstance(value, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in value)
    half, cut = LONGEST_TEXT // 2, len(text) - LONGEST_TEXT
    return text if cut <= 0 else f"{text[:half]}\n[… {cut:,} characters left out …]\n{text[-half:]}"


def phases(row: Mapping[str, Any]) -> dict[str, float]:
    """Phase name -> seconds of one step; what `time/step`, the whole, has beyond the phases is `other`."""
    named = {key[5:]: value or 0.0 for key, value in row.items() if key.startswith("time/") and key != "time/step"}
    return named | ({"other": max(0.0, row["time/step"] - sum(named.values()))} if row.get("time/step") else {})
