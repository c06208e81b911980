"""The run folder: what lies where, what is done, and whether the recipe is still the one it was begun with."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import yaml

from alignment.files import write_text
from alignment.tax import TaskResult, TaxRow, load_results, row_to_json, save_results
from recipes.errors import RecipeError
from recipes.schema import Recipe, difference, resolved
from recipes.versions import versions


class StageFolder:
    """`NN-name/` of one stage (00-base: the policy before the first).

    final: a Transformers directory, there when the stage is done. results: of the evals after it, by item; there when
    they are complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.results = path / "evals" / "results.json"

    def save_evals(self, results: list[TaskResult], samples: list[dict[str, Any]]) -> None:
        """Every sample first, the results last: they say that the evals are complete."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples]
        write_text(self.results.with_name("samples.jsonl"), "".join(lines))
        save_results(self.results, results)

    def load_evals(self) -> list[TaskResult]:
        """The results; none while the evals are not complete."""
        return load_results(self.results) if self.results.is_file() else []


class RunFolder:
    """One run's folder; held open (and locked against a second run) while the run goes on.

    initial: the policy before the first stage, where the recipe makes it from scratch. base: the evals of that policy.
    """

    def __init__(self, path: Path, recipe: Recipe, *, accept_changes: bool) -> None:
        """Begin or continue a run. Raises RecipeError when the recipe has changed, or another process runs here."""
        self.path = path = path.resolve()  # actors have another working directory, the recipe another base
        path.mkdir(parents=True, exist_ok=True)
        self.initial = path / "initial"
        self.tokenizer = path / "tokenizer"
        self.base = StageFolder(path / "00-base")
        self._lock = _lock(path / ".lock")
        now, kept = resolved(recipe), path / "recipe.yaml"
        if kept.is_file():
            changes = difference(yaml.safe_load(kept.read_text(encoding="utf-8")), now)
            if changes and not accept_changes:
                begun = f"{path} was begun with another recipe: continue with --accept-changes, or choose --output"
                raise RecipeError([begun, *changes])
        write_text(kept, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
        write_text(path / "versions.json", json.dumps(versions(), indent=2) + "\n")

    def stage(self, index: int, name: str) -> StageFolder:
        """Folder of stage `index` (from 0)."""
        return StageFolder(self.path / f"{index + 1:02d}-{name}")

    def add_tax(self, stage: str, before: str, rows: list[TaxRow]) -> None:
        """Write the stage's table into `tax.json`, in place of an earlier one of the same stage."""
        tables = [table for table in self._tables() if table["stage"] != stage]
        tables.append({"stage": stage, "before": before, "after": stage, "rows": [row_to_json(row) for row in rows]})
        write_text(self.path / "tax.json", json.dumps(tables, indent=2) + "\n")

    def has_tax(self, stage: str) -> bool:
        """Whether the stage's table is written: the last thing that a stage does."""
        return any(table["stage"] == stage for table in self._tables())

    def _tables(self) -> list[dict[str, Any]]:
        path = self.path / "tax.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def close(self) -> None:
        """Let another process run here."""
        self._lock.close()


def append_samples(path: Path, rows: list[Mapping[str, Any]]) -> None:
    """Add lines to `samples.jsonl`."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def _lock(path: Path) -> TextIO:
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise RecipeError([f"{path.parent}: another process is running in this folder"]) from None
    return file
