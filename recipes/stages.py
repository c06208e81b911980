"""Run a recipe's stages in order; continue, at any step, what an earlier process left."""

import json
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from alignment.config import StageConfig
from alignment.metrics import append, append_step, plain_number, read, trackers, truncate_after, write_text
from alignment.protocols import Step
from alignment.reward_model import length_warning
from alignment.sample import sampled_rows, write_data
from hybrid_engine.actors import WorkerError
from hybrid_engine.checkpoint import prune, step_dir
from recipes.build import Run, build_run, build_steps
from recipes.gate import evaluate, evaluate_after, evaluate_within
from recipes.progress import StageProgress
from recipes.report import write_report
from recipes.resume import RunFolder, StageFolder
from recipes.schema import Recipe, Stage, resolved


def run(
    recipe: Recipe,
    output_dir: Path,
    *,
    accept_changes: bool = False,
    ray_address: str | None = None,
    contaminated: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Run what is not done yet of `recipe` in `output_dir`; the path of the report.

    contaminated: what `check` found of the evals in the training rows, for the report.

    Raises RecipeError before anything expensive for a recipe that cannot run, KeyboardInterrupt (with everything
    saved) after Ctrl-C, and the first cause of any other failure. No process outlives the call."""
    with ExitStack() as stack:
        folder = stack.enter_context(closing(RunFolder(output_dir, recipe, accept_changes=accept_changes)))
        if contaminated is not None:
            write_text(folder.path / "contamination.json", json.dumps(contaminated))
        for stage in filter(folder.is_done, recipe.stages):
            folder.check_gate(stage)
        waiting, base = [stage for stage in recipe.stages if not folder.is_done(stage)], folder.stage(None)
        if waiting:
            context = build_run(recipe, folder, Console(), ray_address)
            stack.callback(context.engine.close)
            if recipe.evals.tasks and not base.results.is_file():
                context.engine.load(context.start, folder.tokenizer, StageConfig())
                base.save_evals(*evaluate(context))
            for stage in waiting:
                _run_stage(context, stage)
                write_report(output_dir)
                folder.check_gate(stage)
    return write_report(output_dir)


def _run_stage(run: Run, stage: Stage) -> None:
    """Train the stage, write what later ones start from, evaluate it, and compare it with the policy that it started
    from; what of it is not done yet."""
    recipe, start, folder = run.recipe, run.recipe.start_of(stage), run.folder.stage(stage)
    if not folder.final.is_dir():
        weights, reference = run.folder.stage(start).final if start else run.start, None
        if stage.grpo and stage.grpo.kl > 0:
            named = stage.grpo.reference
            reference = run.folder.stage(recipe.named(named)).final if named else weights
        run.engine.load(weights, run.folder.tokenizer, stage.config, reference)
        _train(run, stage, folder)
        if stage.sample is None:
            run.engine.save_final(folder.final)
        else:
            counts = write_data(folder.rows, folder.final)
            run.console.print(f"{stage.name}: {', '.join(f'{count:,} {name}' for name, count in counts.items())}")
        if stage.reward_model and (warning := length_warning(read(folder.metrics)[-1])):
            run.console.print(f"{stage.name}: {warning}", style="yellow")
    elif stage.is_policy:
        run.engine.load(folder.final, run.folder.tokenizer, stage.config)
    if recipe.evals.tasks and stage.is_policy:
        evaluate_after(run, stage, folder)
    prune(folder.checkpoints, keep=1)


def _train(run: Run, stage: Stage, folder: StageFolder) -> None:
    """The stage's steps, from its newest checkpoint on, with all that surrounds a step: logs, checkpoints, Ctrl-C."""
    recipe = run.recipe
    folder.path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        work = build_steps(run, stage, folder, stack)
        for path in (folder.metrics, folder.samples, folder.experts, folder.rows, folder.evals):
            truncate_after(path, work.first)
        tracking = trackers(recipe.trackers, run.folder.path, stage.name, resolved(recipe), work.first + 1)
        track = stack.enter_context(tracking)
        progress = stack.enter_context(StageProgress(stage.name, work.total, run.console, first=work.first))
        interrupted = _finish_step_on_ctrl_c(run.console, stack)
        stack.push(partial(_finish_checkpoint, run, interrupted))
        if work.held_out is not None:
            work.held_out.measure(0)
        run.engine.take_metrics()  # what the evals before the stage left
        begun = time.perf_counter()
        for done in work.steps:
            metrics = done.metrics | run.engine.take_metrics() | {"time/step": time.perf_counter() - begun}
            if (load := metrics.pop("experts/load", None)) is not None:
                append(folder.experts, [{"step": done.step, "load": load}])
            every = recipe.evals.during.get("every")
            if every and stage.is_policy and done.step % every == 0 and done.step < work.total:
                metrics["time/evals"] = evaluate_within(run, stage, folder, done.step, work.held_out)
            begun = time.perf_counter()
            if stage.sample is not None:
                append(folder.rows, sampled_rows(done.step, done.groups))
            append_step(folder.metrics, done.step, metrics)
            track(done.step, metrics)
            progress.step(done.step, metrics)
            if done.groups:
                append(folder.samples, _samples(done))
            due = interrupted or (done.step % stage.config.checkpoint_every == 0 and done.step < work.total)
            if due and stage.sample is None:
                extra = {"step": done.step, **work.state()}
                run.engine.save_checkpoint(step_dir(folder.checkpoints, done.step), extra)
            if interrupted:
                raise KeyboardInterrupt
        if work.held_out is not None:
            work.held_out.measure(work.total)


def _finish_checkpoint(run: Run, interrupted: list[int], kind: type[BaseException] | None, *_: object) -> None:
    """However a stage ends, what it saves is saved; but a death, and a second Ctrl-C, wait for nothing."""
    if len(interrupted) < 2 and (kind is None or not issubclass(kind, WorkerError)):
        run.engine.finish_checkpoint()


def _samples(done: Step) -> list[dict[str, Any]]:
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
