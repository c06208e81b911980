"""From scored groups to training rows: who carries loss, with which advantage and weight; and who computes what."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from alignment.advantages import group_advantages
from alignment.config import GRPOConfig
from alignment.protocols import TrainRow
from rollout.types import Group


def rewards_PG(groups: Sequence[Group], truncated: str) -> np.ndarray:
    """Rewards [P, G] float64; with truncated="zero" completions cut at the length limit get 0 (NaN stays NaN)."""
    rewards = np.stack([group.scores.total for group in groups])
    if truncated == "zero":
        cut = np.array([[c.finish_reason == "length" for c in group.completions] for group in groups])
        rewards = np.where(cut & ~np.isnan(rewards), 0.0, rewards)
    return rewards


def grpo_minibatches(groups: Sequence[Group], config: GRPOConfig) -> list[list[TrainRow]]:
    """The rows of each of the batch's `updates_per_batch` updates, whole groups in order.

    Weights hold all of the normalisation. "token": 1 / (all loss-carrying tokens of the batch / updates), TRL's dapo.
    "sequence": 1 / (the completion's tokens x completions of the update), DeepSeekMath eq. 3, TRL's grpo.
    Completions whose advantage is 0 are left out where nothing else trains on them (kl = 0), but they stay in the
    denominators. A NaN reward takes a completion out of both; truncated="mask" takes its tokens out of both, and
    leaves it a completion of the update, as TRL does.
    """
    rewards = rewards_PG(groups, config.truncated)
    advantages = group_advantages(rewards, scale=config.scale_advantages)
    kept = ~np.isnan(rewards)
    present_P = kept.sum(axis=1)
    if config.truncated == "mask":
        kept &= np.array([[c.finish_reason != "length" for c in group.completions] for group in groups])
    tokens = np.array([[len(c.token_ids) for c in group.completions] for group in groups])
    per_update = len(groups) // config.updates_per_batch
    batch_tokens = max(1, int(tokens[kept].sum())) / config.updates_per_batch
    minibatches = []
    for start in range(0, len(groups), per_update):
        chosen = range(start, start + per_update)
        sequences = int(present_P[start : start + per_update].sum())
        rows = []
        for p in chosen:
            for g, completion in enumerate(groups[p].completions):
                if not kept[p, g] or (advantages[p, g] == 0 and config.kl == 0):
                    continue
                count = int(tokens[p, g])
                weight = 1 / batch_tokens if config.normalize == "token" else 1 / (count * sequences)
                length = len(groups[p].prompt.token_ids) + count
                rows.append(TrainRow(completion.handle, p, length, float(advantages[p, g]), weight))
        minibatches.append(rows)
    return minibatches


def split_over_ranks(rows: Sequence[TrainRow], ranks: int) -> list[list[int]]:
    """Indices of each rank's rows: whole groups, the heaviest first to the rank with the fewest tokens so far."""
    groups: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.group, []).append(i)
    loads = [0] * ranks
    parts: list[list[int]] = [[] for _ in range(ranks)]
    weight = {group: sum(rows[i].length for i in members) for group, members in groups.items()}
    for group in sorted(groups, key=lambda group: (-weight[group], group)):
        rank = loads.index(min(loads))
        loads[rank] += weight[group]
        parts[rank] += groups[group]
    return parts
