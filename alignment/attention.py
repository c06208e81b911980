"""Attention over packed token trees, registered with Transformers under `TREE_ATTENTION`.

Everything but attention runs on a flat row of N nodes without padding; attention alone gathers the nodes of R trees
into [R, S], S the longest tree of the micro-batch, under the mask `j <= i < end[j]` (see `alignment.tree`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

TREE_ATTENTION = "token_tree"


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """gather: [R, S] node of each slot (padding repeats node 0). scatter: [N] slot of each node.
    mask: [R, 1, S, S] bool, True where the row's slot attends to the column's."""

    gather: torch.Tensor
    scatter: torch.Tensor
    mask: torch.Tensor


def tree_layout(lengths: np.ndarray, ends: np.ndarray, device: torch.device) -> TreeLayout:
    """Layout of a micro-batch with tree sizes `lengths` [R] and subtree ends `ends` [N]."""
    longest = int(lengths.max())
    starts = np.cumsum(lengths) - lengths
    slot = np.arange(longest)
    real = slot[None, :] < lengths[:, None]
    gather = np.where(real, starts[:, None] + slot[None, :], 0)
    scatter = np.flatnonzero(real.reshape(-1))
    # A padded slot's "subtree" covers itself alone, so that no softmax row is empty.
    local_ends = np.where(real, ends[gather] - starts[:, None], slot[None, :] + 1)
    column = torch.from_numpy(local_ends).to(device)[:, None, :]
    row = torch.arange(longest, device=device)[None, :, None]
    mask = (row >= row.transpose(1, 2)) & (row < column)
    return TreeLayout(torch.from_numpy(gather).to(device), torch.from_numpy(scatter).to(device), mask[:, None])


def tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    tree: TreeLayout,
    scaling: float,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Transformers' attention interface: query, key, value [1, heads, N, dim] -> output [1, N, heads, dim].

    Raises ValueError for what a plain softmax over the tree would compute wrongly: attention sinks, soft caps and
    sliding windows shorter than the longest tree.
    """
    if sliding_window is not None and sliding_window < tree.gather.shape[1]:
        raise ValueError(
            f"this model attends to the last {sliding_window} tokens only, but a sequence has up to "
            f"{tree.gather.shape[1]}: sliding windows are not supported beyond their length; lower max_length"
        )
    for feature in ("s_aux", "softcap", "position_bias"):
        if kwargs.get(feature) is not None:
            raise ValueError(f"{type(module).__name__} uses {feature}, which training here does not support")
    # [1, heads, N, dim] -> [R, heads, S, dim]
    q, k, v = (x[0].transpose(0, 1)[tree.gather].transpose(1, 2) for x in (query, key, value))
    output, _ = sdpa_attention_forward(module, q, k, v, tree.mask, dropout=dropout, scaling=scaling)
    return output.flatten(0, 1)[tree.scatter][None], None


AttentionInterface.register(TREE_ATTENTION, tree_attention)
