"""Run a recipe's stages in order; continue, at any step, what an earlier process left."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from alignment.config import GRPOConfig, SFTConfig
from alignment.evals import run_evals
from alignment.grpo import GRPOStep, grpo
from alignment.metrics import MetricsLog, Trackers, plain_number, truncate_after
from alignment.sft import SFTStep, sft
from alignment.tax import compare
from hybrid_engine.checkpoint import latest_checkpoint, prune, step_dir
from hybrid_engine.engine import HybridEngine
from recipes import build
from recipes.progress import StageProgress, print_tax
from recipes.report import write_report
from recipes.resume import RunFolder, StageFolder, append_samples
from recipes.schema import Recipe, Stage, resolved
from rollout.prompts import Stream


@dataclass(frozen=True, slots=True)
class Run:
    """What every stage of a run shares."""

    recipe: Recipe
    folder: RunFolder
    inputs: build.Inputs
    engine: HybridEngine
    console: Console


def run(
    recipe: Recipe,
    output_dir: Path,
    *,
    accept_changes: bool = False,
    ray_address: str | None = None,
    console: Console | None = None,
) -> Path:
    """Run what is not done yet of `recipe` in `output_dir`; the path of the report.

    Raises RecipeError before anything expensive for a recipe that cannot run, KeyboardInterrupt (with everything
    saved) after Ctrl-C, and the first cause of any other failure. No process outlives the call.
    """
    console = console or Console()
    with ExitStack() as stack:
        folder = RunFolder(output_dir, recipe, accept_changes=accept_changes)
        stack.callback(folder.close)
        if all(_is_done(recipe, folder, index) for index in range(len(recipe.stages))):
            return write_report(output_dir)
        inputs = build.build_inputs(recipe, folder)
        console.print(f"starting {recipe.train.world} training rank(s) and {recipe.rollout.replicas} vLLM engine(s)")
        engine = build.build_engine(recipe, inputs.start, ray_address)
        stack.callback(engine.close)
        context = Run(recipe, folder, inputs, engine, console)
        _evaluate_base(context)
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
    folder = run.folder.stage(index, stage.name)
    if folder.final.is_dir():
        run.engine.load(folder.final, run.inputs.tokenizer_dir, stage.config)
    else:
        reference = _reference(run, index)
        run.engine.load(_start(run, index), run.inputs.tokenizer_dir, stage.config, reference)
        _train(run, index, folder)
        run.engine.save_final(folder.final)
    _evaluate(run, index, folder)
    prune(folder.checkpoints, stage.config.keep_checkpoints)


def _start(run: Run, index: int) -> Path:
    """The weights that stage `index` starts from."""
    return _final(run, run.recipe.start_of(index))


def _final(run: Run, stage: Stage | None) -> Path:
    if stage is None:
        return run.inputs.start
    return run.folder.stage(run.recipe.stages.index(stage), stage.name).final


def _reference(run: Run, index: int) -> Path | None:
    config = run.recipe.stages[index].config
    if not isinstance(config, GRPOConfig) or config.kl == 0:
        return None
    if config.reference is None:
        return _start(run, index)
    return _final(run, next(stage for stage in run.recipe.stages if stage.name == config.reference))


def _train(run: Run, index: int, folder: StageFolder) -> None:
    """The stage's steps, from its newest checkpoint on, with all that surrounds a step: logs, checkpoints, Ctrl-C."""
    stage, recipe = run.recipe.stages[index], run.recipe
    seed = build.stage_seed(recipe, stage)
    folder.path.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        if isinstance(stage.config, SFTConfig):
            stream, counts = build.sft_stream(stage.config, run.inputs, index, seed)
            run.console.print(f"{stage.name}: {', '.join(f'{value:,} {name}' for name, value in counts.items())}")
            total = stage.config.total_steps(counts["kept"])
            first = _resume(run, folder, stream)
            steps: Iterator[SFTStep | GRPOStep] = sft(run.engine, stream, stage.config, total, first + 1)
        else:
            stream = build.prompt_stream(stage.config, run.inputs, index, recipe, seed)
            scorer = stack.enter_context(build.scorer(stage.config, recipe))
            total, first = stage.config.steps, _resume(run, folder, stream)
            steps = grpo(run.engine, stream, stage.config, build.sampling(stage.config, seed), scorer, first + 1)
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
                prune(folder.checkpoints, stage.config.keep_checkpoints)
            if interrupted:
                raise KeyboardInterrupt


def _resume(run: Run, folder: StageFolder, stream: Stream[Any]) -> int:
    """Restore the newest checkpoint, if there is one; the number of steps that are done."""
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        return 0
    extra = run.engine.load_checkpoint(checkpoint)
    stream.restore(extra["stream"])
    run.console.print(f"continuing after step {extra['step']} ({checkpoint.name})")
    return extra["step"]


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


def _evaluate_base(run: Run) -> None:
    """The evals before the first stage, once."""
    base = run.folder.base()
    if run.recipe.evals.tasks and not base.results.is_file():
        run.engine.load(run.inputs.start, run.inputs.tokenizer_dir, run.recipe.stages[0].config)
        _run_evals(run, base)


def _evaluate(run: Run, index: int, folder: StageFolder) -> None:
    """The evals after a stage, and its tax table: against the policy that it started from."""
    if not run.recipe.evals.tasks:
        return
    _run_evals(run, folder)
    start = run.recipe.start_of(index)
    before = run.folder.base() if start is None else run.folder.stage(run.recipe.stages.index(start), start.name)
    rows = compare(before.load_evals() or [], folder.load_evals() or [])
    name = "base" if start is None else start.name
    run.folder.add_tax(run.recipe.stages[index].name, name, rows)
    print_tax(rows, run.console, before=name, after=run.recipe.stages[index].name)


def _run_evals(run: Run, folder: StageFolder) -> None:
    if folder.results.is_file():
        return
    recipe = run.recipe
    results, samples = run_evals(
        recipe.evals, run.engine.sampler, run.inputs.tokenizer, recipe.folder, recipe.seed, recipe.data_folder
    )
    folder.save_evals(results, samples)
