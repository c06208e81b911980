"""Log-probabilities of a micro-batch's tokens under a Transformers causal LM, with attention over packed token trees.

Everything but attention runs on a flat row of N nodes without padding; attention alone gathers the nodes of R trees
into [R, S], S the longest tree of the micro-batch, under the mask `j <= i < end[j]` (see `alignment.tree`).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from alignment.tree import MicroBatch

TREE_ATTENTION = "token_tree"

LOGITS_PER_CHUNK = 32 * 1024 * 1024
"""Logits beyond which the softmax runs in chunks, each recomputed in the backward pass (the logits stay whole)."""


def token_logprobs(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """log p(token | path to its node) at `temperature`, of every loss-carrying token of the micro-batch: [C] float32;
    and the entropies of the distributions that they come from, in nats: [C] float32, without gradient."""
    targets_M, edges_C = (torch.from_numpy(indices).to(model.device) for indices in (batch.targets, batch.edges))
    logits_MV = tree_logits(model, batch, batch.sources)
    logprobs_M, entropies_M = selected_logprobs(logits_MV, targets_M, temperature)
    return logprobs_M[edges_C], entropies_M[edges_C]


def token_scores(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> tuple[Tensor, Tensor]:
    """As `token_logprobs`, of a reward model: the score at the node before each loss-carrying token, no entropy."""
    scores_M = tree_logits(model, batch, batch.sources)[:, 0].float()
    scores_C = scores_M[torch.from_numpy(batch.edges).to(model.device)]
    return scores_C, torch.zeros_like(scores_C.detach())


def tree_logits(model: PreTrainedModel, batch: MicroBatch, sources: np.ndarray) -> Tensor:
    """Logits [M, V] at the nodes `sources` [M] int64. With no sources: [0, V], which still hangs on the graph."""
    device = model.device
    nodes = torch.from_numpy(sources).to(device)
    empty = len(nodes) == 0
    output = model(
        input_ids=torch.from_numpy(batch.token_ids).to(device)[None],
        position_ids=torch.from_numpy(batch.positions).to(device)[None],
        tree=tree_layout(batch.lengths, batch.ends, device),
        logits_to_keep=nodes.new_zeros(1) if empty else nodes,
        use_cache=False,
    )
    return output.logits[0, :0] if empty else output.logits[0]


def selected_logprobs(logits_MV: Tensor, targets_M: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(log softmax(logits / temperature)[target], entropy), both [M] float32; the entropy carries no gradient."""
    rows = max(1, LOGITS_PER_CHUNK // logits_MV.shape[1])
    if logits_MV.shape[0] <= rows:
        return _selected(logits_MV, targets_M, temperature)
    parts = [
        checkpoint(_selected, logits, targets, temperature, use_reentrant=False)
        for logits, targets in zip(logits_MV.split(rows), targets_M.split(rows), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _selected(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    scaled = logits.float() / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy


@dataclass(frozen=True, slots=True)
class TreeLayout:
    """gather: [R, S] node of each slot (padding repeats node 0). scatter: [N] slot of each node.
    mask: [R, 1, S, S] bool, True where the row's slot attends to the column's."""

    gather: Tensor
    scatter: Tensor
    mask: Tensor


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
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    tree: TreeLayout, scaling: float, dropout: float = 0.0, sliding_window: int | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Transformers' attention interface: query, key, value [1, heads, N, dim] -> output [1, N, heads, dim]. Raises
    ValueError for what a plain softmax over the tree would compute wrongly: attention sinks, soft caps and sliding
    windows shorter than the longest tree."""
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
