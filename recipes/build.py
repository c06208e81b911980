"""From a recipe to objects: the one place where implementations are chosen."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import PreTrainedTokenizerBase

from alignment.config import SFTConfig
from alignment.files import atomic_directory
from alignment.grpo import GRPOStep, grpo
from alignment.model import build_model, load_tokenizer, model_config, model_source, save_model_dir
from alignment.sft import SFTStep, sft
from alignment.sft_data import make_sft_rows
from hybrid_engine.checkpoint import latest_checkpoint
from hybrid_engine.engine import HybridEngine
from recipes.data import stage_rows
from recipes.resume import RunFolder, StageFolder
from recipes.schema import Recipe
from rewards.pool import RewardPool
from rollout.data import row_texts
from rollout.prompts import Stream, check_lengths, make_prompts
from rollout.sampler import Sampling


@dataclass(frozen=True, slots=True)
class Run:
    """What every stage of a run shares. start: the model directory of the first stage. rows: each stage's dataset."""

    recipe: Recipe
    folder: RunFolder
    console: Console
    tokenizer: PreTrainedTokenizerBase
    start: Path
    rows: tuple[list[dict[str, Any]], ...]
    engine: HybridEngine


def build_run(recipe: Recipe, folder: RunFolder, console: Console, ray_address: str | None) -> Run:
    """Load every dataset, the tokenizer and the model directory, then start every actor. Raises ValueError.

    A model from scratch and its tokenizer are made once and then kept in the run folder.
    """
    rows = tuple(stage_rows(recipe, stage) for stage in recipe.stages)
    if folder.tokenizer.is_dir():
        kept = recipe.model.model_copy(update={"path": str(folder.tokenizer), "init": None})
        tokenizer = load_tokenizer(kept, recipe.folder, ())
    else:
        tokenizer = load_tokenizer(recipe.model, recipe.folder, row_texts(chain.from_iterable(rows)))
        with atomic_directory(folder.tokenizer) as new:
            tokenizer.save_pretrained(new)
    source = model_source(recipe.model, recipe.folder)
    start = folder.initial if source is None else Path(source)
    if source is None and not start.is_dir():
        model = build_model(model_config(recipe.model, tokenizer, recipe.folder), recipe.seed)
        save_model_dir(model, tokenizer, start)
    console.print(f"starting {recipe.train.world} training rank(s) and {recipe.rollout.replicas} vLLM engine(s)")
    engine = HybridEngine(start, recipe.train, recipe.rollout, seed=recipe.seed, ray_address=ray_address)
    return Run(recipe, folder, console, tokenizer, start, rows, engine)


def build_steps(
    run: Run, index: int, folder: StageFolder, stack: ExitStack
) -> tuple[Stream[Any], Iterator[SFTStep | GRPOStep], int, int]:
    """The stage's data, its steps from the newest checkpoint on, how many are done, and how many there are in all.

    Raises ValueError for a prompt that leaves no room for a completion, and for data that are not the checkpoint's.
    """
    recipe, stage = run.recipe, run.recipe.stages[index]
    config, rows, source = stage.config, run.rows[index], stage.source
    seed = recipe.seed * 1_000_003 + zlib.crc32(stage.name.encode())  # stages draw different numbers
    if isinstance(config, SFTConfig):
        trajectories, counts = make_sft_rows(rows, run.tokenizer, config, source)
        run.console.print(f"{stage.name}: {', '.join(f'{value:,} {name}' for name, value in counts.items())}")
        stream, total = Stream(trajectories, config.batch_size, seed), config.total_steps(counts["kept"])
        first = _resume(run, folder, stream)
        return stream, sft(run.engine, stream, config, total, first + 1), first, total
    prompts = make_prompts(rows, run.tokenizer, source)
    check_lengths(prompts, recipe.rollout.max_length, config.max_new_tokens, source)
    stream = Stream(prompts, config.prompts_per_step, seed)
    scorer = stack.enter_context(RewardPool(config.rewards, recipe.folder, config.steps))
    sampling = Sampling(config.completions, config.max_new_tokens, config.temperature, seed)
    first = _resume(run, folder, stream)
    return stream, grpo(run.engine, stream, config, sampling, scorer, first + 1), first, config.steps


def _resume(run: Run, folder: StageFolder, stream: Stream[Any]) -> int:
    """Restore the newest checkpoint, if there is one; the number of steps that are done."""
    checkpoint = latest_checkpoint(folder.checkpoints)
    if checkpoint is None:
        return 0
    extra = run.engine.load_checkpoint(checkpoint)
    stream.restore(extra["stream"])
    run.console.print(f"continuing after step {extra['step']} ({checkpoint.name})")
    return extra["step"]
