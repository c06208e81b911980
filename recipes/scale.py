"""What `align plan` prints: a recipe on a cluster, known before a device is used."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import yaml
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from transformers import AutoConfig, DeepseekV2Config, PreTrainedConfig

from alignment.config import RewardModelConfig, SFTConfig
from alignment.model import PRESETS, model_source
from hybrid_engine.actors import at_hand
from hybrid_engine.cluster import ASSUMED, GIB, Cluster, cluster
from hybrid_engine.footprint import Model, model_of
from hybrid_engine.forecast import Work
from hybrid_engine.layout import misfits
from hybrid_engine.prospect import Prospect, prospect, ranked, remedies
from recipes.schema import AUTO, LoadedRecipe, Recipe, Stage, load_recipe
from recipes.source import RecipeError, shorten
from rollout.config import budget


def settled(loaded: LoadedRecipe, begun: Path | None, ray_address: str | None) -> tuple[LoadedRecipe, str]:
    """The recipe with a layout in place of each `auto`, and what to say of it. begun: the resolved recipe of a run, the
    layout of which stays; where there is none, it is the best on the machines at hand. Raises RecipeError."""
    if begun is not None and begun.is_file():
        return _laid_out(loaded, load_recipe(begun).recipe, f"as {begun.parent} was begun")
    try:
        machines = _machines(loaded.recipe, at_hand(ray_address))
    except ValueError as error:
        raise RecipeError([loaded.source.problem(loaded.auto[:1], str(error))]) from None
    return _best(loaded, _model(loaded, machines), machines)


def scale(loaded: LoadedRecipe, described: str | None) -> Iterator[RenderableType]:
    """Every stage's memory, seconds and schedule in the recipe's layouts, then the best layouts for the slowest stage.

    described: a cluster, for `hybrid_engine.cluster.cluster`; None: the machines at hand. Raises ValueError as it does,
    RecipeError where the model or its layouts are impossible."""
    machines = _machines(loaded.recipe, described or at_hand(None))
    model = _model(loaded, machines)
    what = f"{(model.dense + model.routed) / 1e9:,.4g}B parameters, {sum(model.active) / 1e9:,.3g}B for a token"
    yield Text(f"{what}, on {_where(machines)}")
    if loaded.auto:
        loaded, said = _best(loaded, model, machines)
        yield Text(said)
    layouts = loaded.recipe.train, loaded.recipe.rollout
    names: dict[Work, list[str]] = {}
    for stage in loaded.recipe.stages:
        names.setdefault(work_of(loaded.recipe, stage, model), []).append(stage.name)
    found = {work: prospect(model, *layouts, machines, work).solved() for work in names}
    for work, each in found.items():
        yield Text(f"\n{', '.join(names[work])}: {each.total:,.1f} s a step", style="bold")
        for side in each.parts:
            yield from _memory(each, side)
        yield _seconds(each)
        if each.error is not None:
            yield Text(f"It does not fit. {each.error}", style="red")
            helping = [pair for pair in remedies(model, each, machines, work) if pair[1] < each.error.missing]
            for text, missing in helping[:5] or [("no other setting by itself", each.error.missing)]:
                yield Text(f"  {text}: {f'{_gib(missing)} GiB are still missing' if missing else 'fits'}")
    works = sorted(found, key=lambda work: -found[work].total)
    yield _layouts([found[works[0]], *ranked(model, *layouts, machines, works)[:3]], names[works[0]][0])
    if not machines.moves:
        more = _gib(12 * (model.dense + model.routed) / machines.hosts)
        yield Text("Nothing is moved: the recipe has no `memory:`, or `offload: off` in it.")
        yield Text(f"A checkpoint takes {more} GiB more of each host's memory while it is written.")
    yield Text(f"Every sequence is as long as it may be. Assumed (hybrid_engine/hardware.yaml): {dict(ASSUMED)}")


def _machines(recipe: Recipe, described: str | None) -> Cluster:
    """As the recipe's `memory` lets a run use them. Raises ValueError as `cluster` does."""
    found = cluster(described)
    if not recipe.offloads:
        return replace(found, tiers=found.tiers[:1], moves=False)
    return found.budgeted(*budget(recipe.memory), disk="disk" in recipe.memory)


def _model(loaded: LoadedRecipe, machines: Cluster) -> Model:
    recipe = loaded.recipe
    try:
        model = model_of(configuration(recipe))
    except (OSError, ValueError) as error:
        text = f"no model to plan for: {shorten(str(error), 1)}"
        raise RecipeError([loaded.source.problem(("model", "path"), text)]) from error
    found = misfits(recipe.train, recipe.rollout, model.values, machines.kind)
    problems = [((section, key), text) for section, key, text in found]
    sides = recipe.train.world, recipe.rollout.world * recipe.rollout.replicas
    needed = sum(sides) if recipe.rollout.placement == "split" else max(sides)
    if needed > machines.ranks and not machines.on_cpu:
        problems.append((("train",), f"the layouts need {needed} devices, the cluster has {machines.ranks}"))
    if problems:
        raise RecipeError([loaded.source.problem(*problem) for problem in problems])
    return model


def _best(loaded: LoadedRecipe, model: Model, machines: Cluster) -> tuple[LoadedRecipe, str]:
    recipe, layouts = loaded.recipe, (loaded.recipe.train, loaded.recipe.rollout)
    works = {work_of(recipe, stage, model): stage.name for stage in recipe.stages}
    slowest, *others = sorted(works, key=lambda work: -prospect(model, *layouts, machines, work).total)
    found = ranked(model, *layouts, machines, [slowest, *others], loaded.auto)
    if not found:
        still = "" if machines.moves else ", where nothing is moved without `memory:`"
        text = f"no layout fits {_where(machines)}{still}: `align plan` with one written out says what is missing"
        raise RecipeError([loaded.source.problem(loaded.auto[:1], text)])
    why = f"{found[0].total:,.1f} s a step of {works[slowest]} on {_where(machines)}"
    away = f"; where nothing is moved, {_gib(found[0].over)} GiB are missing" if found[0].over else ""
    return _laid_out(loaded, found[0], why + away)


def _laid_out(loaded: LoadedRecipe, found: Recipe | Prospect, why: str) -> tuple[LoadedRecipe, str]:
    recipe = loaded.recipe
    keys = {section: getattr(found, section).model_dump(include={*AUTO[section]}) for section in loaded.auto}
    update = {section: getattr(recipe, section).model_copy(update=chosen) for section, chosen in keys.items()}
    said = "; ".join(f"{section}: auto is {_layout(chosen)}" for section, chosen in keys.items())
    return LoadedRecipe(recipe.model_copy(update=update), loaded.source), f"{said} ({why})"


def configuration(recipe: Recipe) -> PreTrainedConfig:
    """The model's, from its directory or the hub; DeepSeek-V2's own need neither. Raises OSError or ValueError."""
    presets, init = yaml.safe_load(PRESETS.read_text(encoding="utf-8")), recipe.model.init
    name = init.preset if init else PurePath(recipe.model.path).name.lower()
    source = model_source(recipe.model, recipe.folder)
    if source in (None, recipe.model.path) and name in presets:
        return DeepseekV2Config(**({"vocab_size": init.vocab_size} if init else {}) | presets[name])
    return AutoConfig.from_pretrained(source)


def work_of(recipe: Recipe, stage: Stage, model: Model) -> Work:
    """What a step of a stage computes, every sequence as long as it may be."""
    config, grpo = stage.config, stage.grpo
    if isinstance(config, SFTConfig | RewardModelConfig):
        rows = 2 if stage.columns == [("chosen", "rejected")] else 1
        scores = stage.reward_model is not None
        return Work(config.batch_size, rows, 0, config.max_length, config.max_length, scores=scores)
    judges = tuple(4 * (model.dense + model.routed) for reward in config.rewards if reward.function is None)
    new = config.max_new_tokens
    work = Work(config.prompts_per_step, config.completions, recipe.rollout.max_length - new, new, new, judges=judges)
    if grpo is None:
        return replace(work, samples=True, trains=False)
    again = grpo.updates_per_batch > 1 or grpo.capacity is not None
    updates, reference = grpo.updates_per_batch, grpo.kl > 0
    return replace(work, samples=True, updates=updates, forwards=int(again), reference=reference)


def _where(machines: Cluster) -> str:
    where = "this machine" if machines.on_cpu else f"{machines.hosts} x {machines.devices} {machines.kind}"
    return f"{where}: {_gib(machines.memory)} GiB a device, {_gib(machines.host_memory)} GiB a host"


def _layout(keys: Mapping[str, Any]) -> str:
    """As `replicas 2, tensor 1, expert`."""
    return ", ".join(k.split("_")[-1] if v is True else f"{k} {v}" for k, v in keys.items() if v is not False)


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _memory(each: Prospect, side: str) -> Iterator[RenderableType]:
    """GiB of every component in every phase, the peak and what is left; what moves when."""
    schedule, (device, *lower), phases = each.schedules.get(side), each.tiers, list(each.seconds)
    table = Table(f"GiB of a {side}", *phases, title_justify="left")
    held = Counter({(p.name, phase): p.bytes for p in each.parts[side] for phase in p.needed_in if schedule is None})
    for move in () if schedule is None else schedule.moves:
        if move.when == "during":
            size = 2 * move.bytes // move.pieces if move.streamed else move.bytes * (device.name in move.after)
            held[move.component, move.phase] += size
    for part in each.parts[side]:
        sizes = (held[part.name, phase] for phase in phases)
        table.add_row(part.name, *(_gib(size) if size else "" for size in sizes))
    table.add_section()
    if schedule is not None:
        peaks = [schedule.peaks[phase] for phase in phases]
        table.add_row("peak, with transfers", *(_gib(peak[device.name]) for peak in peaks))
        table.add_row("left", *(_gib(device.capacity - peak[device.name]) for peak in peaks))
        for tier in lower:
            table.add_row(f"on the {tier.name}", *(_gib(peak[tier.name]) for peak in peaks))
    table.add_row("if nothing moved", *map(_gib, each.resident(side).values()))
    yield table
    if schedule is not None:
        yield from (Text(f"  {line}: {_gib(size)} GiB") for line, size in schedule.copies().items())


def _seconds(each: Prospect) -> Table:
    table = Table("phase", "seconds", "of these")
    for phase, parts in each.seconds.items():
        lost = sum(schedule.lost[phase] for schedule in each.schedules.values())
        text = ", ".join(f"{name} {seconds:,.2f}" for name, seconds in {**parts, "transfers": lost}.items() if seconds)
        table.add_row(phase, f"{sum(parts.values()) + lost:,.2f}", text)
    return table


def _layouts(found: list[Prospect], name: str) -> Table:
    table = Table("train", "rollout", "s a step", "peak GiB", title=f"{name}: the recipe's layouts, and the best")
    for each in found:
        sides = [getattr(each, section).model_dump(include={*keys}) for section, keys in AUTO.items()]
        peak = max((p["device"] for s in each.schedules.values() for p in s.peaks.values()), default=0)
        total = "does not fit" if each.error else f"{each.total:,.1f}"
        table.add_row(*map(_layout, sides), total, _gib(peak))
    return table
