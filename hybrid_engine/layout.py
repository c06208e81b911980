"""Which rank holds what, and which works on what, in training and in rollout: no device is touched."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

from alignment.config import TrainConfig
from rollout.config import RolloutConfig, routed_experts
from rollout.vllm.environment import installed


class ExpertLayout(NamedTuple):
    """How the ranks lie over the routed experts: `parallel` consecutive ranks hold all of them, an equal share each;
    the ranks that hold the same share split every expert's matrices over `shard` of them, and repeat that `replicate`
    times. replicate x shard x parallel is the number of ranks."""

    replicate: int
    shard: int
    parallel: int


def expert_layout(train: TrainConfig) -> ExpertLayout:
    """Experts are replicated only where the ranks of one replica of the dense parameters are too few to hold them."""
    shard = max(1, train.shard // train.expert)
    return ExpertLayout(train.world // (shard * train.expert), shard, train.expert)


@dataclass(frozen=True, slots=True)
class RolloutRank:
    """One rank of one rollout engine. lane: ranks of the same one work on the same requests (tensor parallelism), and
    the first of them answers."""

    name: str
    engine: int
    rank: int
    lane: int
    answers: bool


def rollout_ranks(rollout: RolloutConfig) -> list[RolloutRank]:
    """Every rank of every engine; those of a lane follow each other."""
    places = []
    for engine, rank in product(range(rollout.replicas), range(rollout.world)):
        name = f"rollout engine {engine}" + (f" rank {rank}" if rollout.world > 1 else "")
        lane, place = divmod(rank, rollout.tensor)
        places.append(RolloutRank(name, engine, rank, engine * rollout.data + lane, place == 0))
    return places


def misfits(
    train: TrainConfig, rollout: RolloutConfig, model: Mapping[str, Any], device: str | None = None
) -> Iterator[tuple[str, str, str]]:
    """(section, key, what is wrong) wherever a model, by its configuration's values, cannot be laid over the ranks, or
    not by vLLM on a `device` ("cpu" or any other; None: what the installed one was built for)."""
    experts, kind = routed_experts(model), model["model_type"]
    for section, ranks in (("train", train.expert), ("rollout", rollout.world if rollout.expert else 1)):
        if ranks > 1 and not experts:
            yield section, "expert", f"{kind} has no routed experts to lay over {ranks} ranks"
        elif experts % ranks:
            yield section, "expert", f"{ranks} ranks do not divide the model's {experts} routed experts"
    widths = {name: model[name] for name in ("moe_intermediate_size", "intermediate_size") if model.get(name)}
    shard = expert_layout(train).shard if train.expert > 1 else 1
    for size in (2 * next(iter(widths.values())), model["hidden_size"]) if experts else ():
        if size % shard:
            several = f"`expert` {train.expert} leaves {shard} ranks to split each expert"
            yield "train", "shard", f"{several}, and {shard} does not divide {size}, the size of one of its matrices"
    split = {"num_attention_heads": model["num_attention_heads"]} | widths
    if rollout.expert:
        split.pop("moe_intermediate_size", None)
    for name, size in split.items():
        if size % rollout.tensor:
            yield "rollout", "tensor", f"{rollout.tensor} does not divide the model's {name} ({size})"
    on_cpu = (device or installed().device) == "cpu"
    if model.get("kv_lora_rank") and rollout.dtype == "float32" and not on_cpu:
        yield "rollout", "dtype", "vLLM's MLA kernels for CUDA know no float32; set it to bfloat16"
    if rollout.memory >= 1 and not on_cpu:
        yield "rollout", "memory", "on CUDA it is a share of the device, below 1: 0.3, say, beside training ranks"
    if rollout.tensor > 1 and rollout.data > 1 and on_cpu:
        yield "rollout", "data", "vLLM's MoE layers then split the tokens, too: on the CPU set it or `tensor` to 1"
    heads = model.get("num_key_value_heads") or model["num_attention_heads"]
    if max(heads, rollout.tensor) % min(heads, rollout.tensor):
        yield "rollout", "tensor", f"of {rollout.tensor} and {heads} key-value heads one must divide the other"
