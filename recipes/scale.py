"""What `align plan` prints: a recipe on a cluster, known before a device is used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePath

import yaml
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, DeepseekV2Config, PreTrainedConfig

from alignment.config import RewardModelConfig, SFTConfig
from alignment.model import model_source
from alignment.presets import PRESETS
from hybrid_engine.cluster import ASSUMED, GIB, Cluster
from hybrid_engine.footprint import Model, model_of
from hybrid_engine.forecast import Work
from hybrid_engine.layout import misfits
from hybrid_engine.prospect import Prospect, prospect, ranked, remedies
from recipes.errors import RecipeError
from recipes.schema import LoadedRecipe, Recipe, Stage

CHECKPOINT = 12
"""Bytes a parameter of a checkpoint, which is a copy in host memory while it is written."""


def scale(loaded: LoadedRecipe, cluster: Cluster) -> Iterator[RenderableType]:
    """Every stage's memory, seconds and schedule on the recipe's layouts, then the best layouts for the slowest stage.

    Raises RecipeError where the model or its layouts are impossible.
    """
    recipe = loaded.recipe
    try:
        model = model_of(configuration(recipe))
    except (OSError, ValueError) as error:
        raise RecipeError([loaded.source.problem(("model", "path"), f"no model to plan for: {error}")]) from error
    needed = max(recipe.train.world, recipe.rollout.world * recipe.rollout.replicas)
    problems = [((section, key), text) for section, key, text in misfits(recipe.train, recipe.rollout, model.values)]
    if needed > cluster.ranks and not cluster.on_cpu:
        problems.append((("train",), f"the layouts need {needed} devices, the cluster has {cluster.ranks}"))
    if problems:
        raise RecipeError([loaded.source.problem(*problem) for problem in problems])
    yield _title(model, cluster)
    names: dict[Work, list[str]] = {}
    for stage in recipe.stages:
        names.setdefault(work_of(recipe, stage, model), []).append(f"{stage.name} ({stage.kind})")
    found = {work: prospect(model, recipe.train, recipe.rollout, cluster, work).solved() for work in names}
    for work, each in found.items():
        yield Text(f"\n{', '.join(names[work])}: {each.total:,.1f} s a step", style="bold")
        for side in each.parts:
            yield _memory(each, side)
        yield _seconds(each)
        if each.error is None:
            yield from _schedule(each)
            continue
        yield Text(f"It does not fit. {each.error}", style="red")
        for text, missing in remedies(model, each, cluster, work)[:5]:
            yield Text(f"  {text}: {f'{_gib(missing)} GiB are still missing' if missing else 'fits'}")
    slowest = max(found, key=lambda work: found[work].total)
    yield _layouts(found[slowest], ranked(model, recipe.train, recipe.rollout, cluster, slowest), names[slowest][0])
    yield from _notes(model, cluster, found[slowest])


def configuration(recipe: Recipe) -> PreTrainedConfig:
    """The model's, from its directory or the hub; DeepSeek-V2's own need neither. Raises OSError or ValueError."""
    presets, init = yaml.safe_load(PRESETS.read_text(encoding="utf-8")), recipe.model.init
    source = model_source(recipe.model, recipe.folder)
    name = init.preset if init else PurePath(recipe.model.path).name.lower()
    if init or (source == recipe.model.path and name in presets):
        return DeepseekV2Config(**{"vocab_size": init.vocab_size if init else 0} | presets[name])
    return AutoConfig.from_pretrained(source)


def work_of(recipe: Recipe, stage: Stage, model: Model) -> Work:
    """What a step of a stage computes, every sequence as long as it may be."""
    config = stage.config
    if isinstance(config, SFTConfig | RewardModelConfig):
        judged, pairs = stage.reward_model is not None, stage.columns == [("chosen", "rejected")]
        return Work(config.batch_size, 1 + pairs, 0, config.max_length, config.max_length, scores=judged)
    grpo, new = stage.grpo, config.max_new_tokens
    judges = tuple(4 * model.numel() for reward in config.rewards if reward.function is None)
    work = Work(config.prompts_per_step, config.completions, recipe.rollout.max_length - new, new, new)
    if grpo is None:
        return replace(work, samples=True, trains=False, judges=judges)
    updates, again = grpo.updates_per_batch, grpo.updates_per_batch > 1 or grpo.capacity is not None
    return replace(
        work, samples=True, judges=judges, updates=updates, forwards=int(again), reference=grpo.kl > 0
    )  # fmt: skip


def _title(model: Model, cluster: Cluster) -> Text:
    dense, chosen = model.active
    what = f"{model.numel() / 1e9:,.4g}B parameters, {(dense + chosen) / 1e9:,.3g}B for a token"
    where = "this machine" if cluster.on_cpu else f"{cluster.hosts} x {cluster.devices} {cluster.kind}"
    host = "" if cluster.on_cpu else f", {cluster.host_memory / GIB:,.0f} GiB of memory a host"
    return Text(f"{what}, on {where}: {_gib(cluster.memory)} GiB a device{host}", style="bold")


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _memory(each: Prospect, side: str) -> Table:
    """GiB of every component in every phase, its peak and what is left."""
    phases, table = list(each.seconds), Table("GiB", *each.seconds, title=f"Memory of a {side}", title_justify="left")
    for number in range(1, len(phases) + 1):
        table.columns[number].justify = "right"
    schedule, lower = each.schedules.get(side), each.tiers[1].name
    for part in each.parts[side]:
        if schedule is None:
            held = {phase: part.bytes for phase in part.needed_in}
        else:
            held = dict.fromkeys(phases, 0)
            for move in (m for m in schedule.moves if (m.component, m.when) == (part.name, "during")):
                streamed = move.target is not None and move.target not in move.after
                held[move.phase] += 2 * part.piece if streamed else move.bytes * ("device" in move.after)
        table.add_row(part.name, *(_gib(held[phase]) if held.get(phase) else "" for phase in phases))
    table.add_section()
    if schedule is not None:
        peaks = [schedule.peaks[phase] for phase in phases]
        table.add_row("peak, transfers included", *(_gib(peak["device"]) for peak in peaks))
        table.add_row("left", *(_gib(each.tiers[0].capacity - peak["device"]) for peak in peaks))
        table.add_row(f"on the {lower}", *(_gib(peak[lower]) for peak in peaks))
    table.add_row("if nothing moved", *map(_gib, each.resident(side).values()))
    return table


def _seconds(each: Prospect) -> Table:
    table = Table("phase", "seconds", "of these", title="Time of a step", title_justify="left")
    for phase, parts in each.seconds.items():
        table.add_row(phase, f"{sum(parts.values()):,.2f}", ", ".join(f"{n} {s:,.2f}" for n, s in parts.items()))
    lost = sum(sum(schedule.lost.values()) for schedule in each.schedules.values())
    table.add_row("transfers", f"{lost:,.2f}", "what no computation hides")
    return table


def _schedule(each: Prospect) -> Iterator[Text]:
    for side, schedule in each.schedules.items():
        sums: dict[tuple[str, ...], int] = {}
        for move in schedule.moves:
            if move.source is not None and move.target is not None:
                streamed = " and back" if move.target not in move.after else ""
                key = (move.phase, move.when, move.component, f"{move.source} -> {move.target}{streamed}")
                sums[key] = sums.get(key, 0) + move.bytes
        yield Text(
            f"Schedule of a {side}, {f'{100 * schedule.gap:.1f}% from the best at most' if sums else 'nothing moves'}"
        )
        for (phase, when, name, way), size in sums.items():
            yield Text(f"  {'during' if when == 'during' else 'before'} {phase}: {name}, {_gib(size)} GiB, {way}")


def _layouts(given: Prospect, best: list[Prospect], name: str) -> Table:
    table = Table(
        "train", "rollout", "s a step", "peak GiB", title=f"The best layouts for {name}", title_justify="left"
    )
    for each in [given, *best]:
        train, rollout = each.train, each.rollout
        left = f"replicate {train.replicate} x shard {train.shard}, expert {train.expert}"
        left += ", checkpointing" * train.activation_checkpointing
        right = f"{rollout.replicas} x tensor {rollout.tensor} x data {rollout.data}" + ", expert" * rollout.expert
        peak = max((p["device"] for s in each.schedules.values() for p in s.peaks.values()), default=0)
        total = f"{each.total:,.1f}" if each.error is None else "does not fit"
        table.add_row(left, right, total + " (the recipe's)" * (each is given), _gib(peak) if peak else "")
    if not best:
        table.add_row("none that fits", "", "", "")
    return table


def _notes(model: Model, cluster: Cluster, given: Prospect) -> Iterator[Text]:
    if not cluster.on_cpu:
        copy = CHECKPOINT * model.numel() / cluster.hosts
        on_host = max((p["host"] for s in given.schedules.values() for p in s.peaks.values()), default=0)
        left = cluster.host_memory - ASSUMED["host_reserved"] * GIB - on_host * cluster.devices
        text = f"A checkpoint copies {_gib(copy)} GiB to each host's memory while it is written; {_gib(left)} are free."
        yield Text(text, style="" if copy <= left else "red")
    figures = ", ".join(f"{name} {value:g}" for name, value in ASSUMED.items())
    yield Text(f"Every sequence is taken to be as long as it may be. Assumed (hybrid_engine/hardware.yaml): {figures}")
