"""The arithmetic of a recipe's stages, resolved for a person to read."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from alignment.config import DatasetStageConfig, GRPOConfig
from recipes.schema import Recipe, Stage


def plan(recipe: Recipe, rows: Mapping[int, Sequence[Any]]) -> Iterator[Table]:
    """One table per stage: steps, sequences, updates, tokens and lengths. rows: the datasets read so far, by stage."""
    model = f"{recipe.model.init.preset}, random weights" if recipe.model.init else str(recipe.model.path)
    for index, stage in enumerate(recipe.stages):
        start, known = recipe.start_of(stage), rows.get(index)
        table = Table(show_header=False, title=f"{index + 1}. {stage.name} ({stage.kind})", title_justify="left")
        table.add_row("starts from", start.name if start else model)
        table.add_row("data", stage.source + ("" if known is None else f", {len(known):,} rows"))
        for name, text in _arithmetic(recipe, stage, known and len(known)):
            table.add_row(name, text)
        if stage.rollout:
            new, longest = stage.rollout.max_new_tokens, recipe.rollout.max_length
            table.add_row("lengths", f"prompt {longest - new:,} + new {new:,} = {longest:,} at most")
        yield table


def _arithmetic(recipe: Recipe, stage: Stage, rows: int | None) -> Iterator[tuple[str, str]]:
    config, groups, updates, train = stage.config, 0, 1, recipe.train
    if isinstance(config, GRPOConfig):
        groups, updates, each = config.prompts_per_step, config.updates_per_batch, config.completions
        tokens = each * recipe.rollout.max_length
        yield "steps", f"{config.steps:,}" + (f", {config.steps * groups / rows:.2f} epochs" if rows else "")
        yield "per step", f"{groups:,} prompts x {each:,} completions = {groups * each:,} sequences"
        yield "updates", f"{updates:,} per step, of {groups // updates * each:,} sequences each"
    elif isinstance(config, DatasetStageConfig):
        groups, tokens = config.batch_size, config.max_length
        steps = config.steps if rows is None else config.total_steps(rows)
        epochs = "" if rows is None else f", {steps * groups / rows:.2f} epochs"
        yield "steps", f"{steps:,}{epochs}" if steps else f"{config.epochs:g} epochs"
        yield "per step", f"{groups:,} sequences of at most {tokens:,} tokens, 1 update"
    elif rows is not None:
        yield "completions", f"{rows * config.completions:,}, {config.completions:,} of each prompt"
    if groups:  # whole groups, of `tokens` each, go to a rank
        rank = math.ceil(groups // updates / train.world) * tokens
        room = f"{rank:,} per rank in an update; {train.tokens_per_rank:,} in a micro-batch"
        yield "tokens", f"at most {groups * tokens:,} a step, {room}"
