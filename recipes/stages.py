"""Run a recipe's stages in order; continue, at any step, what an earlier process left."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from alignment.evals import run_evals
from alignment.grpo import GRPOStep
from alignment.metrics import MetricsLog, Trackers, plain_number, truncate_after
from alignment.tax import compare, load_results
from hybrid_engine.checkpoint import prune, step_dir
from hybrid_engine.health import WorkerError
from recipes.build import Run, build_run, build_steps
from recipes.progress import StageProgress, print_tax
from recipes.report import write_report
from recipes.resume import RunFolder, StageFolder, append
from recipes.schema import Recipe, Stage, resolved


def run(recipe: Recipe, output_dir: Path, *, accept_changes: bool = False, ray_address: str | None = None) -> Path:
    """Run what is not done yet of `recipe` in `output_dir`; the path of the report.

    Raises RecipeError before anything expensive for a recipe that cannot run, KeyboardInterrupt (with everything
    saved) after Ctrl-C, and the first cause of any other failure. No process outlives the call.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(closing(RunFolder(output_dir, recipe, accept_changes=accept_changes)))
        waiting, base = [stage for stage in recipe.stages if not folder.is_done(stage)], folder.stage(None)
        if waiting:
            context = build_run(recipe, folder, Console(), ray_address)
            stack.callback(context.engine.close)
            if recipe.evals.tasks and not base.results.is_file():
                context.engine.load(context.start, folder.tokenizer, recipe.stages[0].config)
                _run_evals(context, base)
            for stage in waiting:
                _run_stage(context, stage)
                write_report(output_dir)
    return write_report(output_dir)


def _run_stage(run: Run, stage: Stage) -> None:
    """Train the stage, evaluate it, and compare it with the policy that it started from; what of it is not done yet."""
    recipe, start = run.recipe, run.recipe.start_of(stage)
    before, folder = run.folder.stage(start), run.folder.stage(stage)
    if folder.final.is_dir():
        run.engine.load(folder.final, run.folder.tokenizer, stage.config)
    else:
        weights = before.final if start else run.start
        run.engine.load(weights, run.folder.tokenizer, stage.config, _reference(run, stage, weights))
        _train(run, stage, folder)
        run.engine.save_final(folder.final)
    if recipe.evals.tasks:
        if not folder.results.is_file():
            _run_evals(run, folder)
        rows = compare(load_results(before.results), load_results(folder.results))
        run.folder.add_tax(stage.name, before.name, rows)
        print_tax(rows, run.console, before=before.name, after=stage.name)
    prune(folder.checkpoints, keep=1)


def _run_evals(run: Run, folder: StageFolder) -> None:
    recipe, sampler = run.recipe, run.engine.sampler
    found = run_evals(recipe.evals, sampler, run.tokenizer, recipe.folder, recipe.seed, recipe.data_folder)
    folder.save_evals(*found)


def _reference(run: Run, stage: Stage, start: Path) -> Path | None:
    if stage.grpo is None or stage.grpo.kl == 0:
        return None
    if stage.grpo.reference is None:
        return start
    return run.folder.stage(next(other for other in run.recipe.stages if other.name == stage.grpo.reference)).final


def _train(run: Run, stage: Stage, folder: StageFolder) -> None:
    """The stage's steps, from its newest checkpoint on, with all that surrounds a step: logs, checkpoints, Ctrl-C."""
    recipe = run.recipe
    folder.path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        stream, steps, first, total = build_steps(run, recipe.stages.index(stage), folder, stack)
        for path in (folder.metrics, folder.samples, folder.experts):
            truncate_after(path, first)
        log = stack.enter_context(closing(MetricsLog(folder.metrics)))
        trackers = Trackers(recipe.trackers, run.folder.path, stage.name, resolved(recipe), first + 1)
        stack.enter_context(trackers)
        progress = stack.enter_context(StageProgress(stage.name, total, run.console, first=first))
        interrupted = _finish_step_on_ctrl_c(run.console, stack)
        stack.push(partial(_finish_checkpoint, run, interrupted))
        run.engine.take_metrics()  # what the evals before the stage left
        begun = time.perf_counter()
        for done in steps:
            metrics = done.metrics | run.engine.take_metrics() | {"time/step": time.perf_counter() - begun}
            begun = time.perf_counter()
            if (load := metrics.pop("experts/load", None)) is not None:
                append(folder.experts, [{"step": done.step, "load": load}])
            log.append(done.step, metrics)
            trackers.log(done.step, metrics)
            progress.step(done.step, metrics)
            if isinstance(done, GRPOStep):
                append(folder.samples, _samples(done))
            if interrupted or (done.step % stage.config.checkpoint_every == 0 and done.step < total):
                extra = {"step": done.step, "stream": stream.state()}
                run.engine.save_checkpoint(step_dir(folder.checkpoints, done.step), extra)
            if interrupted:
                raise KeyboardInterrupt


def _finish_checkpoint(run: Run, interrupted: list[int], kind: type[BaseException] | None, *_: object) -> None:
    """However a stage ends, what it saves is saved; but a death, and a second Ctrl-C, wait for nothing."""
    if len(interrupted) < 2 and (kind is None or not issubclass(kind, WorkerError)):
        run.engine.finish_checkpoint()


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


def _finish_step_on_ctrl_c(console: Console, stack: ExitStack) -> list[int]:
    """The first Ctrl-C or SIGTERM lets the step finish and be saved (the list is then not empty); the next does not."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt
        console.print("finishing this step, then saving (Ctrl-C again: stop now, continue from the last checkpoint)")

    for number in (signal.SIGINT, signal.SIGTERM):
        stack.callback(signal.signal, number, signal.signal(number, receive))
    return received
