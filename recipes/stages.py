"""Run a recipe's stages in order; continue, at any step, what an earlier process left."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from alignment.evals import run_evals
from alignment.grpo import GRPOStep
from alignment.metrics import MetricsLog, Trackers, plain_number, truncate_after
from alignment.tax import compare
from hybrid_engine.checkpoint import prune, step_dir
from recipes.build import Run, build_run, build_steps
from recipes.progress import StageProgress, print_tax
from recipes.report import write_report
from recipes.resume import RunFolder, StageFolder, append_samples
from recipes.schema import Recipe, Stage, resolved


def run(recipe: Recipe, output_dir: Path, *, accept_changes: bool = False, ray_address: str | None = None) -> Path:
    """Run what is not done yet of `recipe` in `output_dir`; the path of the report.

    Raises RecipeError before anything expensive for a recipe that cannot run, KeyboardInterrupt (with everything
    saved) after Ctrl-C, and the first cause of any other failure. No process outlives the call.
    """
    with ExitStack() as stack:
        folder = RunFolder(output_dir, recipe, accept_changes=accept_changes)
        stack.callback(folder.close)
        if all(_is_done(recipe, folder, index) for index in range(len(recipe.stages))):
            return write_report(output_dir)
        context = build_run(recipe, folder, Console(), ray_address)
        stack.callback(context.engine.close)
        if recipe.evals.tasks and not folder.base.results.is_file():
            context.engine.load(context.start, folder.tokenizer, recipe.stages[0].config)
            _run_evals(context, folder.base)
        for index in range(len(recipe.stages)):
            if not _is_done(recipe, folder, index):
                _run_stage(context, index)
                write_report(output_dir)
    return write_report(output_dir)


def _is_done(recipe: Recipe, folder: RunFolder, index: int) -> bool:
    name = recipe.stages[index].name
    return folder.stage(index, name).final.is_dir() and (not recipe.evals.tasks or folder.has_tax(name))


def _run_stage(run: Run, index: int) -> None:
    stage = run.recipe.stages[index]
    folder = _folder(run, stage)
    if folder.final.is_dir():
        run.engine.load(folder.final, run.folder.tokenizer, stage.config)
    else:
        start = _final(run, run.recipe.start_of(index))
        run.engine.load(start, run.folder.tokenizer, stage.config, _reference(run, stage, start))
        _train(run, index, folder)
        run.engine.save_final(folder.final)
    _evaluate(run, index, folder)
    prune(folder.checkpoints, keep=1)


def _folder(run: Run, stage: Stage | None) -> StageFolder:
    """Where a stage lies; None: the evals before the first."""
    return run.folder.stage(run.recipe.stages.index(stage), stage.name) if stage else run.folder.base


def _final(run: Run, stage: Stage | None) -> Path:
    """The weights that a stage has left; None: those that the run began with."""
    return _folder(run, stage).final if stage else run.start


def _reference(run: Run, stage: Stage, start: Path) -> Path | None:
    if stage.grpo is None or stage.grpo.kl == 0:
        return None
    if stage.grpo.reference is None:
        return start
    return _final(run, next(other for other in run.recipe.stages if other.name == stage.grpo.reference))


def _train(run: Run, index: int, folder: StageFolder) -> None:
    """The stage's steps, from its newest checkpoint on, with all that surrounds a step: logs, checkpoints, Ctrl-C."""
    stage, recipe = run.recipe.stages[index], run.recipe
    folder.path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stream, steps, first, total = build_steps(run, index, folder, stack)
        for path in (folder.metrics, folder.samples):
            truncate_after(path, first)
        log = MetricsLog(folder.metrics)
        stack.callback(log.close)
        trackers = stack.enter_context(
            Trackers(recipe.trackers, run.folder.path, stage.name, resolved(recipe), first + 1)
        )
        progress = stack.enter_context(StageProgress(stage.name, total, run.console, first=first))
        interrupted = stack.enter_context(_finish_step_on_ctrl_c(run.console))
        run.engine.take_metrics()  # what the evals before the stage left
        begun = time.perf_counter()
        for done in steps:
            metrics = done.metrics | run.engine.take_metrics() | {"time/step": time.perf_counter() - begun}
            begun = time.perf_counter()
            log.append(done.step, metrics)
            trackers.log(done.step, metrics)
            progress.step(done.step, metrics)
            if isinstance(done, GRPOStep):
                append_samples(folder.samples, _samples(done))
            if interrupted or (done.step % stage.config.checkpoint_every == 0 and done.step < total):
                extra = {"step": done.step, "stream": stream.state()}
                run.engine.save_checkpoint(step_dir(folder.checkpoints, done.step), extra)
                prune(folder.checkpoints, keep=1)
            if interrupted:
                raise KeyboardInterrupt


def _samples(done: GRPOStep) -> list[dict[str, Any]]:
    """The completions of the batch's first prompt: enough to read along, small enough to keep all steps of."""
    group = done.groups[0]
    return [
        {
            "step": done.step,
            "prompt_index": group.prompt.index,
            "prompt": group.prompt.text,
            "completion": completion.text,
            "reward": plain_number("reward", group.scores.total[g]),
            "parts": {name: plain_number(name, values[g]) for name, values in group.scores.parts.items()},
            "finish_reason": completion.finish_reason,
            "logged": {name: values[g] for name, values in group.scores.extra.items() if isinstance(values, list)},
        }
        for g, completion in enumerate(group.completions)
    ]


@contextmanager
def _finish_step_on_ctrl_c(console: Console) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM lets the step finish and be saved (the list is then not empty); the next does not."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        console.print("finishing this step, then saving (Ctrl-C again: stop now, continue from the last checkpoint)")

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _evaluate(run: Run, index: int, folder: StageFolder) -> None:
    """The evals after a stage, and its tax table: against the policy that it started from."""
    if not run.recipe.evals.tasks:
        return
    _run_evals(run, folder)
    start = run.recipe.start_of(index)
    rows = compare(_folder(run, start).load_evals(), folder.load_evals())
    before, after = start.name if start else "base", run.recipe.stages[index].name
    run.folder.add_tax(after, before, rows)
    print_tax(rows, run.console, before=before, after=after)


def _run_evals(run: Run, folder: StageFolder) -> None:
    recipe = run.recipe
    if not folder.results.is_file():
        results, samples = run_evals(
            recipe.evals, run.engine.sampler, run.tokenizer, recipe.folder, recipe.seed, recipe.data_folder
        )
        folder.save_evals(results, samples)
