"""Group-relative advantages (DeepSeek-V2 eq. 34)."""

from __future__ import annotations

import numpy as np

EPSILON = 1e-4
"""Added to the standard deviation, as TRL does, so that a group of nearly equal rewards does not explode."""


def group_advantages(rewards_PG: np.ndarray, *, scale: bool) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (std(r) + 1e-4) within each group: float64 [P, G].

    std is the sample standard deviation (divided by G - 1, as in TRL; the paper does not say which).
    scale=False subtracts the mean alone. NaN rewards have left their group: they enter neither mean nor
    std and their advantage is 0. A group with fewer than two rewards left has no advantage: all 0.
    """
    present_PG = ~np.isnan(rewards_PG)
    count_P1 = present_PG.sum(axis=1, keepdims=True)
    filled_PG = np.where(present_PG, rewards_PG, 0.0)
    mean_P1 = filled_PG.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)
    centred_PG = np.where(present_PG, filled_PG - mean_P1, 0.0)
    # Equal rewards such as 0.1 leave rounding errors around the mean, which a division by the tiny std would blow up.
    equal_P1 = _spread(rewards_PG, present_PG) == 0
    centred_PG = np.where(equal_P1 | (count_P1 < 2), 0.0, centred_PG)
    if not scale:
        return centred_PG
    variance_P1 = (centred_PG**2).sum(axis=1, keepdims=True) / np.maximum(count_P1 - 1, 1)
    return centred_PG / (np.sqrt(variance_P1) + EPSILON)


def _spread(rewards_PG: np.ndarray, present_PG: np.ndarray) -> np.ndarray:
    highest_P1 = np.where(present_PG, rewards_PG, -np.inf).max(axis=1, keepdims=True)
    lowest_P1 = np.where(present_PG, rewards_PG, np.inf).min(axis=1, keepdims=True)
    return np.where(np.isfinite(highest_P1), highest_P1, 0.0) - np.where(np.isfinite(lowest_P1), lowest_P1, 0.0)
