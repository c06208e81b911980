"""The arithmetic of a recipe's stages, resolved for a person to read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from alignment.config import GRPOConfig, SFTConfig
from recipes.data import stage_data
from recipes.schema import Recipe
from recipes.source import Key


def plan(recipe: Recipe, rows: Mapping[Key, Sequence[Any]]) -> Iterator[Table]:
    """One table per stage: steps, sequences, updates, tokens and lengths. rows: the datasets read so far, by key."""
    for index, data in enumerate(stage_data(recipe)):
        stage, known = recipe.stages[index], rows.get(data.key)
        start = recipe.start_of(index)
        table = Table(show_header=False, title=f"{index + 1}. {stage.name} ({stage.kind})", title_justify="left")
        table.add_row("starts from", start.name if start else _model(recipe))
        table.add_row("data", data.source + ("" if known is None else f", {len(known):,} rows"))
        lines = (
            _grpo(recipe, data.stage, known) if isinstance(data.stage, GRPOConfig) else _sft(recipe, data.stage, known)
        )
        for name, text in lines:
            table.add_row(name, text)
        table.add_row("learning rate", _schedule(data.stage))
        yield table


def _model(recipe: Recipe) -> str:
    return f"{recipe.model.init.preset}, random weights" if recipe.model.init else str(recipe.model.path)


def _schedule(config: SFTConfig | GRPOConfig) -> str:
    text = f"{config.learning_rate:g}, {config.schedule}"
    text += f", warm-up {config.warmup_steps:,} updates" if config.warmup_steps else ""
    return text + (f", decay over the last {config.decay_steps:,}" if config.decay_steps else "")


def _sft(recipe: Recipe, config: SFTConfig, rows: Sequence[Any] | None) -> Iterator[tuple[str, str]]:
    if rows is not None:
        steps = config.total_steps(len(rows))
        text = f"{steps:,}, {steps * config.batch_size / len(rows):.2f} epochs"
    else:
        text = f"{config.epochs:g} epochs" if config.steps is None else f"{config.steps:,}"
    yield "steps", text
    yield "per step", f"{config.batch_size:,} sequences, 1 update"
    yield "tokens", _tokens(recipe, config.batch_size, 1, config.max_length)
    yield "lengths", f"rows are cut at {config.max_length:,} tokens"


def _grpo(recipe: Recipe, config: GRPOConfig, rows: Sequence[Any] | None) -> Iterator[tuple[str, str]]:
    epochs = "" if rows is None else f", {config.steps * config.prompts_per_step / len(rows):.2f} epochs"
    prompts, completions, updates = config.prompts_per_step, config.completions, config.updates_per_batch
    longest = recipe.rollout.max_length
    yield "steps", f"{config.steps:,}{epochs}"
    yield "per step", f"{prompts:,} prompts x {completions:,} completions = {prompts * completions:,} sequences"
    yield "updates", f"{updates:,} per step, of {prompts // updates * completions:,} sequences each"
    yield "tokens", _tokens(recipe, prompts, updates, longest, completions)
    yield "lengths", f"prompt {longest - config.max_new_tokens:,} + new {config.max_new_tokens:,} = {longest:,} at most"


def _tokens(recipe: Recipe, groups: int, updates: int, length: int, group_size: int = 1) -> str:
    """Most tokens of a step, and of one rank in an update (whole groups go to a rank), in micro-batches."""
    ranks = recipe.train.shard
    per_rank = math.ceil(groups // updates / ranks) * group_size * length
    each = f"{per_rank:,} on each of {ranks} ranks" if ranks > 1 else f"{per_rank:,}"
    return (
        f"at most {groups * group_size * length:,} a step, {each} an update; "
        f"{recipe.train.tokens_per_rank:,} in a micro-batch"
    )
