"""What a stage gave and what it cost: paired comparison of two evals of the same items."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from alignment.files import write_text


@dataclass(frozen=True, slots=True)
class TaskResult:
    """One benchmark, measured once.

    items: [n] ids (or hashes) of the items, in the order they were asked. values: [n] float64, each item's score (1
    right, 0 wrong; or any other per-item value, such as F1). higher_is_better: False where a smaller value is better.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.items),) or not self.items:
            raise ValueError(f"{self.name}: {len(self.items)} items but values of shape {self.values.shape}")
        if not (finite := np.isfinite(self.values)).all():
            index = finite.argmin()
            raise ValueError(f"{self.name}: item {index} ({self.items[index]}) has the value {self.values[index]}")

    @property
    def name(self) -> str:
        """`task/metric`, which says what is compared."""
        return f"{self.task}/{self.metric}"


@dataclass(frozen=True, slots=True)
class TaxRow:
    """One line of a tax table: means before and after, `difference` = after - before and its 95% interval.

    gained: items that got better (wrong -> right; other values: a better value); lost: that got worse.
    low and high are NaN where one item alone gives no interval.
    """

    benchmark: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    gained: int
    lost: int
    n: int
    higher_is_better: bool = True

    @property
    def verdict(self) -> int:
        """+1 better, -1 worse, 0 when the interval holds zero."""
        sign = (self.low > 0) - (self.high < 0)
        return sign if self.higher_is_better else -sign


def tango_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for the difference (gained - lost) / n of two paired proportions (Tango 1998, section 4).

    All d with |T(d)| <= z, T(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d))), where q is the maximum
    likelihood estimate of P(lost) under the difference d. Without any flip it is +-z^2 / (n + z^2), not zero wide.
    """
    if not (n > 0 and gained >= 0 and lost >= 0 and gained + lost <= n):
        raise ValueError(f"{gained} gained and {lost} lost of {n} items is impossible")
    estimate, z2 = (gained - lost) / n, stats.norm.ppf(0.5 + confidence / 2) ** 2

    def excess(d: float) -> float:
        """Positive where |T(d)| > z; written without the division, which is 0/0 at the ends."""
        b = -gained - lost + (2 * n - gained + lost) * d
        root = math.sqrt(max(0.0, b * b + 8 * n * lost * d * (1 - d)))
        q = (root - b) / (4 * n)
        return (gained - lost - n * d) ** 2 - z2 * n * (2 * q + d * (1 - d))

    def limit(end: float) -> float:
        # A hair inside: with no flips the estimate itself is a second, spurious root.
        return end if estimate == end else float(optimize.brentq(excess, estimate + end * 1e-9, end, xtol=1e-12))

    return limit(-1.0), limit(1.0)


def bootstrap_interval(differences: np.ndarray) -> tuple[float, float]:
    """95% BCa bootstrap interval (Efron 1987) of the mean of paired differences [n]; the same numbers every time.

    Equal differences give an interval of no width (resampling cannot know more); one item gives NaN.
    """
    if len(differences) < 2:
        return math.nan, math.nan
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    batch = max(1, 2_000_000 // len(differences))
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, batch=batch, confidence_level=0.95, method="BCa", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


def compare(before: Sequence[TaskResult], after: Sequence[TaskResult]) -> list[TaxRow]:
    """One row per benchmark, in the order of `before`.

    Right/wrong items get Tango's score interval, all others a paired bootstrap; 95% both.
    Raises ValueError when the two do not hold the same benchmarks and items, naming the first mismatch.
    """
    if [r.name for r in before] != [r.name for r in after]:
        raise ValueError(
            f"the evals are of different benchmarks: {[r.name for r in before]} before, {[r.name for r in after]} "
            "after; compare results of the same recipe's evals"
        )
    tasks = [r.task for r in before]
    return [_row(b, a, b.task if tasks.count(b.task) == 1 else b.name) for b, a in zip(before, after, strict=True)]


def _row(before: TaskResult, after: TaskResult, benchmark: str) -> TaxRow:
    for index, (left, right) in enumerate(zip_longest(before.items, after.items)):
        if left != right:
            raise ValueError(f"{before.name}: item {index} is {left!r} before, {right!r} after; they cannot be paired")
    differences = after.values - before.values
    better = differences if before.higher_is_better else -differences
    gained, lost = int((better > 0).sum()), int((better < 0).sum())
    if np.isin(before.values, (0, 1)).all() and np.isin(after.values, (0, 1)).all():
        low, high = tango_interval(int((differences > 0).sum()), int((differences < 0).sum()), len(differences))
    else:
        low, high = bootstrap_interval(differences)
    means = float(before.values.mean()), float(after.values.mean()), float(differences.mean())
    return TaxRow(benchmark, *means, low, high, gained, lost, len(differences), before.higher_is_better)


def detectable_drop(n: int, discordance: float = 0.2) -> float:
    """The smallest drop in accuracy over n right/wrong items whose 95% interval excludes zero.

    Assumes that a share `discordance` of the items flips between two evals, most of them by chance and in both
    directions (0.2 is usual after a stage of training). Zero is outside Tango's interval exactly when
    (lost - gained) / sqrt(lost + gained) > 1.96. It is the drop that must be *seen*; a true drop of that size is seen
    half of the time. At least 4 items must flip: math.inf when n < 4.
    """
    z = float(stats.norm.ppf(0.975))
    flips = max(4, round(discordance * n))
    net = math.floor(z * math.sqrt(flips)) + 1
    # lost - gained is odd exactly when lost + gained is.
    net += (net - flips) % 2
    return net / n if n >= 4 else math.inf


def save_results(path: Path, results: Sequence[TaskResult]) -> None:
    """Write results as one JSON list, all or nothing."""
    write_text(path, json.dumps([asdict(r) | {"values": r.values.tolist()} for r in results]))


def load_results(path: Path) -> list[TaskResult]:
    """Read what `save_results` wrote."""
    rows = json.loads(path.read_text(encoding="utf-8"))
    return [TaskResult(**r | {"items": tuple(r["items"]), "values": np.array(r["values"], float)}) for r in rows]


def row_to_json(row: TaxRow) -> dict[str, Any]:
    """The row as `tax.json` holds it; NaN becomes null."""
    return {key: None if value != value else value for key, value in asdict(row).items()}


def row_from_json(fields: Mapping[str, Any]) -> TaxRow:
    """The inverse of `row_to_json`."""
    return TaxRow(**{key: math.nan if value is None else value for key, value in fields.items()})
