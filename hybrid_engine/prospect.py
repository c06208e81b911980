"""A layout's prospects: what lies where in each phase of a step, how long it takes, which layouts do better, and what
to change where nothing fits."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import ceil, prod
from typing import Self

from alignment.config import TrainConfig
from hybrid_engine.cluster import ASSUMED, GIB, Cluster
from hybrid_engine.footprint import Model, activations, cache_per_token, engine_weights, gathered, logits, sharded
from hybrid_engine.forecast import Parts, Work, step_seconds
from hybrid_engine.layout import misfits
from hybrid_engine.phases import NEEDED, component
from hybrid_engine.residency import Component, ResidencyError, Schedule, Tier, best_schedule
from rollout.config import RolloutConfig

HEAP = 2**25
"""Bytes of a block from which on glibc does not take it from its heap, at most."""
STAYING = ("processes", *NEEDED)
"""What stays on the device where nothing is moved; all else is there in its phases alone."""


@dataclass(frozen=True)
class Prospect:
    """A stage's step of `updates` in one layout. seconds: phase -> what takes them. parts: side -> its components; the
    sides share every device (`device`), or are `training device` and `rollout device`. Once solved: each side's
    schedule, or the error that says why there is none."""

    train: TrainConfig
    rollout: RolloutConfig
    updates: int
    seconds: Mapping[str, Parts]
    parts: Mapping[str, tuple[Component, ...]]
    tiers: tuple[Tier, ...]
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    error: ResidencyError | None = None

    @property
    def total(self) -> float:
        """Seconds of a step, with those that transfers cost once it is solved."""
        lost = sum(sum(schedule.lost.values()) for schedule in self.schedules.values())
        return sum(sum(parts.values()) for parts in self.seconds.values()) + lost

    def may_fit(self) -> bool:
        """False where it is plain that it does not."""
        room, whole = self.tiers[0].capacity, sum(tier.capacity for tier in self.tiers)
        for parts in self.parts.values():
            needs = [[part for part in parts if phase in part.needed_in] for phase in self.seconds]
            most = max(sum(2 * p.piece if p.streamed_in else p.bytes for p in phase) for phase in needs)
            if most > room or sum(part.bytes for part in parts if part.copied) > whole:
                return False
        return True

    @property
    def over(self) -> int:
        """Bytes that a device lacks where nothing is moved."""
        return max(0, max(max(self.resident(side).values()) for side in self.parts) - self.tiers[0].capacity)

    @property
    def order(self) -> tuple[bool, float]:
        """For sorting: first what fits where nothing is moved, of such first what is faster."""
        return self.over > 0, self.total

    def resident(self, side: str) -> dict[str, int]:
        """Phase -> bytes on the device where nothing is moved."""
        return {
            phase: sum(p.bytes for p in self.parts[side] if p.name in STAYING or phase in p.needed_in)
            for phase in self.seconds
        }

    def solved(self) -> Self:
        """With its schedules, or with the error that says why there is none."""
        phases = {name: sum(parts.values()) for name, parts in self.seconds.items()}
        try:
            found = {side: best_schedule(parts, phases, self.tiers) for side, parts in self.parts.items()}
        except ResidencyError as error:
            return replace(self, error=error)
        seconds = dict(self.seconds)
        if streamed := [move for schedule in found.values() for move in schedule.moves if move.streamed]:
            # In every update, and beside the optimiser alone: the scheduler lets the whole phase hide it.
            link = {tier.name: 1 / tier.up + 1 / tier.down for tier in self.tiers}
            late = self.updates * sum(move.bytes * link[move.source] for move in streamed)
            late -= seconds["train"]["optimizer"] + sum(schedule.lost["train"] for schedule in found.values())
            seconds["train"] = {**seconds["train"], "streaming": max(0.0, late)}
        return replace(self, seconds=seconds, schedules=found)


def prospect(model: Model, train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, work: Work) -> Prospect:
    """What a layout needs and how long it takes; `solved` decides what lies where."""
    on_cpu, (weights, incomplete) = cluster.on_cpu, engine_weights(model, rollout)
    workspace = 0 if on_cpu else int(ASSUMED["engine_workspace"] * GIB)
    cache = int(rollout.memory * (GIB if on_cpu else cluster.memory)) - (0 if on_cpu else weights + workspace)
    seconds = step_seconds(model, train, rollout, cluster, work, max(0, cache))
    cache = max(cache, cache_per_token(model, rollout, on_cpu) * (work.prompt + work.longest))
    ranks, engines = (train.world, rollout.world * rollout.replicas) if on_cpu else (1, 1)
    own, tokens = 4 * sharded(model, train), min(work.rank_tokens(train), train.tokens_per_rank)
    spoken = 0 if work.scores else ceil(tokens * work.new / (work.prompt + work.new))
    saved = activations(model, train, tokens, work.tree(train), on_cpu)
    full = gathered(model, train, ceil(work.rank_tokens(train) / train.tokens_per_rank))
    judges = sum(work.judges) // (1 if on_cpu else cluster.devices)

    processes = int(ASSUMED["communicators"] * GIB)
    training = [
        component("parameters", ranks * own, model.pieces),
        component("gradients", ranks * own),
        component("optimizer", 2 * ranks * own, model.pieces),
        component("reference", ranks * own, model.pieces),
        component("activations", ranks * saved, 1, ["train"], 0.0),
        component("logits", ranks * logits(model, train, spoken), 1, ["reference", "train"], 0.0),
        component("gathered", ranks * full, 1, ["reference", "train"], 0.0),
        component("reward models", judges, 1, ["score"], sum(work.judges) / cluster.disk),
    ]
    if on_cpu:  # Ray's store keeps the pages of a hand-over's weights
        idle = ASSUMED["cpu_driver"] + ranks * ASSUMED["cpu_training"] + engines * ASSUMED["cpu_engine"]
        small = sharded(model, train, HEAP / 4) / sharded(model, train)
        shares = {"activations": 1.0, "logits": 0.0}  # these are large blocks, or few bytes
        heap = [(p.bytes, shares.get(p.name, small)) for p in training[:-1] if p.needed_in & seconds.keys()]
        holes = 0.0 if cluster.moves else ASSUMED["cpu_holes"] * sum(map(prod, heap))  # a move gives them back
        processes = int(idle * GIB + holes) + rollout.world * weights
    sampling = [
        component("weights", engines * weights),
        component("KV cache", engines * cache),
        component("buffers", engines * (3 * rollout.bucket_mb * 2**20 + incomplete), 1, ["handover"], 0.0),
        component("engine workspace", workspace, 1, ["generate"], 0.0),
    ]
    phases = frozenset(seconds)

    def held(part: Component) -> Component:
        stays, part = not cluster.moves and part.name in STAYING, part.within(phases)
        return replace(part, needed_in=phases, streamed_in=frozenset()) if stays else part

    sides = {"device": training + sampling}
    if rollout.placement == "split":
        sides = {"training device": training, "rollout device": sampling}
    parts = {
        side: (
            component("processes", processes, 1, phases),
            *(held(part) for part in found if part.bytes and (part.needed_in & phases or part in sampling[:2])),
        )
        for side, found in sides.items()
    }
    return Prospect(train, rollout, work.updates, seconds, parts, cluster.tiers)


def ranked(
    model: Model, train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, works: Sequence[Work],
    free: Collection[str] = ("train", "rollout"),
) -> list[Prospect]:  # fmt: skip
    """The best layouts for the first of `works` that fit all of them, solved: over all ranks (if `split`, half a side;
    on the CPU, where ranks share the cores, also over fewer). What is not `free` is as given."""
    ranks = cluster.ranks // (2 if rollout.placement == "split" else 1)
    powers = [1 << n for n in range(ranks.bit_length()) if ranks % (1 << n) == 0]
    worlds, trains, rollouts = powers if cluster.on_cpu else [ranks], [train], [rollout]
    if "train" in free:
        trains = [
            train.model_copy(update={"replicate": n, "shard": w // n, "expert": e, "activation_checkpointing": saves})
            for w, n, e, saves in product(worlds, powers, powers, (False, True))
            if w % n == 0 == w % e and max(w // n, e) % min(w // n, e) == 0
        ]
    if "rollout" in free:
        rollouts = [
            rollout.model_copy(update={"tensor": t, "data": d, "expert": e, "replicas": w // (t * d)})
            for w, t, d, e in product(worlds, powers[:5], powers[:5], (False, True))
            if w % (t * d) == 0 and (t * d > 1 if e else d == 1)
        ]
    fit = (pair for pair in product(trains, rollouts) if not any(misfits(*pair, model.values, cluster.kind)))
    found = [each for pair in fit if (each := prospect(model, *pair, cluster, works[0])).may_fit()]
    best = [each.solved() for each in sorted(found, key=lambda each: each.order)[:6]]
    for work in works[1:]:
        best = [each for each in best if not prospect(model, each.train, each.rollout, cluster, work).solved().error]
    return sorted((each for each in best if not each.error), key=lambda each: each.order)


def remedies(model: Model, given: Prospect, cluster: Cluster, work: Work) -> list[tuple[str, int]]:
    """(a setting, bytes that are missing with it, 0 where it fits), the best first."""
    train, rollout, found = given.train, given.rollout, []
    tries = [
        *[("memory", "{offload: auto}")] * (not cluster.moves and rollout.placement == "colocated"),
        ("train.activation_checkpointing", True),
        ("train.dtype", "bfloat16"),
        ("train.tokens_per_rank", max(work.prompt + work.longest, train.tokens_per_rank // 2)),
        *(("train.expert", ranks) for ranks in (2, 4, 8, 16, 32)),
        ("train.shard", 2 * train.shard),
        ("rollout.dtype", "bfloat16"),
        ("rollout.memory", rollout.memory / 2),
        ("rollout.tensor", 2 * rollout.tensor),
        ("grpo.kl", 0),
    ]
    for key, value in tries:
        section, _, name = key.partition(".")
        one = train.model_copy(update={name: value}) if section == "train" else train
        two = rollout.model_copy(update={name: value}) if section == "rollout" else rollout
        if one.world % one.expert == 0 and not any(misfits(one, two, model.values, cluster.kind)):
            less = replace(work, reference=work.reference and section != "grpo")
            machines = cluster.budgeted(None, None, disk=False) if section == "memory" else cluster
            error = prospect(model, one, two, machines, less).solved().error
            wide = f", on {one.world} devices" if one.world > cluster.ranks else ""
            found.append((f"{key}: {str(value).lower()}{wide}", error.missing if error else 0))
    return sorted(found, key=lambda pair: pair[1])
