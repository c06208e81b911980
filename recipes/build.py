"""From a recipe to objects: the one place where implementations are chosen."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from alignment.grpo import HeldOut, grpo
from alignment.metrics import atomic_directory, read
from alignment.model import build_model, check_classifier, load_tokenizer, model_config, model_source, save_model_dir
from alignment.protocols import Step
from alignment.reward_model import make_judged_rows, reward_model
from alignment.sample import sample
from alignment.sft import make_sft_rows, sft
from hybrid_engine.checkpoint import latest_checkpoint
from hybrid_engine.engine import HybridEngine
from hybrid_engine.phases import Budget
from recipes.resume import RunFolder, StageFolder
from recipes.schema import Recipe, Rows, Stage, stage_rows
from rewards.normalize import RewardNormalizer
from rewards.pool import RewardPool
from rollout.config import budget
from rollout.data import row_texts
from rollout.prompts import Stream, check_lengths, is_held_out, make_prompts
from rollout.sampler import Sampling

MOST_HELD_OUT = 128
"""Prompts on which a GRPO stage's held-out reward is measured, at most."""


class Run(NamedTuple):
    """What every stage of a run shares. start: the model directory of the first stage. rows: each stage's dataset, by
    its name, but for those that a stage is yet to sample."""

    recipe: Recipe
    folder: RunFolder
    console: Console
    tokenizer: PreTrainedTokenizerBase
    start: Path
    rows: dict[str, Rows]
    engine: HybridEngine


def build_run(recipe: Recipe, folder: RunFolder, console: Console, ray_address: str | None) -> Run:
    """Load every dataset, the tokenizer and the model directory, then start every actor. Raises ValueError.

    A model from scratch and its tokenizer are made once and then kept in the run folder."""
    rows = {stage.name: stage_rows(recipe, stage) for stage in recipe.stages if stage.data.from_ is None}
    if folder.tokenizer.is_dir():
        kept = recipe.model.model_copy(update={"path": str(folder.tokenizer), "init": None})
        tokenizer = load_tokenizer(kept, recipe.folder, ())
    else:
        tokenizer = load_tokenizer(recipe.model, recipe.folder, row_texts(chain.from_iterable(rows.values())))
        with atomic_directory(folder.tokenizer) as new:
            tokenizer.save_pretrained(new)
    source = model_source(recipe.model, recipe.folder)
    start = folder.path / "initial" if source is None else Path(source)
    if source is None and not start.is_dir():
        model = build_model(model_config(recipe.model, tokenizer, recipe.folder), recipe.seed)
        save_model_dir(model, tokenizer, start)
    console.print(f"starting {recipe.train.world} training rank(s) and {recipe.rollout.replicas} vLLM engine(s)")
    room = _budget(recipe, console)
    engine = HybridEngine(start, recipe.train, recipe.rollout, seed=recipe.seed, ray_address=ray_address, budget=room)
    return Run(recipe, folder, console, tokenizer, start, rows, engine)


def _budget(recipe: Recipe, console: Console) -> Budget | None:
    """The recipe's `memory`; None where nothing is to be moved."""
    memory = recipe.memory
    if not recipe.offloads:
        return None
    return Budget(*budget(memory), recipe.folder / memory["disk"] if "disk" in memory else None, console.print)


class Work(NamedTuple):
    """A stage's steps still to do, in order: those after `first`, up to `total`. state: what a checkpoint between two
    steps needs besides the policy, as plain values."""

    steps: Iterator[Step]
    first: int
    total: int
    state: Callable[[], dict[str, Any]]
    held_out: HeldOut | None = None


def stage_items(
    recipe: Recipe, stage: Stage, rows: Rows, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[Any], list[Any], dict[str, int]]:
    """What a stage trains on or samples from, what of it is held out, and counts of what happened to the rows.

    Raises ValueError for rows that cannot be read, and for a prompt that leaves no room for a completion."""
    if stage.sft:
        items, counts = make_sft_rows(rows, tokenizer, stage.sft, stage.source)
        return items, [], counts
    if stage.reward_model:
        return make_judged_rows(rows, tokenizer, stage.reward_model, stage.source)
    prompts = make_prompts(rows, tokenizer, stage.source)
    check_lengths(prompts, recipe.rollout.max_length, stage.config.max_new_tokens, stage.source)
    share = stage.grpo.held_out if stage.grpo else 0.0
    held_out = list({str(p.text): p for p in prompts if is_held_out(p.text, share)}.values())[:MOST_HELD_OUT]
    prompts = [p for p in prompts if not is_held_out(p.text, share)]
    if not prompts or (share and not held_out):
        raise ValueError(
            f"{stage.source}: `held_out: {share:g}` leaves {len(prompts)} prompts and {len(held_out)} held out"
        )
    return prompts, held_out, {}


def build_steps(run: Run, stage: Stage, folder: StageFolder, stack: ExitStack) -> Work:
    """The stage's steps, from its newest checkpoint on. stack: closes what the steps need.

    Raises ValueError as `stage_items` does, and for data that are not the checkpoint's."""
    recipe, config, rows = run.recipe, stage.config, run.rows.get(stage.name)
    if rows is None:  # an earlier stage has sampled them by now
        rows = stage_rows(recipe, stage, run.folder.stage(recipe.named(stage.data.from_)).final)
    items, held_out, counts = stage_items(recipe, stage, rows, run.tokenizer)
    seed = recipe.seed * 1_000_003 + zlib.crc32(stage.name.encode())  # stages draw different numbers
    stream = Stream(items, config.prompts_per_step if stage.rollout else config.batch_size, seed)
    if not stage.rollout:
        run.console.print(f"{stage.name}: {', '.join(f'{value:,} {name}' for name, value in counts.items())}")
        total, first = config.total_steps(len(items)), _resume(run, folder, stream)
        if stage.sft:
            steps = sft(run.engine, stream, config, total, first + 1)
        else:
            steps = reward_model(run.engine, stream, held_out, config, total, first + 1)
        return Work(steps, first, total, lambda: {"stream": stream.state()})
    total = -(-len(items) // config.prompts_per_step) if stage.grpo is None else stage.grpo.steps
    models, fixed = {}, {}
    for reward in config.rewards:
        judge = run.folder.stage(recipe.named(reward.model)) if reward.model is not None else None
        if reward.function is None:
            path = str(judge.final) if judge else check_classifier(reward.path, recipe.folder)
            models[reward.label] = run.engine.reward_model(reward, path)
        if reward.normalize == "held_out":  # by the scores that it gave its held-out rows
            last = read(judge.metrics)[-1]
            fixed[reward.label] = last["held_out/score"], last["held_out/score_std"]
    scorer = stack.enter_context(RewardPool(config.rewards, recipe.folder, total, models))
    normalize = RewardNormalizer(config.rewards, fixed)
    sampling = Sampling(config.completions, config.max_new_tokens, config.temperature, seed)
    if stage.grpo is None:  # its weights stay as they are, and its rows are in a file: no checkpoints
        first = len(read(folder.metrics)) if folder.metrics.is_file() else 0
        for _ in range(first):
            next(stream)
        steps = sample(run.engine, stream, sampling, scorer, normalize, first + 1)
        return Work(steps, first, total, dict)
    first = _resume(run, folder, stream, normalize)
    steps = grpo(run.engine, stream, stage.grpo, sampling, scorer, first + 1, normalize)
    work = Work(steps, first, total, lambda: {"stream": stream.state(), "rewards": dict(normalize.running)})
    measure = HeldOut(run.engine, held_out, sampling, scorer, config.rewards, fixed, folder.held_out, config.truncated)
    return work._replace(held_out=measure) if held_out else work


def _resume(run: Run, folder: StageFolder, stream: Stream[Any], normalize: RewardNormalizer | None = None) -> int:
    """Restore the newest checkpoint, if there is one; the number of steps that are done."""
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        return 0
    extra = run.engine.load_checkpoint(checkpoint)
    stream.restore(extra["stream"])
    if normalize is not None:
        normalize.running = extra["rewards"]
    run.console.print(f"continuing after step {extra['step']} ({checkpoint.name})")
    return extra["step"]
