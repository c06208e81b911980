"""From a recipe to objects: the one place where implementations are chosen."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.config import GRPOConfig, SFTConfig
from alignment.files import atomic_directory
from alignment.model import build_model, load_tokenizer, model_config, model_source, save_model_dir
from alignment.sft_data import make_sft_rows
from hybrid_engine.engine import HybridEngine
from recipes.data import stage_data
from recipes.resume import RunFolder
from recipes.schema import Recipe, Stage
from rewards.pool import RewardPool
from rollout.data import row_texts
from rollout.prompts import Stream, check_lengths, make_prompts
from rollout.sampler import Sampling
from rollout.types import Prompt, Trajectory


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the stages read, made before any engine starts. rows: each stage's dataset, in the stages' order."""

    tokenizer: PreTrainedTokenizerBase
    tokenizer_dir: Path
    start: Path
    rows: tuple[list[dict[str, Any]], ...]


def build_inputs(recipe: Recipe, folder: RunFolder) -> Inputs:
    """Load every dataset, the tokenizer, and the model directory that the first stage starts from.

    A model from scratch and its tokenizer are made once and then kept in the run folder. Raises ValueError.
    """
    rows = tuple(data.load(recipe) for data in stage_data(recipe))
    if folder.tokenizer.is_dir():
        kept = recipe.model.model_copy(update={"path": str(folder.tokenizer), "init": None})
        tokenizer = load_tokenizer(kept, recipe.folder, ())
    else:
        tokenizer = load_tokenizer(recipe.model, recipe.folder, row_texts(chain.from_iterable(rows)))
        with atomic_directory(folder.tokenizer) as new:
            tokenizer.save_pretrained(new)
    source = model_source(recipe.model, recipe.folder)
    if source is not None:
        return Inputs(tokenizer, folder.tokenizer, Path(source), rows)
    if not folder.initial.is_dir():
        model = build_model(model_config(recipe.model, tokenizer, recipe.folder), recipe.seed)
        save_model_dir(model, tokenizer, folder.initial)
    return Inputs(tokenizer, folder.tokenizer, folder.initial, rows)


def build_engine(recipe: Recipe, start: Path, ray_address: str | None) -> HybridEngine:
    """Start every actor."""
    return HybridEngine(start, recipe.train, recipe.rollout, seed=recipe.seed, ray_address=ray_address)


def sft_stream(config: SFTConfig, inputs: Inputs, index: int, seed: int) -> tuple[Stream[Trajectory], dict[str, int]]:
    """The stage's tokenised rows, and counts of what happened to them."""
    source = str(config.data.path or config.data.function)
    trajectories, counts = make_sft_rows(inputs.rows[index], inputs.tokenizer, config, source)
    return Stream(trajectories, config.batch_size, seed), counts


def prompt_stream(config: GRPOConfig, inputs: Inputs, index: int, recipe: Recipe, seed: int) -> Stream[Prompt]:
    """The stage's prompts. Raises ValueError for one that leaves no room for a completion."""
    source = str(config.prompts.path or config.prompts.function)
    prompts = make_prompts(inputs.rows[index], inputs.tokenizer, source)
    check_lengths(prompts, recipe.rollout.max_length, config.max_new_tokens, source)
    return Stream(prompts, config.prompts_per_step, seed)


def sampling(config: GRPOConfig, seed: int) -> Sampling:
    """How the stage samples."""
    return Sampling(config.completions, config.max_new_tokens, config.temperature, seed)


def scorer(config: GRPOConfig, recipe: Recipe) -> RewardPool:
    """The stage's reward functions, in their worker processes."""
    return RewardPool(config.rewards, recipe.folder, config.steps)


def stage_seed(recipe: Recipe, stage: Stage) -> int:
    """Stages draw different numbers, and the same ones in every run of the recipe."""
    return recipe.seed * 1_000_003 + zlib.crc32(stage.name.encode())
