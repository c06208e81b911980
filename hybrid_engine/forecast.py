"""How many seconds each phase of a step takes, from FLOPs and bytes moved; `hardware.yaml` holds every assumption."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from alignment.config import TrainConfig
from hybrid_engine.cluster import ASSUMED, Cluster
from hybrid_engine.footprint import SIZE, Model, cache_per_token, engine_weights, sharded
from hybrid_engine.layout import expert_layout
from rollout.config import RolloutConfig

Parts = Mapping[str, float]
"""Seconds by what takes them; they add up to the phase."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one step of a stage computes. groups: rows that go to one rank together (a prompt's completions, a pair, a
    row); each of `rows` sequences of `prompt` + `new` tokens, of which the longest has `longest` new ones. forwards:
    passes of the policy without a backward pass, before the updates. scores: one output instead of logits. judges:
    bytes of each reward model's weights."""

    groups: int
    rows: int
    prompt: int
    new: int
    longest: int
    updates: int = 1
    forwards: int = 0
    samples: bool = False
    trains: bool = True
    reference: bool = False
    scores: bool = False
    judges: tuple[int, ...] = ()

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.prompt + self.longest

    def rank_tokens(self, train: TrainConfig) -> int:
        """Tokens of the rank with the most work in an update: groups are not split over ranks."""
        return ceil(self.groups / self.updates / train.world) * self.rows * (self.prompt + self.new)

    def micro_batches(self, train: TrainConfig) -> int:
        """Micro-batches of a rank in an update."""
        return ceil(self.rank_tokens(train) / train.tokens_per_rank)


def passes(
    model: Model, train: TrainConfig, cluster: Cluster, work: Work, *, forward: int, backward: int
) -> dict[str, float]:
    """Seconds of an update's (or of a mere forward's) computation and of what communication it does not hide.

    forward, backward: how often each micro-batch passes the model so; a backward pass computes twice as much.
    """
    tokens, batches = work.rank_tokens(train), work.micro_batches(train)
    share, peak, item = train.world if cluster.on_cpu else 1, cluster.flops[train.dtype], SIZE[train.dtype]
    heads, _, qk, value = model.heads
    dense, chosen = model.active
    attention = model.layers * work.length * heads * (qk + value)  # 2 FLOPs x half of the length, causal
    flops = (2 * dense + attention) / ASSUMED["dense_compute"] + 2 * chosen / ASSUMED["expert_compute"]
    compute = tokens * (forward + 2 * backward) * flops * share / peak
    if train.world == 1:
        return {"compute": compute}
    often = batches if train.activation_checkpointing else 1
    gathers, reductions = (often * (1 + (train.activation_checkpointing and backward)), often * backward)
    volume = item * gathers + 4 * reductions
    layout, routed = expert_layout(train), model.numel(expert=True) if train.expert > 1 else 0
    rest = model.numel() - routed
    moved = _ring(cluster, rest * volume, train.shard, 1)
    moved += _ring(cluster, 8 * backward * often * rest / train.shard, train.replicate, train.shard)
    moved += _ring(cluster, routed / train.expert * volume, layout.shard, layout.parallel)
    held = routed / (layout.shard * layout.parallel)
    moved += _ring(cluster, 8 * backward * often * held, layout.replicate, layout.shard * layout.parallel)
    found = {"compute": compute, "gathering": max(0.0, moved - compute)}
    if train.expert > 1:
        slots = tokens * min(model.chosen, train.expert) * model.moe_layers * (forward + backward)
        sent = 2 * slots * model.values["hidden_size"] * item * (1 - 1 / train.expert)
        speed = cluster.link if train.expert <= cluster.devices else cluster.network
        found["all-to-all"] = sent / (speed * ASSUMED["links"])
    return found


def _ring(cluster: Cluster, volume: float, ranks: int, stride: int) -> float:
    return volume * (1 - 1 / ranks) / cluster.collective(ranks, stride)


def optimizer_step(model: Model, train: TrainConfig, cluster: Cluster) -> Parts:
    """AdamW reads four float32 numbers a parameter and writes three."""
    share = train.world if cluster.on_cpu else 1
    return {"memory": 28 * sharded(model, train) * share / (cluster.bandwidth * ASSUMED["bandwidth"])}


def generation(model: Model, rollout: RolloutConfig, cluster: Cluster, work: Work, cache: int) -> Parts:
    """Seconds of prefill and of decoding: in waves of as many sequences as an engine takes and its cache holds."""
    lanes = rollout.replicas * rollout.data
    sequences = ceil(work.groups / lanes) * work.rows
    room = cache // (cache_per_token(model, rollout, "cpu" if cluster.on_cpu else "cuda") * work.length)
    at_once = max(1, min(sequences, rollout.max_num_seqs, room))
    steps = (ceil(sequences / at_once) - 1) * work.new + work.longest
    batch = sequences * work.new / steps
    share = rollout.world * rollout.replicas if cluster.on_cpu else 1
    item, hidden, peak = SIZE[rollout.dtype], model.values["hidden_size"], cluster.flops[rollout.dtype]
    ranks = rollout.world if rollout.expert else rollout.tensor
    tokens = batch * rollout.data  # that the experts of an engine see
    routed = model.numel(expert=True) * item / ranks
    hit = 1 - (1 - model.chosen / max(1, model.experts)) ** tokens
    read = engine_weights(model, rollout) - routed * (1 - hit)
    read += batch * (work.prompt + work.new / 2) * cache_per_token(model, rollout, "cpu" if cluster.on_cpu else "cuda")
    dense, chosen = model.active
    flops = 2 * dense / rollout.tensor / ASSUMED["dense_compute"]
    flops += 2 * chosen * rollout.data / ranks / ASSUMED["expert_compute"]
    memory = read * share / (cluster.bandwidth * ASSUMED["bandwidth"])
    ways, moved = 2 * model.layers * (rollout.tensor > 1), 0.0
    if rollout.tensor > 1:
        moved += _ring(cluster, 2 * batch * hidden * item * ways, rollout.tensor, 1) + ways * ASSUMED["latency"]
    if rollout.data > 1:
        moved += 2 * model.moe_layers * (ASSUMED["latency"] + _ring(cluster, tokens * hidden * item, rollout.world, 1))
    engine = ASSUMED["engine_step"] + rollout.eager * model.layers * ASSUMED["eager_layer"] * (not cluster.on_cpu)
    return {
        "prefill": ceil(work.groups / lanes) * work.prompt * flops * share / peak,
        "decode": steps * max(memory, batch * flops * share / peak),
        "collectives": steps * moved,
        "engine": steps * engine,
    }


def hand_over(model: Model, rollout: RolloutConfig, cluster: Cluster) -> Parts:
    """Every rank of an engine takes the weights outside the experts, and its share of those or all of them."""
    item, ranks = SIZE[rollout.dtype], rollout.world * rollout.replicas
    taken = item * (model.numel(expert=False) + model.numel(expert=True) / (rollout.world if rollout.expert else 1))
    if cluster.on_cpu:
        return {"object store": (item * model.numel() + ranks * taken) / ASSUMED["object_store"]}
    if rollout.placement == "split":
        return {"nccl": taken / (cluster.network * ASSUMED["links"])}
    found = {"ipc": taken / (cluster.link * ASSUMED["links"])}
    if cluster.hosts > 1:
        away = item * model.numel() * (1 - 1 / cluster.hosts)
        found["object store"] = away / ASSUMED["object_store"] + taken / (cluster.host_link * ASSUMED["links"])
    return found


def scoring(cluster: Cluster, work: Work) -> Parts:
    """Reward models score every sequence, one device of a host after the other; reward functions take no device."""
    tokens, flops = work.groups * work.rows * (work.prompt + work.new), cluster.flops["float32"]
    return {"compute": sum(2 * size / 4 * tokens for size in work.judges) / (flops * ASSUMED["dense_compute"])}


def step_seconds(
    model: Model, train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, work: Work, cache: int, balanced: bool
) -> dict[str, Parts]:
    """Phase -> seconds, in the order of a step. balanced: a forward pass counts the experts' load before an update."""
    found: dict[str, Parts] = {}
    if work.samples:
        found["hand-over"] = hand_over(model, rollout, cluster)
        found["generate"] = generation(model, rollout, cluster, work, cache)
    if work.judges:
        found["score"] = scoring(cluster, work)
    if work.reference:
        one = passes(model, train, cluster, work, forward=1, backward=0)
        found["reference"] = {name: work.updates * seconds for name, seconds in one.items()}
    if work.trains:
        forward = 1 + train.activation_checkpointing + work.forwards + balanced
        one = passes(model, train, cluster, work, forward=forward, backward=1)
        found["train"] = {name: work.updates * seconds for name, seconds in one.items()}
        step = optimizer_step(model, train, cluster)
        found["step"] = {name: work.updates * seconds for name, seconds in step.items()}
    return found
