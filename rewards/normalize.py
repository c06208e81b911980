"""Rewards of different scales, brought to one before they are summed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rewards.config import RewardConfig
from rollout.types import Group


class RewardNormalizer:
    """Replaces (value - mean) / spread for the value of every reward that asks for it in `Scores.total`; `Scores.parts`
    keep what the rewards said. Batches must come in their order: a running mean depends on it.

    fixed: mean and spread of those normalised by held-out scores, by label. running: count, mean and sum of squares of
    the others so far, for a run that resumes."""

    def __init__(self, configs: Sequence[RewardConfig], fixed: Mapping[str, tuple[float, float]]) -> None:
        self._weights = {config.label: config.weight for config in configs if config.normalize}
        self._fixed = dict(fixed)
        self.running = {label: (0, 0.0, 0.0) for label in self._weights if label not in fixed}

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """The groups of one batch with their new totals; a running mean has the batch's own values in it."""
        for label, (n, mean, squares) in self.running.items():
            values = np.concatenate([group.scores.parts[label] for group in groups])
            values = values[~np.isnan(values)]
            if len(values):  # Chan et al. 1979: count, mean and sum of squares of two sets together
                both, shift = n + len(values), float(values.mean()) - mean
                squares += float(values.var()) * len(values) + shift**2 * n * len(values) / both
                self.running[label] = both, mean + shift * len(values) / both, squares
        return [replace(group, scores=replace(group.scores, total=self._total(group))) for group in groups]

    def _total(self, group: Group) -> np.ndarray:
        total = group.scores.total.copy()
        for label, weight in self._weights.items():
            values = group.scores.parts[label]
            n, mean, squares = self.running.get(label, (1, 0.0, 1.0))
            mean, spread = self._fixed.get(label, (mean, math.sqrt(squares / max(1, n))))
            total += np.nan_to_num(weight * ((values - mean) / (spread or 1.0) - values))
        return total
