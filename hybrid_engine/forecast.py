"""How many seconds each phase of a step takes, from FLOPs and bytes moved; `hardware.yaml` holds every assumption."""

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
    row), `rows` sequences each, of `prompt` + `new` tokens; the longest has `longest` new ones. forwards: passes of the
    policy without a backward pass, before the updates. scores: one output instead of logits. judges: bytes of each
    reward model's weights."""

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

    def rank_tokens(self, train: TrainConfig) -> int:
        """Tokens of the rank with the most work in an update: groups are not split over ranks."""
        return ceil(self.groups / self.updates / train.world) * self.rows * (self.prompt + self.new)

    def tree(self, train: TrainConfig) -> int:
        """Nodes of the longest tree, all of which its nodes attend to under a mask: a group's sequences are merged."""
        return max(self.prompt + self.longest, min(train.tokens_per_rank, self.prompt + self.rows * self.longest))


def passes(model: Model, train: TrainConfig, cluster: Cluster, work: Work, forward: int, backward: int) -> Parts:
    """Seconds of an update (or of a mere forward) in which every micro-batch passes the model so often; a backward pass
    computes twice as much. Communication counts where computation does not hide it."""
    tokens, item = work.rank_tokens(train), SIZE[train.dtype]
    heads, _, qk, value = model.heads
    attention = 2 * model.layers * work.tree(train) * heads * (qk + value)
    flops = (2 * model.active[0] + attention) / ASSUMED["dense_compute"]
    flops += 2 * model.active[1] / ASSUMED["expert_compute"]
    speed = cluster.flops[train.dtype] / (train.world if cluster.on_cpu else 1)
    compute = tokens * (forward + 2 * backward) * flops / speed
    often = ceil(tokens / train.tokens_per_rank) if train.activation_checkpointing else 1
    volume = often * (item * forward + 4 * backward)
    layout, routed = expert_layout(train), model.routed if train.expert > 1 else 0
    rest, ranks = model.dense + model.routed - routed, layout.shard * layout.parallel
    moved = cluster.ring(rest * volume, train.shard)
    moved += cluster.ring(8 * backward * often * rest / train.shard, train.replicate, train.shard)
    moved += cluster.ring(routed / train.expert * volume, layout.shard, layout.parallel)
    moved += cluster.ring(8 * backward * often * routed / ranks, layout.replicate, ranks)
    slots = tokens * min(model.chosen, train.expert) * model.moe_layers * (forward + backward)
    sent = 2 * slots * model.values["hidden_size"] * item * (1 - 1 / train.expert)
    link = cluster.link if train.expert <= cluster.devices or cluster.on_cpu else cluster.network
    return {"compute": compute, "gathering": max(0.0, moved - compute), "all-to-all": sent / (link * ASSUMED["links"])}


def generation(model: Model, rollout: RolloutConfig, cluster: Cluster, work: Work, cache: int) -> Parts:
    """Seconds of prefill and of decoding: in waves of as many sequences as an engine takes and its cache holds."""
    lanes, each = rollout.replicas * rollout.data, cache_per_token(model, rollout, cluster.on_cpu)
    sequences = ceil(work.groups / lanes) * work.rows
    at_once = max(1, min(sequences, rollout.max_num_seqs, cache // (each * (work.prompt + work.longest))))
    steps = (ceil(sequences / at_once) - 1) * work.new + work.longest
    batch, item = sequences * work.new / steps, SIZE[rollout.dtype]
    ranks = rollout.world if rollout.expert else rollout.tensor
    seen = batch * rollout.data  # tokens, by the experts of an engine
    hit = 1 - (1 - model.chosen / max(1, model.experts)) ** seen
    read = engine_weights(model, rollout)[0] - model.routed * item / ranks * (1 - hit)
    read += batch * (work.prompt + work.new / 2) * each
    flops = 2 * model.active[0] / rollout.tensor / ASSUMED["dense_compute"]
    flops += 2 * model.active[1] * rollout.data / ranks / ASSUMED["expert_compute"]
    share = rollout.world * rollout.replicas if cluster.on_cpu else 1
    token, wide = flops * share / cluster.flops[rollout.dtype], model.values["hidden_size"] * item
    memory = read * share / (cluster.bandwidth * ASSUMED["bandwidth"])
    reductions = 2 * model.layers * (rollout.tensor > 1)
    exchanges = 2 * model.moe_layers * (rollout.data > 1)
    moved = reductions * cluster.ring(2 * batch * wide, rollout.tensor)
    moved += exchanges * cluster.ring(seen * wide, rollout.world)
    latency = ASSUMED["latency" if ranks <= cluster.devices or cluster.on_cpu else "network_latency"]
    launches = rollout.eager * model.layers * ASSUMED["eager_layer"] * (not cluster.on_cpu)
    return {
        "prefill": ceil(work.groups / lanes) * work.prompt * token,
        "decode": steps * max(memory, batch * token),
        "collectives": steps * (moved + (reductions + exchanges) * latency),
        "engine": steps * (ASSUMED["engine_step"] + launches),
    }


def hand_over(model: Model, rollout: RolloutConfig, cluster: Cluster) -> Parts:
    """Every rank of an engine takes the weights outside the experts, and its share of those or all of them."""
    item, reached = SIZE[rollout.dtype], ASSUMED["links"]
    taken = item * (model.dense + model.routed / (rollout.world if rollout.expert else 1))
    whole = item * (model.dense + model.routed)
    if cluster.on_cpu:
        return {"object store": (whole + rollout.world * rollout.replicas * taken) / ASSUMED["object_store"]}
    if rollout.placement == "split":
        return {"nccl": taken / (cluster.network * reached)}
    found = {"ipc": taken / (cluster.link * reached)}
    if cluster.hosts > 1:
        away = whole * (1 - 1 / cluster.hosts) / ASSUMED["object_store"]
        found["object store"] = away + taken / (cluster.host_link * reached)
    return found


def step_seconds(
    model: Model, train: TrainConfig, rollout: RolloutConfig, cluster: Cluster, work: Work, cache: int
) -> dict[str, Parts]:
    """Phase -> seconds, in the order of a step. cache: bytes of an engine rank's KV cache."""

    def updates(forward: int, backward: int) -> Parts:
        return {k: work.updates * s for k, s in passes(model, train, cluster, work, forward, backward).items()}

    found: dict[str, Parts] = {}
    if work.samples:
        found["handover"] = hand_over(model, rollout, cluster)
        found["generate"] = generation(model, rollout, cluster, work, cache)
    if work.judges:  # they score every sequence in float32, one device of a host after the other
        flops = len(work.judges) * 2 * sum(model.active) * work.groups * work.rows * (work.prompt + work.new)
        found["score"] = {"compute": flops / (cluster.flops["float32"] * ASSUMED["dense_compute"])}
    if work.reference:
        found["reference"] = updates(1, 0)
    if work.trains:
        counted = bool(train.balance) and model.experts > 0  # a forward pass finds the experts' load first
        passed = updates(1 + train.activation_checkpointing + work.forwards + counted, 1)
        moved = 28 * sharded(model, train) * (train.world if cluster.on_cpu else 1)  # AdamW: 4 numbers in, 3 out
        found["train"] = {**passed, "optimizer": work.updates * moved / (cluster.bandwidth * ASSUMED["bandwidth"])}
    return found
