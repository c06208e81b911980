"""Reads a run folder, finished or not, into what the report shows."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignment.metrics import read
from alignment.tax import TaxRow, row_from_json

STAGE = re.compile(r"(?!00-)(\d\d+)-.+")  # 00-base holds the evals before the first stage, and no steps
SAMPLED_STEPS, SAMPLED_PROMPTS, SAMPLED_COMPLETIONS, LONGEST_TEXT = 4, 2, 4, 3000


@dataclass(frozen=True, slots=True)
class TaxTable:
    """One table of `tax.json`: `before` and `after` are the labels of the two policies."""

    before: str
    after: str
    rows: tuple[TaxRow, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of `samples.jsonl`, as text. parts: each reward function's value, None where it gave none."""

    prompt: str
    completion: str
    reward: float | None
    parts: Mapping[str, float | None]
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Stage:
    """One NN-name folder. metrics: one row per step. planned: steps the recipe asks for, if it says so.

    samples: (step, completions of a few prompts, one list per prompt). notes: what is missing, in words.
    """

    folder: str
    metrics: list[dict[str, Any]]
    planned: int | None
    samples: list[tuple[int, list[list[Sample]]]]
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Time of all steps: `time/step` where there is one, else the phases together."""
        return sum(row.get("time/step") or sum(phases(row).values()) for row in self.metrics)


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run folder."""

    name: str
    recipe: Mapping[str, Any]
    recipe_text: str
    versions: Mapping[str, Any]
    tables: tuple[TaxTable, ...]
    stages: tuple[Stage, ...]
    notes: tuple[str, ...]


def read_run(run_dir: Path) -> Run:
    """Raises ValueError when `run_dir` is no run folder, or a file in it is damaged."""
    folders = []
    if run_dir.is_dir():
        folders = sorted((p for p in run_dir.iterdir() if p.is_dir() and STAGE.fullmatch(p.name)), key=lambda p: p.name)
    if not (run_dir / "recipe.yaml").exists() and not any((p / "metrics.jsonl").exists() for p in folders):
        raise ValueError(
            f"{run_dir} is no run folder: it has neither recipe.yaml nor NN-stage/metrics.jsonl; "
            "give the folder that `align run --output` wrote"
        )
    notes, texts = [], {}
    for name, missing in {
        "recipe.yaml": "the resolved recipe is not shown",
        "versions.json": "the versions are not known",
        "tax.json": "no benchmark was compared yet (the first table comes after the first stage)",
    }.items():
        if (run_dir / name).exists():
            texts[name] = (run_dir / name).read_text(encoding="utf-8")
        else:
            notes.append(f"{name} is missing: {missing}.")
    recipe = _parse(yaml.safe_load, texts.get("recipe.yaml", ""), run_dir / "recipe.yaml") or {}
    versions = _parse(json.loads, texts.get("versions.json", "{}"), run_dir / "versions.json")
    tables = _parse(json.loads, texts.get("tax.json", "[]"), run_dir / "tax.json")
    planned = [next(iter(stage.items())) for stage in recipe.get("stages", [])]
    begun = {_number(p) for p in folders}
    waiting = [config.get("name") or kind for i, (kind, config) in enumerate(planned, 1) if i not in begun]
    notes += [f"Stage {name} has not started." for name in waiting]
    return Run(
        recipe.get("name", run_dir.resolve().name),
        recipe,
        texts.get("recipe.yaml", ""),
        versions,
        tuple(TaxTable(t["before"], t["after"], tuple(map(row_from_json, t["rows"]))) for t in tables),
        tuple(_stage(p, planned) for p in folders),
        tuple(notes),
    )


def _parse(parser: Any, text: str, path: Path) -> Any:
    try:
        return parser(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; the file was edited or damaged") from error


def _number(folder: Path) -> int:
    return int(folder.name.split("-")[0])


def _stage(path: Path, planned: Sequence[tuple[str, Mapping[str, Any]]]) -> Stage:
    config = planned[_number(path) - 1][1] if _number(path) <= len(planned) else {}
    metrics = read(path / "metrics.jsonl") if (path / "metrics.jsonl").exists() else []
    samples = read(path / "samples.jsonl") if (path / "samples.jsonl").exists() else []
    notes = [] if metrics else ["No step is logged yet (metrics.jsonl)."]
    if metrics and not (path / "final").is_dir():
        notes.append(f"Not finished: step {metrics[-1]['step']} is the last one logged.")
    return Stage(path.name, metrics, config.get("steps"), _choose(samples), tuple(notes))


def _choose(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[list[Sample]]]]:
    """A few steps from the first to the last; of each a few prompts; of each the best and the worst completions."""
    by_step: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).setdefault(row["prompt_index"], []).append(row)
    steps = sorted(by_step)
    count = min(SAMPLED_STEPS, len(steps))
    steps = [steps[i * (len(steps) - 1) // max(1, count - 1)] for i in range(count)]
    return [(step, [_extremes(group) for group in list(by_step[step].values())[:SAMPLED_PROMPTS]]) for step in steps]


def _extremes(group: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """The best two and the worst two."""
    # A masked completion has no reward: null, or NaN, which is unequal to itself.
    masked = [row for row in group if row["reward"] is None or row["reward"] != row["reward"]]
    ranked = sorted((row for row in group if row not in masked), key=lambda row: -row["reward"]) + masked
    half = SAMPLED_COMPLETIONS // 2
    return [
        Sample(_text(row["prompt"]), _text(row["completion"]), row["reward"], row["parts"], row["finish_reason"])
        for row in (ranked if len(ranked) <= SAMPLED_COMPLETIONS else ranked[:half] + ranked[-half:])
    ]


def _text(value: str | list[dict[str, Any]]) -> str:
    """A string as it is, chat messages with their roles; the middle of a very long one is left out."""
    text = value if isinstance(value, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in value)
    half = LONGEST_TEXT // 2
    cut = len(text) - LONGEST_TEXT
    return text if cut <= 0 else f"{text[:half]}\n[… {cut:,} characters left out …]\n{text[-half:]}"


def phases(row: Mapping[str, Any]) -> dict[str, float]:
    """Phase name -> seconds of one step; what `time/step`, the whole, has beyond the phases is `other`."""
    named = {key[5:]: value or 0.0 for key, value in row.items() if key.startswith("time/") and key != "time/step"}
    return named | ({"other": max(0.0, row["time/step"] - sum(named.values()))} if row.get("time/step") else {})
