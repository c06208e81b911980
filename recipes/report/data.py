"""Reads a run folder, finished or not, into what the report shows."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from alignment.metrics import read
from alignment.tax import row_from_json

STAGE = re.compile(r"(?!00-)(\d\d+)-.+")  # 00-base holds the evals before the first stage, and no steps
SAMPLED_STEPS, SAMPLED_PROMPTS, SAMPLED_COMPLETIONS, LONGEST_TEXT = 4, 2, 4, 3000


@dataclass(frozen=True, slots=True)
class Stage:
    """One NN-name folder. metrics: one row per step. planned: steps the recipe asks for, if it says so.

    samples: (step, rows of `samples.jsonl` of a few prompts, one list per prompt). notes: what is missing, in words.
    """

    folder: str
    metrics: list[dict[str, Any]]
    planned: int | None
    samples: list[tuple[int, list[list[Mapping[str, Any]]]]]
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Time of all steps: `time/step` where there is one, else the phases together."""
        return sum(row.get("time/step") or sum(phases(row).values()) for row in self.metrics)


@dataclass(frozen=True, slots=True)
class Run:
    """A whole run folder. tables: those of `tax.json`, their `rows` as TaxRows."""

    name: str
    recipe: Mapping[str, Any]
    recipe_text: str
    versions: Mapping[str, Any]
    tables: list[dict[str, Any]]
    stages: list[Stage]
    notes: list[str]


def read_run(run_dir: Path) -> Run:
    """Raises ValueError when `run_dir` is no run folder, or a file in it is damaged."""
    if not (run_dir / "recipe.yaml").is_file():
        raise ValueError(
            f"{run_dir} is no run folder: it has no recipe.yaml; give the folder that `align run --output` wrote"
        )
    recipe = _load(run_dir / "recipe.yaml", yaml.safe_load)
    versions = _load(run_dir / "versions.json", json.loads)
    tables = _load(run_dir / "tax.json", json.loads)
    notes = []
    if versions is None:
        notes.append("versions.json is missing: the versions are not known.")
    if tables is None:
        notes.append("tax.json is missing: no benchmark was compared yet (the first table comes after a stage).")
    planned = {number: next(iter(stage.items())) for number, stage in enumerate(recipe.get("stages", []), 1)}
    folders = {int(match[1]): p for p in sorted(run_dir.iterdir()) if (match := STAGE.fullmatch(p.name))}
    for number, (kind, config) in planned.items():
        if number not in folders:
            notes.append(f"Stage {config.get('name') or kind} has not started.")
    steps = {number: config.get("steps") for number, (_, config) in planned.items()}
    return Run(
        name=recipe["name"],
        recipe=recipe,
        recipe_text=(run_dir / "recipe.yaml").read_text(encoding="utf-8"),
        versions=versions or {},
        tables=[table | {"rows": [row_from_json(row) for row in table["rows"]]} for table in tables or []],
        stages=[_stage(path, steps.get(number)) for number, path in folders.items()],
        notes=notes,
    )


def _load(path: Path, parser: Callable[[str], Any]) -> Any:
    """What the file holds; None if there is none."""
    if not path.exists():
        return None
    try:
        return parser(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; the file was edited or damaged") from error


def _stage(path: Path, planned: int | None) -> Stage:
    metrics, samples = (
        read(path / name) if (path / name).exists() else [] for name in ("metrics.jsonl", "samples.jsonl")
    )
    notes = [] if metrics else ["No step is logged yet (metrics.jsonl)."]
    if metrics and not (path / "final").is_dir():
        notes.append(f"Not finished: step {metrics[-1]['step']} is the last one logged.")
    return Stage(path.name, metrics, planned, _choose(samples), notes)


def _choose(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, list[list[Mapping[str, Any]]]]]:
    """A few steps from the first to the last; of each a few prompts; of each the best and the worst completions."""
    by_step: dict[int, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        by_step.setdefault(row["step"], {}).setdefault(row["prompt_index"], []).append(row)
    places = np.linspace(0, len(by_step) - 1, min(SAMPLED_STEPS, len(by_step)), dtype=int)
    steps = [sorted(by_step)[place] for place in places]
    return [(step, [_extremes(group) for group in list(by_step[step].values())[:SAMPLED_PROMPTS]]) for step in steps]


def _extremes(group: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The best two and the worst two; a masked completion, which has no reward, is the worst."""
    ranked = sorted(group, key=lambda row: (row["reward"] is None, -(row["reward"] or 0.0)))
    half = SAMPLED_COMPLETIONS // 2
    return ranked if len(ranked) <= SAMPLED_COMPLETIONS else ranked[:half] + ranked[-half:]


def shown_text(value: str | list[dict[str, Any]]) -> str:
    """A string as it is, chat messages with their roles; the middle of a very long one is left out."""
    text = value if isinstance(value, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in value)
    half = LONGEST_TEXT // 2
    cut = len(text) - LONGEST_TEXT
    return text if cut <= 0 else f"{text[:half]}\n[… {cut:,} characters left out …]\n{text[-half:]}"


def phases(row: Mapping[str, Any]) -> dict[str, float]:
    """Phase name -> seconds of one step; what `time/step`, the whole, has beyond the phases is `other`."""
    named = {key[5:]: value or 0.0 for key, value in row.items() if key.startswith("time/") and key != "time/step"}
    return named | ({"other": max(0.0, row["time/step"] - sum(named.values()))} if row.get("time/step") else {})
