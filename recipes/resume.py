"""The run folder: what lies where, what is done, and whether the recipe is still the one it was begun with."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from alignment.metrics import json_lines, write_text
from alignment.tax import TaskResult, TaxRow, row_to_json, save_results
from recipes.check import versions
from recipes.schema import Recipe, Stage, difference, resolved
from recipes.source import RecipeError


class StageFolder:
    """`NN-name/` of one stage (00-base: the policy before the first).

    experts: each step's load of every expert. rows: what a `sample` stage has so far. final: a Transformers directory,
    or what the stage sampled; there when it is done. results: of the evals after it, by item; there when they are
    complete. evals: those within the stage. held_out: its reward on held-out prompts. candidates: the weights at these
    evals, to which it may have to go back. breached: the evals that made it, to the step in rolled_back."""

    def __init__(self, run_dir: Path, number: int, name: str) -> None:
        self.name = name
        self.path = path = run_dir / f"{number:02d}-{name}"
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.experts = path / "experts.jsonl"
        self.rows = path / "rows.jsonl"
        self.checkpoints = path / "checkpoints"
        self.final = path / "final"
        self.results = path / "evals" / "results.json"
        self.evals = path / "evals.jsonl"
        self.held_out = path / "held_out.json"
        self.candidates = path / "candidates"
        self.breached = path / "evals-breached"
        self.rolled_back = path / "rolled_back"

    def save_evals(self, results: list[TaskResult], samples: list[dict[str, Any]]) -> None:
        """Every sample first, the results last: they say that the evals are complete."""
        self.results.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.results.with_name("samples.jsonl"), json_lines(samples))
        save_results(self.results, results)


class GateError(RuntimeError):
    """A stage broke a limit of `evals.keep` (exit code 3)."""


class RunFolder:
    """One run's folder; held open (and locked against a second run) while the run goes on."""

    def __init__(self, path: Path, recipe: Recipe, *, accept_changes: bool) -> None:
        """Begin or continue a run. Raises RecipeError when the recipe has changed, or another process runs here."""
        self.recipe = recipe
        self.path = path = path.resolve()  # actors have another working directory, the recipe another base
        path.mkdir(parents=True, exist_ok=True)
        self.tokenizer = path / "tokenizer"
        self._lock = FileLock(path / ".lock")
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise RecipeError([f"{path}: another process is running in this folder"]) from None
        now, kept = resolved(recipe), path / "recipe.yaml"
        before = yaml.safe_load(kept.read_text(encoding="utf-8")) if kept.is_file() else now
        if (changes := difference(before, now)) and not accept_changes:
            begun = f"{path} was begun with another recipe: continue with --accept-changes, or choose --output"
            raise RecipeError([begun, *changes])
        write_text(kept, yaml.safe_dump(now, sort_keys=False, allow_unicode=True))
        write_text(path / "versions.json", json.dumps(versions(), indent=2) + "\n")

    def stage(self, stage: Stage | None) -> StageFolder:
        """Folder of one of the recipe's stages; None: of the policy before the first."""
        number, name = (self.recipe.stages.index(stage) + 1, stage.name) if stage else (0, "base")
        return StageFolder(self.path, number, name)

    def is_done(self, stage: Stage) -> bool:
        """Whether its weights are there and, if there are evals, its table: the last thing that a stage writes."""
        folder, tables = self.stage(stage), self._tables(stage)
        broken = any(table["gate"] for table in tables) and not folder.rolled_back.is_file()
        judged = tables and not (broken and stage.config.keep == "rollback")
        return folder.final.is_dir() and bool(judged or not (stage.is_policy and self.recipe.evals.tasks))

    def add_tax(self, stage: str, tables: Mapping[tuple[str, str], Sequence[TaxRow]], gate: list[str]) -> None:
        """Write a stage's tables into `tax.json`, in place of earlier ones.

        tables: by the name of the policy before and the folder of the evals after. gate: what it says of the first."""
        kept = [table for table in self._tables() if table["stage"] != stage]
        for (before, evals), rows in tables.items():
            found = {"stage": stage, "before": before, "after": stage, "evals": evals, "gate": gate}
            kept.append(found | {"rows": [row_to_json(row) for row in rows]})
            gate = []
        write_text(self.path / "tax.json", json.dumps(kept, indent=2) + "\n")

    def check_gate(self, stage: Stage) -> None:
        """Raise GateError where a finished stage broke a limit, and says `keep: stop`."""
        broken = [line for table in self._tables(stage) for line in table["gate"]]
        if broken and stage.config.keep == "stop":
            raise GateError(f"{stage.name}: {'; '.join(broken)} (`keep: stop`; `keep: warn` goes on)")

    def _tables(self, stage: Stage | None = None) -> list[dict[str, Any]]:
        """What `tax.json` holds, of one stage or of all."""
        path = self.path / "tax.json"
        tables = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
        return [table for table in tables if stage is None or table["stage"] == stage.name]

    def close(self) -> None:
        """Let another process run here."""
        self._lock.release()
