"""Balance of a MoE's load: DeepSeek-V2's three losses (eq. 23-31) and its token dropping (section 2.2.4), and what the
load looks like.

Each loss is a sum over experts of (how much they are chosen) x (their mean affinity), and the affinity alone has a
gradient. So all three together are one weight per expert, made of counts over the whole batch, times its mean affinity
over the whole batch: micro-batches and ranks add up.

Letters: L layers, E routed experts, D devices (groups of E / D experts), T tokens of the batch, K experts of a token.
"""

import zlib
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

EXEMPT = 0.1
"""Share of sequences that lose no token: evaluation drops none, and should meet nothing new (the paper's 10%)."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a batch was routed. chosen: [L, E] tokens that chose each expert. sent: [L, D] tokens with an expert on each
    device. tokens: T. All float64, and they add up over micro-batches and ranks."""

    chosen: torch.Tensor
    sent: torch.Tensor
    tokens: torch.Tensor

    def __add__(self, other: Self) -> Self:
        return Load(self.chosen + other.chosen, self.sent + other.sent, self.tokens + other.tokens)

    def metrics(self) -> dict[str, Any]:
        """`experts/load`: [L, E] each expert's load in percent of its layer's mean; `experts/max_load`: the most loaded
        expert of any layer over the mean; `experts/entropy`: of the load, over its maximum, mean over layers;
        `experts/dead`: share of experts that no token chose."""
        share_LE = self.chosen / self.chosen.sum(-1, keepdim=True).clamp(min=1)
        entropy_L = torch.special.entr(share_LE).sum(-1)
        experts = share_LE.shape[-1]
        return {
            "experts/load": (100 * experts * share_LE).round().int().tolist(),
            "experts/max_load": float(share_LE.max() * experts),
            "experts/entropy": float(entropy_L.mean() / torch.tensor(float(experts)).log()),
            "experts/dead": float((self.chosen == 0).double().mean()),
        }


def balance_weights(
    load: Load, *, devices: int, limit: int, expert: float = 0.0, device: float = 0.0, communication: float = 0.0
) -> torch.Tensor:
    """[L, E] float64: the losses are the sum of these times the mean affinities P_i of the same tokens.

    devices: D. limit: M, the most devices of a token. expert, device, communication: alpha_1, alpha_2, alpha_3.
    """
    layers, experts = load.chosen.shape
    f = load.chosen * experts / load.chosen.sum(-1, keepdim=True)  # eq. 24; the sum is K_r T
    per_device = device * f.view(layers, devices, -1).mean(-1)  # eq. 27
    per_device = per_device + communication * devices / (limit * load.tokens) * load.sent  # eq. 30
    return expert * f + per_device.repeat_interleave(experts // devices, -1)


def count(
    ids_NK: torch.Tensor, copies_N: torch.Tensor, experts: int, devices: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's chosen [E] and sent [D] of N nodes, each standing for `copies_N` tokens."""
    chosen = copies_N.new_zeros(experts).index_add_(0, ids_NK.reshape(-1), copies_N.repeat_interleave(ids_NK.shape[1]))
    there_ND = torch.zeros(len(ids_NK), devices, dtype=torch.bool, device=ids_NK.device)
    there_ND.scatter_(1, ids_NK // (experts // devices), True)
    return chosen, copies_N @ there_ND.to(copies_N.dtype)


def dropped(
    scores_NE: torch.Tensor, ids_NK: torch.Tensor, exempt_N: torch.Tensor, capacity: float, devices: int
) -> torch.Tensor:
    """[N, K] bool: the slots of a layer that are dropped, by affinities and experts of a forward's tokens.

    A slot is one of a token's K experts. A device with more than `capacity` times the mean of all drops those of the
    lowest affinity: they are routed and counted as before, and weigh nothing. Exempt tokens lose none.
    """
    device_NK = ids_NK // (scores_NE.shape[1] // devices)
    affinities = scores_NE.gather(-1, ids_NK).flatten()
    lost = torch.zeros_like(affinities, dtype=torch.bool)
    for device in range(devices):
        here_NK = device_NK == device
        excess = int(here_NK.sum()) - int(capacity * ids_NK.numel() / devices)
        candidates = (here_NK & ~exempt_N[:, None]).flatten().nonzero()[:, 0]
        lost[candidates[affinities[candidates].argsort(stable=True)[: max(0, excess)]]] = True
    return lost.view_as(ids_NK)


def exempt_nodes(token_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[N] bool of packed trees of `lengths` tokens: whether a node's tree is exempt, by what it says."""
    trees = np.split(token_ids, np.cumsum(lengths)[:-1])
    exempt = [zlib.crc32(np.ascontiguousarray(tree, np.int64)) < EXEMPT * 2**32 for tree in trees]
    return np.repeat(exempt, lengths)
