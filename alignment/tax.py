"""What a stage gave and what it cost: paired comparison of two evals of the same items."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from scipy import optimize, stats

from alignment.metrics import write_text


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
    group: str = ""

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
    """One line of a tax table: means before and after, `difference` = after - before and its interval.

    The intervals of a table's `together` lines hold all at once, with a confidence of 95%. gained: items that got
    better (wrong -> right; other values: a better value); lost: that got worse. low and high are NaN where one item
    alone gives no interval. group: whether the line is the mean of several benchmarks, with the sums of their items."""

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
    group: bool = False
    together: int = 1

    @property
    def verdict(self) -> int:
        """+1 better, -1 worse, 0 when the interval holds zero."""
        sign = (self.low > 0) - (self.high < 0)
        return sign if self.higher_is_better else -sign


def tango_interval(gained: int, lost: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval for the difference (gained - lost) / n of two paired proportions (Tango 1998, section 4). All d
    with |T(d)| <= z, T(d) = (gained - lost - n d) / sqrt(n (2 q + d (1 - d))), where q is the maximum likelihood
    estimate of P(lost) under the difference d. Without any flip it is +-z^2 / (n + z^2), not zero wide."""
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


def bootstrap_interval(differences: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """BCa bootstrap interval (Efron 1987) of the mean of paired differences [n]; the same numbers every time. Equal
    differences give an interval of no width (resampling cannot know more); one item gives NaN."""
    if len(differences) < 2:
        return math.nan, math.nan
    if np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    batch, resamples = max(1, 2_000_000 // len(differences)), max(10_000, round(100 / (1 - confidence)))
    interval = stats.bootstrap(
        (differences,), np.mean, n_resamples=resamples, batch=batch, confidence_level=confidence, method="BCa", rng=0
    ).confidence_interval
    return float(interval.low), float(interval.high)


def compare(
    before: Sequence[TaskResult], after: Sequence[TaskResult], groups: Mapping[str, Sequence[str]] | None = None
) -> list[TaxRow]:
    """One row per benchmark, in the order of `before`, then one per group (name -> benchmarks; default: the results').

    Right/wrong items get Tango's score interval, all others a paired bootstrap. The m rows' intervals hold together
    with 95%: each has the confidence 1 - 0.05 / m (Bonferroni), so that a change without effect raises an alarm in any
    of the rows once in 20 times at most.
    Raises ValueError when the two do not hold the same benchmarks and items, naming the first mismatch, and for a group
    whose benchmarks are not there or not all better in the same direction."""
    if [r.name for r in before] != [r.name for r in after]:
        raise ValueError(
            f"the evals are of different benchmarks: {[r.name for r in before]} before, {[r.name for r in after]} "
            "after; compare results of the same recipe's evals"
        )
    tasks = [r.task for r in before]
    names = [r.task if tasks.count(r.task) == 1 else r.name for r in before]
    if groups is None:
        found = dict.fromkeys(r.group for r in before if r.group)
        groups = {g: [name for name, r in zip(names, before, strict=True) if r.group == g] for g in found}
    together = len(before) + len(groups)
    compared = [_row(b, a, name, together) for b, a, name in zip(before, after, names, strict=True)]
    rows, variances = [row for row, _ in compared], {row.benchmark: variance for row, variance in compared}
    return rows + [_group_row(name, members, rows, variances) for name, members in groups.items()]


def _group_row(name: str, members: Sequence[str], rows: Sequence[TaxRow], variances: Mapping[str, float]) -> TaxRow:
    """The mean over benchmarks that weigh the same, with a normal interval from the sum of their variances."""
    found = [row for row in rows if row.benchmark in members]
    if not members or len(found) != len(members) or len({row.higher_is_better for row in found}) > 1:
        raise ValueError(f"group `{name}`: needs benchmarks of one direction, out of {[r.benchmark for r in rows]}")
    columns = [(row.before, row.after, row.difference, row.gained, row.lost, row.n) for row in found]
    before, after, difference, *counts = map(sum, zip(*columns, strict=True))
    k, first, mean = len(found), found[0], difference / len(found)
    z, error = stats.norm.ppf(1 - 0.025 / first.together), math.sqrt(sum(variances[m] for m in members)) / k
    limits = float(mean - z * error), float(mean + z * error)
    return TaxRow(name, before / k, after / k, mean, *limits, *counts, first.higher_is_better, True, first.together)


def _row(before: TaskResult, after: TaskResult, benchmark: str, together: int) -> tuple[TaxRow, float]:
    """The row, and the variance of its mean difference."""
    for index, (left, right) in enumerate(zip_longest(before.items, after.items)):
        if left != right:
            raise ValueError(f"{before.name}: item {index} is {left!r} before, {right!r} after; they cannot be paired")
    differences = after.values - before.values
    better = differences if before.higher_is_better else -differences
    gained, lost, n, confidence = int((better > 0).sum()), int((better < 0).sum()), len(better), 1 - 0.05 / together
    means = float(before.values.mean()), float(after.values.mean()), float(differences.mean())
    if all(np.isin(result.values, (0, 1)).all() for result in (before, after)):
        low, high = tango_interval(int((differences > 0).sum()), int((differences < 0).sum()), n, confidence)
        # Half an item more in each of the four cells (Agresti & Min 2005): few flips, and none, still give a width, and
        # the interval covers. Half a +1, half a -1 and a 0 are as these two: same sum, same sum of squares.
        differences = np.append(differences, [math.sqrt(0.5), -math.sqrt(0.5)])
    else:
        low, high = bootstrap_interval(differences, confidence)
    variance = float(differences.var(ddof=1)) / len(differences) if len(differences) > 1 else math.nan
    row = TaxRow(benchmark, *means, low, high, gained, lost, n, before.higher_is_better, together=together)
    return row, variance


def detectable_drop(n: int, discordance: float = 0.2, together: int = 1) -> float:
    """The smallest drop in accuracy over n right/wrong items whose interval, one of `together`, excludes zero.

    Assumes that a share `discordance` of the items flips between two evals, most of them by chance and in both
    directions (0.2 is usual after a stage of training). Zero is outside Tango's interval exactly when
    (lost - gained) / sqrt(lost + gained) > z, 1.96 for a single benchmark. It is the drop that must be *seen*; a true
    drop of that size is seen half of the time. More than z^2 items must flip (4, if 1.96): math.inf when n is smaller.
    """
    z = float(stats.norm.ppf(1 - 0.025 / together))
    least = math.floor(z * z) + 1
    flips = max(least, round(discordance * n))
    net = math.floor(z * math.sqrt(flips)) + 1
    # lost - gained is odd exactly when lost + gained is.
    net += (net - flips) % 2
    return net / n if n >= least else math.inf


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
