"""Reward: the completion is not too long."""

from collections.abc import Sequence
from typing import Any


def within(completion_ids: Sequence[Sequence[int]], limit: int, margin: int, **kwargs: Any) -> list[float]:
    """0.0 up to `limit` tokens, then falling linearly to -1.0 at `limit + margin` tokens and beyond.

    DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13) with L_max = limit + margin and L_cache = margin. The
    end token counts. Raises ValueError unless limit >= 0 and margin >= 1.

    >>> within(completion_ids=[[7] * 10, [7] * 12, [7] * 50], limit=10, margin=4)
    [0.0, -0.5, -1.0]
    """
    if limit < 0 or margin < 1:
        raise ValueError(f"length.within: limit {limit} must be at least 0 and margin {margin} at least 1")
    return [-min(max(len(ids) - limit, 0) / margin, 1.0) + 0.0 for ids in completion_ids]
