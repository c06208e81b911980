"""The arithmetic of a recipe's stages, resolved for a person to read."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from alignment.config import DatasetStageConfig, GRPOConfig, SampleConfig
from recipes.schema import Recipe


def plan(recipe: Recipe, rows: Mapping[int, Sequence[Any]]) -> Iterator[Table]:
    """One table per stage: steps, sequences, updates, tokens and lengths. rows: the datasets read so far, by stage."""
    model = f"{recipe.model.init.preset}, random weights" if recipe.model.init else str(recipe.model.path)
    for index, stage in enumerate(recipe.stages):
        start, known = recipe.start_of(stage), rows.get(index)
        table = Table(show_header=False, title=f"{index + 1}. {stage.name} ({stage.kind})", title_justify="left")
        table.add_row("starts from", start.name if start else model)
        table.add_row("data", stage.source + ("" if known is None else f", {len(known):,} rows"))
        arithmetic = {"grpo": _grpo, "sample": _sample}.get(stage.kind, _dataset)
        for name, text in arithmetic(recipe, stage.config, known and len(known)):
            table.add_row(name, text)
        if stage.rollout:
            new, longest = stage.rollout.max_new_tokens, recipe.rollout.max_length
            table.add_row("lengths", f"prompt {longest - new:,} + new {new:,} = {longest:,} at most")
        yield table


def _dataset(recipe: Recipe, config: DatasetStageConfig, rows: int | None) -> Iterator[tuple[str, str]]:
    if rows is not None:
        steps = config.total_steps(rows)
        yield "steps", f"{steps:,}, {steps * config.batch_size / rows:.2f} epochs"
    else:
        yield "steps", f"{config.steps:,}" if config.steps else f"{config.epochs:g} epochs"
    yield "per step", f"{config.batch_size:,} sequences of at most {config.max_length:,} tokens, 1 update"
    yield "tokens", _tokens(recipe, config.batch_size, 1, config.max_length)


def _grpo(recipe: Recipe, config: GRPOConfig, rows: int | None) -> Iterator[tuple[str, str]]:
    prompts, completions, updates = config.prompts_per_step, config.completions, config.updates_per_batch
    yield "steps", f"{config.steps:,}" + (f", {config.steps * prompts / rows:.2f} epochs" if rows else "")
    yield "per step", f"{prompts:,} prompts x {completions:,} completions = {prompts * completions:,} sequences"
    yield "updates", f"{updates:,} per step, of {prompts // updates * completions:,} sequences each"
    yield "tokens", _tokens(recipe, prompts, updates, completions * recipe.rollout.max_length)


def _sample(recipe: Recipe, config: SampleConfig, rows: int | None) -> Iterator[tuple[str, str]]:
    if rows is not None:
        yield "completions", f"{rows * config.completions:,}, {config.completions:,} of each prompt"


def _tokens(recipe: Recipe, groups: int, updates: int, tokens: int) -> str:
    """Most tokens of a step, and of one rank in an update. Whole groups, of `tokens` each, go to a rank."""
    per_rank, budget = math.ceil(groups // updates / recipe.train.world) * tokens, recipe.train.tokens_per_rank
    return f"at most {groups * tokens:,} a step, {per_rank:,} per rank in an update; {budget:,} in a micro-batch"
