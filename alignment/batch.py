"""From scored groups to training rows: who carries loss, with which advantage and weight; and who computes what."""

from collections.abc import Sequence

import numpy as np
from more_itertools import map_reduce

from alignment.config import GRPOConfig
from alignment.protocols import TrainRow
from rollout.types import Group

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does, so that a group of nearly equal rewards does not explode."""


def rewards_PG(groups: Sequence[Group], truncated: str) -> np.ndarray:
    """Rewards [P, G] float64; with truncated="zero" completions cut at the length limit get 0 (NaN stays NaN)."""
    rewards = np.stack([group.scores.total for group in groups])
    if truncated == "zero":
        cut = np.array([[c.finish_reason == "length" for c in group.completions] for group in groups])
        rewards = np.where(cut & ~np.isnan(rewards), 0.0, rewards)
    return rewards


def group_advantages(rewards_PG: np.ndarray, *, scale: bool = True) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group: float64 [P, G].

    std is the sample standard deviation (divided by G - 1, as in TRL; the paper does not say which).
    scale=False subtracts the mean alone. NaN rewards have left their group: they enter neither mean nor std and their
    advantage is 0. A group with fewer than two rewards left has no advantage: all 0."""
    present_PG = np.ma.array(rewards_PG, mask=np.isnan(rewards_PG))
    centred_PG = (present_PG - present_PG.mean(axis=1, keepdims=True)).filled(0.0)
    # Equal rewards such as 0.1 leave rounding errors around the mean, which a division by the tiny std would blow up.
    centred_PG = np.where(present_PG.ptp(axis=1, keepdims=True).filled(0.0) > 0, centred_PG, 0.0)
    if not scale:
        return centred_PG
    count_P1 = present_PG.count(axis=1, keepdims=True)
    variance_P1 = (centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1)
    return centred_PG / (np.sqrt(variance_P1) + EPSILON)


def grpo_minibatches(groups: Sequence[Group], config: GRPOConfig) -> list[list[TrainRow]]:
    """The rows of each of the batch's `updates_per_batch` updates, whole groups in order.

    Weights hold all of the normalisation. "token": 1 / (all loss-carrying tokens of the batch / updates), TRL's dapo.
    "sequence": 1 / (the completion's tokens x completions of the update), DeepSeekMath eq. 3, TRL's grpo.
    Completions whose advantage is 0 are left out where nothing else trains on them (kl = 0), but they stay in the
    denominators. A NaN reward takes a completion out of both; truncated="mask" takes its tokens out of both, and
    leaves it a completion of the update, as TRL does."""
    rewards = rewards_PG(groups, config.truncated)
    advantages = group_advantages(rewards, scale=config.scale_advantages)
    kept = ~np.isnan(rewards)
    sequences_U = kept.reshape(config.updates_per_batch, -1).sum(axis=1)
    if config.truncated == "mask":
        kept &= np.array([[c.finish_reason != "length" for c in group.completions] for group in groups])
    tokens = np.array([[len(c.token_ids) for c in group.completions] for group in groups])
    batch_tokens = max(1, int(tokens[kept].sum())) / config.updates_per_batch
    minibatches: list[list[TrainRow]] = [[] for _ in sequences_U]
    for p, g in np.argwhere(kept & ((advantages != 0) | (config.kl > 0))).tolist():
        update = p * config.updates_per_batch // len(groups)
        count = int(tokens[p, g])
        weight = 1 / batch_tokens if config.normalize == "token" else 1 / (count * int(sequences_U[update]))
        length = len(groups[p].prompt.token_ids) + count
        row = TrainRow(groups[p].completions[g].handle, p, length, float(advantages[p, g]), weight)
        minibatches[update].append(row)
    return minibatches


def split_over_ranks(rows: Sequence[TrainRow], ranks: int) -> list[list[int]]:
    """Indices of each rank's rows: whole groups, the heaviest first to the rank with the fewest tokens so far."""
    groups = map_reduce(range(len(rows)), lambda i: rows[i].group)
    weight = {group: sum(rows[i].length for i in members) for group, members in groups.items()}
    loads, parts = [0] * ranks, [list[int]() for _ in range(ranks)]
    for group in sorted(groups, key=lambda group: (-weight[group], group)):
        rank = loads.index(min(loads))
        loads[rank] += weight[group]
        parts[rank] += groups[group]
    return parts
