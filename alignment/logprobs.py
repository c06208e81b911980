"""Log-probabilities of a micro-batch's tokens under a Transformers causal LM."""

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from alignment.attention import tree_layout
from alignment.tree import MicroBatch

LOGITS_PER_CHUNK = 32 * 1024 * 1024
"""Logits beyond which the softmax runs in chunks, each recomputed in the backward pass (the logits stay whole)."""


def token_logprobs(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(token | path to its node) at `temperature`, of every loss-carrying token of the micro-batch: [C] float32;
    and the entropies of the distributions that they come from, in nats: [C] float32, without gradient."""
    targets_M, edges_C = (torch.from_numpy(indices).to(model.device) for indices in (batch.targets, batch.edges))
    logits_MV = tree_logits(model, batch, batch.sources)
    logprobs_M, entropies_M = selected_logprobs(logits_MV, targets_M, temperature)
    return logprobs_M[edges_C], entropies_M[edges_C]


def token_scores(model: PreTrainedModel, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """As `token_logprobs`, of a reward model: the score at the node before each loss-carrying token, no entropy."""
    scores_M = tree_logits(model, batch, batch.sources)[:, 0].float()
    scores_C = scores_M[torch.from_numpy(batch.edges).to(model.device)]
    return scores_C, torch.zeros_like(scores_C.detach())


def tree_logits(model: PreTrainedModel, batch: MicroBatch, sources: np.ndarray) -> torch.Tensor:
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


def selected_logprobs(
    logits_MV: torch.Tensor, targets_M: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(log softmax(logits / temperature)[target], entropy), both [M] float32; the entropy carries no gradient."""
    rows = max(1, LOGITS_PER_CHUNK // logits_MV.shape[1])
    if logits_MV.shape[0] <= rows:
        return _selected(logits_MV, targets_M, temperature)
    parts = [
        checkpoint(_selected, logits, targets, temperature, use_reentrant=False)
        for logits, targets in zip(logits_MV.split(rows), targets_M.split(rows), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _selected(logits: torch.Tensor, targets: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    scaled = logits.float() / temperature
    logprobs = torch.log_softmax(scaled, dim=-1)
    with torch.no_grad():
        entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropy
