"""Token dropping (DeepSeek-V2, section 2.1.3): in training a device computes at most its share of a forward pass.

A slot is one of a token's K experts. Above its capacity a device drops the slots of the lowest affinity: they are
routed and counted as before, and weigh nothing. Sequences that are exempt, a tenth of them, always the same, lose none.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch

EXEMPT = 0.1
"""Share of sequences that lose no token: evaluation drops none, and should meet nothing new (the paper's 10%)."""


@dataclass(frozen=True, slots=True)
class Dropping:
    """capacity: most slots of a device, over the mean of all. devices: D, groups of consecutive experts."""

    capacity: float
    devices: int

    def dropped(self, scores_NE: torch.Tensor, ids_NK: torch.Tensor, exempt_N: torch.Tensor) -> torch.Tensor:
        """[N, K] bool: the slots of a layer that are dropped, by affinities and experts of a forward's tokens."""
        device_NK = ids_NK // (scores_NE.shape[1] // self.devices)
        affinities = scores_NE.gather(-1, ids_NK).flatten()
        lost = torch.zeros_like(affinities, dtype=torch.bool)
        for device in range(self.devices):
            here_NK = device_NK == device
            excess = int(here_NK.sum()) - int(self.capacity * ids_NK.numel() / self.devices)
            candidates = (here_NK & ~exempt_N[:, None]).flatten().nonzero()[:, 0]
            lost[candidates[affinities[candidates].argsort(stable=True)[: max(0, excess)]]] = True
        return lost.view_as(ids_NK)


def exempt_nodes(token_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[N] bool of packed trees of `lengths` tokens: whether a node's tree is exempt, by what it says."""
    trees = np.split(token_ids, np.cumsum(lengths)[:-1])
    exempt = [zlib.crc32(np.ascontiguousarray(tree, np.int64)) < EXEMPT * 2**32 for tree in trees]
    return np.repeat(exempt, lengths)
