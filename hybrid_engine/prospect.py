"""A layout's prospects: what lies where in each phase of a step, how long it takes, which layouts do better, and what
to change where nothing fits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil
from typing import Any

from alignment.config import TrainConfig
from hybrid_engine.cluster import ASSUMED, GIB, Cluster
from hybrid_engine.footprint import (
    Model,
    activations,
    buckets,
    cache,
    cache_per_token,
    engine_weights,
    gathered,
    logits,
    sharded,
)
from hybrid_engine.forecast import Parts, Work, step_seconds
from hybrid_engine.layout import misfits
from hybrid_engine.residency import Component, Phase, ResidencyError, Schedule, Tier, best_schedule
from rollout.config import RolloutConfig

FOREVER = ("parameters", "optimizer", "reference", "processes")
"""Components whose contents nothing can make again: they lie somewhere at all times."""
PASSING = ("activations", "logits", "gathered", "hand-over buffers", "engine workspace", "reward models")
"""Components that are there in their phases alone."""


@dataclass(frozen=True)
class Prospect:
    """A stage's step in one layout. seconds: phase -> what takes them. parts: side -> its components; the sides share
    every device (`device`), or are `training device` and `rollout device`. schedules: side -> its schedule, once solved."""

    train: TrainConfig
    rollout: RolloutConfig
    seconds: Mapping[str, Parts]
    parts: Mapping[str, tuple[Component, ...]]
    tiers: tuple[Tier, ...]
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    error: ResidencyError | None = None

    @property
    def phases(self) -> list[Phase]:
        """The step's phases, with the seconds of their work."""
        return [Phase(name, sum(parts.values())) for name, parts in self.seconds.items()]

    @property
    def total(self) -> float:
        """Seconds of a step; of what is not solved yet, with a rough figure for the transfers."""
        lost = max(
            (sum(self.schedules[side].lost.values()) if side in self.schedules else self._rough(parts))
            for side, parts in self.parts.items()
        )
        return sum(phase.seconds for phase in self.phases) + lost

    def missing(self) -> tuple[int, str]:
        """(bytes, phase) that a device lacks where it lacks most, or all tiers together; at most 0: it may fit."""
        worst = (-self.tiers[0].capacity, "")
        for parts in self.parts.values():
            kept = sum(part.bytes for part in parts if part.name in FOREVER)
            worst = max(worst, (kept - sum(tier.capacity for tier in self.tiers), "all phases"))
            for phase in self.seconds:
                needed = sum(_least(part, phase) for part in parts if phase in part.needed_in)
                worst = max(worst, (needed - self.tiers[0].capacity, phase))
        return worst

    def short(self) -> int:
        """Bytes that the tier lacks to which least must be added; 0 where the layout fits."""
        error = self.solved().error
        return 0 if error is None else error.missing

    def resident(self, side: str) -> dict[str, int]:
        """Phase -> bytes on the device where nothing is moved: what outlives its phase stays."""
        parts = self.parts[side]
        return {
            phase: sum(part.bytes for part in parts if part.name not in PASSING or phase in part.needed_in)
            for phase in self.seconds
        }

    def _rough(self, parts: tuple[Component, ...]) -> float:
        most = max(
            sum(p.bytes for p in parts if p.name in FOREVER or phase in p.needed_in) for phase in self.seconds
        )  # fmt: skip
        return 2 * max(0, most - self.tiers[0].capacity) / self.tiers[1].up

    def solved(self) -> Prospect:
        """With its schedules, or with the error that says why there is none."""
        try:
            found = {side: best_schedule(parts, self.phases, self.tiers) for side, parts in self.parts.items()}
        except ResidencyError as error:
            return replace(self, error=error)
        return replace(self, schedules=found)


def _least(part: Component, phase: str) -> int:
    return 2 * part.piece if phase in part.streamed_in and part.pieces > 1 else part.bytes


def prospect(model: Model, train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, work: Work) -> Prospect:
    """What a layout needs and how long it takes; `solved` decides what lies where."""
    room = cache(model, rollout, cluster) if work.samples else 0
    balanced = bool(train.balance) and model.experts > 0
    seconds = step_seconds(model, train, rollout, cluster, work, room, balanced)
    # On the CPU one device is the memory of all ranks.
    many = (train.world, rollout.world * rollout.replicas) if cluster.on_cpu else (1, 1)
    training = tuple(_training(model, train, cluster, work, seconds, many[0]))
    sampling = tuple(_sampling(model, rollout, cluster, work, room, many[1])) if work.samples else ()
    always = frozenset(seconds)
    processes = Component("processes", _processes(cluster, *many), always, always)
    parts = {"device": (processes, *training, *sampling)}
    if rollout.placement == "split" and sampling:
        parts = {"training device": (processes, *training), "rollout device": (processes, *sampling)}
    return Prospect(train, rollout, seconds, parts, _tiers(cluster))


def _processes(cluster: Cluster, training: int, engines: int) -> int:
    if not cluster.on_cpu:
        return int(ASSUMED["communicators"] * GIB)
    idle = ASSUMED["cpu_driver"] + training * ASSUMED["cpu_training"] + engines * ASSUMED["cpu_engine"]
    return int(idle * GIB)


def _tiers(cluster: Cluster) -> tuple[Tier, ...]:
    speed = cluster.host_link * ASSUMED["links"]
    if cluster.on_cpu:
        return Tier("device", cluster.memory), Tier("disk", 1 << 44, cluster.disk, cluster.disk)
    free = cluster.host_memory - int(ASSUMED["host_reserved"] * GIB)
    return Tier("device", cluster.memory), Tier("host", max(0, free) // cluster.devices, speed, speed)


def _training(
    model: Model, train: TrainConfig, cluster: Cluster, work: Work, phases: Mapping[str, Parts], many: int
) -> Iterator[Component]:
    def part(name: str, size: float, needed: str, changed: str = "", again: bool = False, pieces: int = 1) -> Component:
        needs, changes = (frozenset(word for word in text.split() if word in phases) for text in (needed, changed))
        streamed = frozenset({"step"} if name == "optimizer" else ())
        return Component(name, int(size), needs, changes, dict.fromkeys(needs if again else (), 0.0), pieces, streamed)

    device, own, groups = "cpu" if cluster.on_cpu else "cuda", 4 * many * sharded(model, train), len(model.groups)
    tokens = min(work.rank_tokens(train), train.tokens_per_rank)
    spoken = ceil(tokens * work.new / (work.prompt + work.new))
    if work.trains:
        yield part("parameters", own, "hand-over train step", "step", pieces=groups)
        yield replace(part("gradients", own, "train step", "train"), remake={"train": 0.0})
        yield part("optimizer", 2 * own, "step", "step", pieces=groups)
        saved = many * activations(model, train, tokens, work.length, device)
        yield part("activations", saved, "train", "train", True)
    else:
        yield part("parameters", own, "hand-over", pieces=groups)
    if work.reference:
        yield part("reference", own, "reference", pieces=groups)
    if work.trains and not work.scores:
        yield part("logits", many * logits(model, train, spoken), "reference train", "reference train", True)
    if work.trains and (full := many * gathered(model, train, work.micro_batches(train))):
        yield part("gathered", full, "reference train", "reference train", True)
    if work.judges:
        seconds, share = sum(work.judges) / cluster.disk, 1 if cluster.on_cpu else cluster.devices
        yield replace(part("reward models", sum(work.judges) / share, "score"), remake={"score": seconds})


def _sampling(
    model: Model, rollout: RolloutConfig, cluster: Cluster, work: Work, room: int, many: int
) -> Iterator[Component]:
    def part(name: str, size: int, needed: tuple[str, ...], changed: str) -> Component:
        return Component(name, many * size, frozenset(needed), frozenset({changed}), {changed: 0.0})

    least = cache_per_token(model, rollout, "cpu" if cluster.on_cpu else "cuda") * work.length
    yield part("rollout weights", engine_weights(model, rollout), ("hand-over", "generate"), "hand-over")
    yield part("KV cache", max(room, least), ("generate",), "generate")
    yield part("hand-over buffers", buckets(model, rollout), ("hand-over",), "hand-over")
    if not cluster.on_cpu:
        yield part("engine workspace", int(ASSUMED["engine_workspace"] * GIB), ("generate",), "generate")


# -- the best layouts -------------------------------------------------------------------------------------------------


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length()) if 1 << n <= most]


def _train_layouts(train: TrainConfig, ranks: int) -> Iterator[TrainConfig]:
    for replicas, expert, saves in product(_powers(ranks), _powers(ranks), (False, True)):
        shard = ranks // replicas
        if replicas * shard == ranks and ranks % expert == 0 and (shard % expert == 0 or expert % shard == 0):
            new = {"replicate": replicas, "shard": shard, "expert": expert, "activation_checkpointing": saves}
            yield train.model_copy(update=new)


def _rollout_layouts(rollout: RolloutConfig, ranks: int) -> Iterator[RolloutConfig]:
    for tensor, data, expert in product(_powers(min(ranks, 16)), _powers(min(ranks, 16)), (False, True)):
        if ranks % (tensor * data) == 0 and (expert or data == 1) and not (expert and tensor * data == 1):
            new = {"tensor": tensor, "data": data, "expert": expert, "replicas": ranks // (tensor * data)}
            yield rollout.model_copy(update=new)


def ranked(
    model: Model, train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, work: Work, count: int = 3
) -> list[Prospect]:
    """The `count` fastest layouts of those that fit, solved. Every device takes part; all other settings are as given."""
    alone = replace(work, samples=False, judges=())
    trains = [
        prospect(model, each, rollout, cluster, alone)
        for each in _train_layouts(train, cluster.ranks)
        if not any(section == "train" for section, *_ in misfits(each, rollout, model.values))
    ]
    alone = replace(work, trains=False, reference=False, judges=())
    samples = [
        prospect(model, train, each, cluster, alone)
        for each in _rollout_layouts(rollout, cluster.ranks)
        if work.samples and not any(section == "rollout" for section, *_ in misfits(train, each, model.values))
    ]
    both = [
        prospect(model, one.train, two, cluster, work)
        for one in _quickest(trains)
        for two in ([each.rollout for each in _quickest(samples)] or [rollout])
    ]
    found: list[Prospect] = []
    for each in sorted((each for each in both if each.missing()[0] <= 0), key=lambda each: each.total)[: 3 * count]:
        if len(found) < count and (solved := each.solved()).error is None:
            found.append(solved)
    return sorted(found, key=lambda each: each.total)


def _quickest(layouts: list[Prospect], count: int = 6) -> list[Prospect]:
    return sorted((each for each in layouts if each.missing()[0] <= 0), key=lambda each: each.total)[:count]


def best(
    model: Model, train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, work: Work
) -> tuple[TrainConfig, RolloutConfig]:
    """What `train: auto` and `rollout: auto` stand for. Raises ValueError where no layout fits."""
    found = ranked(model, train, rollout, cluster, work, 1)
    if not found:
        raise ValueError(f"no layout over {cluster.ranks} ranks fits: `align plan` says what would have to change")
    return found[0].train, found[0].rollout


def remedies(model: Model, given: Prospect, cluster: Cluster, work: Work) -> list[tuple[str, int]]:
    """(a change of settings, bytes still missing after it, 0 where it fits), the best first."""
    asked = {"train": given.train, "rollout": given.rollout, "cluster": cluster, "work": work}
    found = []
    for text, change in _changes(given.train, given.rollout, cluster, work):
        what = asked | change
        if not any(misfits(what["train"], what["rollout"], model.values)):
            found.append((text, prospect(model, **what).short()))
    return sorted(found, key=lambda pair: pair[1])


def _changes(
    train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, work: Work
) -> Iterator[tuple[str, dict[str, Any]]]:
    fewer = max(work.length, train.tokens_per_rank // 2)
    for name, value in (("activation_checkpointing", True), ("dtype", "bfloat16"), ("tokens_per_rank", fewer)):
        yield f"train.{name}: {str(value).lower()}", {"train": train.model_copy(update={name: value})}
    for expert in _powers(train.world):
        if train.shard % expert == 0 or expert % train.shard == 0:
            yield f"train.expert: {expert}", {"train": train.model_copy(update={"expert": expert})}
    if work.reference:
        yield "kl: 0", {"work": replace(work, reference=False)}
    for name, value in (("dtype", "bfloat16"), ("memory", rollout.memory / 2)) if work.samples else ():
        yield f"rollout.{name}: {value}", {"rollout": rollout.model_copy(update={name: value})}
    if work.samples and rollout.replicas % 2 == 0:
        new = {"tensor": 2 * rollout.tensor, "replicas": rollout.replicas // 2}
        text = ", ".join(f"rollout.{name}: {value}" for name, value in new.items())
        yield text, {"rollout": rollout.model_copy(update=new)}
    if not cluster.on_cpu:
        wider = {"train": train.model_copy(update={"shard": 2 * train.shard})}
        wider["rollout"] = rollout.model_copy(update={"replicas": 2 * rollout.replicas})
        wider["cluster"] = replace(cluster, hosts=2 * cluster.hosts, ranks=2 * cluster.ranks)
        yield f"{2 * cluster.hosts} hosts, train.shard: {2 * train.shard}", wider
