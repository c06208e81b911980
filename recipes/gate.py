"""The evals within a stage and after it, and the gate: which limits they break, and the way back to where they hold."""

import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from alignment.evals import run_evals
from alignment.grpo import HeldOut, held_out_rows
from alignment.metrics import append, read
from alignment.tax import TaskResult, TaxRow, compare, load_results
from hybrid_engine.checkpoint import step_dir
from recipes.build import Run
from recipes.check import unknown_limits
from recipes.progress import print_tax
from recipes.resume import StageFolder
from recipes.schema import Stage


def evaluate(run: Run, limit: int | None = None) -> tuple[list[TaskResult], list[dict[str, Any]]]:
    """The recipe's benchmarks, or the first `limit` items of each, on the live engines: results and samples."""
    recipe, config = run.recipe, run.recipe.evals
    if limit is not None:
        config = config.model_copy(update={"limit": min(limit, config.limit or limit)})
    return run_evals(config, run.engine.sampler, run.tokenizer, recipe.folder, recipe.seed, recipe.data_folder)


def evaluate_within(run: Run, stage: Stage, folder: StageFolder, step: int, held_out: HeldOut | None) -> float:
    """Evals in the middle of a stage, a line of `evals.jsonl`: the first items of each benchmark, the reward on
    held-out prompts. A broken limit only warns. Returns the seconds that it took."""
    begun, recipe = time.perf_counter(), run.recipe
    row: dict[str, Any] = {"step": step}
    if held_out is not None:
        row["reward/held_out"] = held_out.measure(step)
    if recipe.evals.tasks:
        after, _ = evaluate(run, recipe.evals.during.get("items"))
        whole = load_results(run.folder.stage(recipe.start_of(stage)).results)
        sizes = [(before, len(short.items)) for before, short in zip(whole, after, strict=True)]
        rows = compare([replace(b, items=b.items[:n], values=b.values[:n]) for b, n in sizes], after)
        row["scores"] = {line.benchmark: line.after for line in rows}
        for breach in breaches(rows, recipe.evals.keep):
            run.console.print(f"{stage.name}, step {step}: {breach}", style="yellow")
    if stage.config.keep == "rollback" and recipe.evals.keep and held_out is not None:
        run.engine.save_final(step_dir(folder.candidates, step))
    run.engine.take_metrics()  # a step's are its own
    row["seconds"] = time.perf_counter() - begun
    append(folder.evals, [row])
    return row["seconds"]


def evaluate_after(run: Run, stage: Stage, folder: StageFolder) -> None:
    """Compare a finished stage with the policy that it started from, and go back where it broke a limit that its recipe
    wants kept by `rollback`. Whatever of it an earlier process did is not done again."""
    before, base, keep = run.folder.stage(run.recipe.start_of(stage)), run.folder.stage(None), run.recipe.evals.keep
    start, tables = load_results(before.results), {}
    if not folder.breached.is_dir():
        if not folder.results.is_file():
            folder.save_evals(*evaluate(run))
        if stage.config.keep == "rollback" and breaches(compare(start, load_results(folder.results)), keep):
            folder.results.parent.rename(folder.breached)
    if not folder.results.is_file():
        _roll_back(run, stage, folder, before)
    after, step = load_results(folder.results), read(folder.metrics)[-1]["step"]
    rows = compare(start, after)
    note = breaches(rows, keep)
    if folder.breached.is_dir():
        step = int(folder.rolled_back.read_text(encoding="utf-8"))
        lost = compare(start, load_results(folder.breached / folder.results.name))
        where = f"step {step}" if step else "the weights that the stage started from"
        note = [f"rolled back to {where}", *breaches(lost, keep)]
        tables[before.name, folder.breached.name] = lost
    rows = [*held_out_rows(folder.held_out, step), *rows]
    tables[before.name, folder.results.parent.name] = rows
    if before.name != base.name:
        tables[base.name, folder.results.parent.name] = compare(load_results(base.results), after)
    run.folder.add_tax(stage.name, tables, note)
    shutil.rmtree(folder.candidates, ignore_errors=True)
    print_tax(rows, run.console, before=before.name, after=stage.name)
    for line in note:
        run.console.print(f"{stage.name}: {line}", style="bold red")


def _roll_back(run: Run, stage: Stage, folder: StageFolder, before: StageFolder) -> None:
    """Make what has the highest held-out reward and keeps every limit the stage's policy, else what it started from."""
    start, found = load_results(before.results), {}
    rewards = {row["step"]: row.get("reward/held_out") for row in read(folder.evals)} if folder.evals.is_file() else {}

    def broken(step: int) -> list[str]:
        run.engine.load(step_dir(folder.candidates, step), run.folder.tokenizer, stage.config)
        found[step] = evaluate(run)
        return breaches(compare(start, found[step][0]), run.recipe.evals.keep)

    kept = {at: reward for at, reward in rewards.items() if step_dir(folder.candidates, at).is_dir()}
    step = choose_checkpoint(kept, broken)
    if step is None:
        step, found[0] = 0, (start, read(before.results.with_name("samples.jsonl")))
        weights = before.final if before.final.is_dir() else run.start
        run.engine.load(weights, run.folder.tokenizer, stage.config)
    run.engine.save_final(folder.final)
    folder.rolled_back.write_text(str(step), encoding="utf-8")
    folder.save_evals(*found[step])


def breaches(rows: Iterable[TaxRow], keep: Mapping[str, float]) -> list[str]:
    """A message for each limit that is broken. rows: a tax table against the policy that the stage started from.
    keep: benchmark or group -> the least difference that it may have, -0.02 of an accuracy, say; where lower is better,
    a rise counts as the drop.

    A limit holds unless the whole interval lies below it; an interval that is NaN breaks none. Raises ValueError for a
    limit without its row: one that is never compared would never be broken."""
    ends = {row.benchmark: (row.low, row.high) if row.higher_is_better else (-row.high, -row.low) for row in rows}
    if unknown := unknown_limits(keep, ends):
        raise ValueError("; ".join(unknown))
    broken = [(name, limit, *ends[name]) for name, limit in keep.items() if ends[name][1] < limit]
    return [f"{name}: {low:+.3f} … {high:+.3f} lies below its limit of {limit:+g}" for name, limit, low, high in broken]


def choose_checkpoint(rewards: Mapping[int, float | None], broken: Callable[[int], Sequence[str]]) -> int | None:
    """The step with the highest reward on held-out prompts that breaks no limit, of equals the earliest; None: go back.

    broken: the limits that a step's full eval breaks; asked from the highest reward on, until a step breaks none."""
    known = {step: reward for step, reward in rewards.items() if reward is not None and math.isfinite(reward)}
    return next((step for step in sorted(known, key=lambda step: (-known[step], step)) if not broken(step)), None)
