"""Which training rank holds what: data parallel over all ranks, expert parallel over the same ones. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

from alignment.config import TrainConfig


@dataclass(frozen=True, slots=True)
class ExpertLayout:
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
