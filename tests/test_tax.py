"""Paired comparison of stages: published figures, exact coverage, and faults that must not pass."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from alignment.tax import (
    TaskResult,
    bootstrap_interval,
    compare,
    detectable_drop,
    load_results,
    row_from_json,
    row_to_json,
    save_results,
    tango_interval,
)

PUBLISHED = [
    # gained, lost, n, confidence, low, high
    (9, 3, 32, 0.95, -0.027, 0.390),  # Tango 1998, section 6.2 (sleeping difficulties)
    (0, 1, 44, 0.90, -0.096, None),  # Tango 1998, section 6.1 (contact lenses; the paper gives the lower limit)
    (1, 7, 21, 0.95, -0.517, -0.026),  # Fagerland, Lydersen & Laake 2014 (airway hyper-responsiveness)
    (28, 25, 618, 0.90, -0.0148, 0.0247),  # R, PropCIs::scoreci.mp(25, 28, 618, 0.90)
]


def result(values, *, task="gsm8k", metric="exact_match", higher=True, items=None):
    items = tuple(f"q{i}" for i in range(len(values))) if items is None else items
    return TaskResult(task, metric, higher, items, np.asarray(values, dtype=np.float64))


def matches_published(interval) -> bool:
    for gained, lost, n, confidence, *limits in PUBLISHED:
        digits = 4 if n == 618 else 3
        for got, want in zip(interval(gained, lost, n, confidence), limits, strict=True):
            if want is not None and round(got, digits) != want:
                return False
    return True


def coverage(interval, n: int, p_gain: float, p_loss: float) -> float:
    """Exact: the probability of every table (gained, lost) whose interval holds the true difference."""
    covered = 0.0
    for gained in range(n + 1):
        for lost in range(n - gained + 1):
            low, high = interval(gained, lost, n, 0.95)
            if low - 1e-9 <= p_gain - p_loss <= high + 1e-9:
                table, p = [gained, lost, n - gained - lost], [p_gain, p_loss, 1 - p_gain - p_loss]
                covered += stats.multinomial.pmf(table, n, p)
    return covered


def wald(gained, lost, n, confidence):
    z, d = stats.norm.ppf(0.5 + confidence / 2), (gained - lost) / n
    half = z * math.sqrt(max(0.0, (gained + lost) / n - d * d) / n)
    return d - half, d + half


def test_tango_gives_the_published_figures():
    assert matches_published(tango_interval)


def test_published_figures_catch_planted_faults():
    assert not matches_published(wald)
    assert not matches_published(lambda gained, lost, n, c: tango_interval(lost, gained, n, c))
    assert not matches_published(lambda gained, lost, n, c: tango_interval(gained, lost, n, 0.99))
    assert not matches_published(lambda gained, lost, n, c: tango_interval(gained, lost, gained + lost, c))


def test_tango_covers_exactly_where_wald_does_not():
    cases = [(30, 0.10, 0.10), (30, 0.02, 0.02), (30, 0.3, 0.05), (40, 0.01, 0.0), (30, 0.0, 0.0)]
    ours = [coverage(tango_interval, *case) for case in cases]
    assert min(ours) > 0.93, ours
    assert min(coverage(wald, *case) for case in cases) < 0.6


@pytest.mark.parametrize("n", [1, 10, 500, 100_000])
def test_interval_has_width_when_nothing_flips(n):
    z2 = stats.norm.ppf(0.975) ** 2
    assert tango_interval(0, 0, n) == pytest.approx((-z2 / (n + z2), z2 / (n + z2)), abs=1e-8)


@pytest.mark.parametrize(("gained", "lost", "n"), [(5, 0, 5), (0, 5, 5), (3, 9, 12), (40, 2, 200), (1, 0, 1000)])
def test_interval_is_symmetric_and_within_bounds(gained, lost, n):
    low, high = tango_interval(gained, lost, n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1 and low < high
    assert tango_interval(lost, gained, n) == pytest.approx((-high, -low), abs=1e-9)


def test_zero_is_excluded_exactly_when_mcnemar_says_so():
    for gained in range(12):
        for lost in range(12):
            low, high = tango_interval(gained, lost, 60)
            significant = (gained - lost) ** 2 > stats.norm.ppf(0.975) ** 2 * (gained + lost)
            assert ((low > 0) or (high < 0)) == significant, (gained, lost)


def test_impossible_counts_are_refused():
    with pytest.raises(ValueError, match="8 gained and 3 lost of 10"):
        tango_interval(8, 3, 10)


def test_compare_counts_gains_and_losses_of_right_wrong_items():
    (row,) = compare([result([1, 1, 0, 0, 1, 0])], [result([1, 0, 1, 1, 1, 0])])
    assert (row.benchmark, row.gained, row.lost, row.n) == ("gsm8k", 2, 1, 6)
    assert (row.before, row.after, row.difference) == pytest.approx((0.5, 4 / 6, 1 / 6))
    assert (row.low, row.high) == pytest.approx(tango_interval(2, 1, 6))
    assert row.verdict == 0


def test_lower_is_better_turns_the_verdict_not_the_difference():
    before, after = np.full(40, 2.0), np.full(40, 1.0) + np.arange(40) / 100
    (row,) = compare([result(before, higher=False)], [result(after, higher=False)])
    assert row.difference < 0 and row.high < 0 and row.verdict == 1
    assert (row.gained, row.lost) == (40, 0)


def test_intervals_of_a_table_hold_together():
    pairs = [
        [result([1, 1, 0, 0, 1, 0], task=name) for name in "abc"],
        [result([1, 0] * 3, task=name) for name in "abc"],
    ]
    assert compare(*pairs)[0].together == 3
    rows = compare(*pairs, {"all": ["a", "b", "c"], "some": ["a"]})
    assert [(row.together, row.group) for row in rows] == [(5, False)] * 3 + [(5, True)] * 2
    for row in rows[:3]:
        assert (row.low, row.high) == pytest.approx(tango_interval(1, 1, 6, 0.99))
    rng = np.random.default_rng(0)
    values = [[result(rng.normal(0, 1, 50), task=name) for name in "ab"] for _ in range(2)]
    row = compare(*values)[0]
    assert (row.low, row.high) == bootstrap_interval(values[1][0].values - values[0][0].values, 0.975)
    alone = bootstrap_interval(values[1][0].values - values[0][0].values)
    assert row.low < alone[0] < alone[1] < row.high


def alarms(rng: np.random.Generator, benchmarks: int, *, corrected: bool = True) -> bool:
    """Whether any line of an A/A comparison, same weights and another seed, looks like a change."""
    chances = [rng.beta(1, 1, 60) for _ in range(benchmarks)]
    evals = [[result(rng.random(60) < p, task=str(k)) for k, p in enumerate(chances)] for _ in range(2)]
    if not corrected:
        return any(compare([a], [b])[0].verdict for a, b in zip(*evals, strict=True))
    groups = {"all": [str(k) for k in range(benchmarks)]} if benchmarks > 1 else {}
    return any(row.verdict for row in compare(*evals, groups))


@pytest.mark.parametrize("benchmarks", [1, 3, 8, 20])
def test_the_same_weights_raise_an_alarm_in_one_table_of_twenty_at_most(benchmarks: int):
    rng, tables = np.random.default_rng(benchmarks), 300
    share = sum(alarms(rng, benchmarks) for _ in range(tables)) / tables
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / tables)
    assert share > 0 or benchmarks == 20, "an interval that never alarms would hide every tax"


def test_without_the_correction_they_would_not():
    rng = np.random.default_rng(0)
    assert sum(alarms(rng, 20, corrected=False) for _ in range(100)) > 40


def test_a_group_is_the_mean_of_its_benchmarks():
    before = [result([1, 1, 1, 1], task="a"), result([1, 0], task="b"), result([0.0, 0.5], task="c", metric="f1")]
    after = [result([0, 1, 1, 1], task="a"), result([1, 1], task="b"), result([0.5, 0.5], task="c", metric="f1")]
    *_, group, one = compare(before, after, {"all": ("a", "b", "c"), "one": ("b",)})
    assert (group.before, group.after) == pytest.approx(((1 + 0.5 + 0.25) / 3, (0.75 + 1 + 0.5) / 3))
    assert group.difference == pytest.approx((-0.25 + 0.5 + 0.25) / 3), "not by the number of items"
    assert (group.benchmark, group.gained, group.lost, group.n) == ("all", 2, 1, 8)
    # By hand, half an item more in each of the cells: 6 of 4, 4 of 2; what is not right or wrong has its own variance.
    a, b = (2 / 6 - (-1 / 6) ** 2) / 5, (2 / 4 - (1 / 4) ** 2) / 3
    half = stats.norm.ppf(0.995) * math.sqrt(a + b + np.var([0.5, 0.0], ddof=1) / 2) / 3
    assert (group.low, group.high) == pytest.approx((group.difference - half, group.difference + half))
    assert (one.difference, one.high - one.low) == pytest.approx((0.5, 2 * stats.norm.ppf(0.995) * math.sqrt(b)))


@pytest.mark.parametrize(
    ("sizes", "gains", "losses"),
    [
        ((10, 20, 50, 200), (0.10, 0.02, 0.2, 0.05), (0.02, 0.02, 0.05, 0.10)),
        ((250,) * 4, (0.1,) * 4, (0.1,) * 4),
        ((250,) * 12, (0.02,) * 12, (0.02,) * 12),
        ((30,) * 4, (0.02,) * 4, (0.02,) * 4),
        ((20,) * 10, (0.0,) * 10, (0.05,) * 10),
    ],
)
def test_the_interval_of_a_group_covers(sizes, gains, losses):
    """The true difference is known. Each row has a confidence of 1 - 0.05 / (benchmarks + 1)."""
    rng, held, tables = np.random.default_rng(0), 0, 300
    names, confidence = [str(k) for k in range(len(sizes))], 1 - 0.05 / (len(sizes) + 1)
    for _ in range(tables):
        before, after = [], []
        for name, n, gain, loss in zip(names, sizes, gains, losses, strict=True):
            kinds = rng.choice(3, n, p=[gain, loss, 1 - gain - loss])
            before.append(result(np.array([0, 1, 1])[kinds], task=name))
            after.append(result(np.array([1, 0, 1])[kinds], task=name))
        row = compare(before, after, {"all": names})[-1]
        held += row.low <= (sum(gains) - sum(losses)) / len(sizes) <= row.high
    assert held / tables >= confidence - 3 * math.sqrt(confidence * (1 - confidence) / tables)


def test_a_group_keeps_its_width_when_nothing_flips():
    same = [result([1, 0, 1], task=name) for name in "ab"]
    row = compare(same, same, {"all": "ab"})[-1]
    assert row.difference == 0 and row.low < -0.3 and row.high > 0.3 and row.verdict == 0
    one = [result([0.5], task="a"), result([0.5, 0.25], task="b")]
    assert math.isnan(compare(one, one, {"all": "ab"})[-1].low), "one item alone gives no interval"


def test_a_group_without_its_benchmarks_or_of_two_directions_is_refused():
    pair = [result([1, 0], task="a"), result([1, 0], task="b", higher=False)]
    for members in (("a", "c"), (), ("a", "b")):
        with pytest.raises(ValueError, match=r"group `g`: needs benchmarks of one direction, out of \['a', 'b'\]"):
            compare(pair, pair, {"g": members})


def test_several_metrics_of_a_task_keep_their_names():
    pair = [result([1, 0]), result([0.5, 0.25], metric="f1")]
    assert [row.benchmark for row in compare(pair, pair)] == ["gsm8k/exact_match", "gsm8k/f1"]


def test_mismatches_are_named():
    with pytest.raises(ValueError, match="gsm8k/exact_match: item 1 is 'b' before, 'c' after"):
        compare([result([1, 0], items=("a", "b"))], [result([1, 0], items=("a", "c"))])
    with pytest.raises(ValueError, match="item 2 is None before, 'q2' after"):
        compare([result([1, 0])], [result([1, 0, 1])])
    with pytest.raises(ValueError, match=r"different benchmarks.*bbh"):
        compare([result([1, 0])], [result([1, 0], task="bbh")])
    with pytest.raises(ValueError, match=r"item 1 \(q1\) has the value nan"):
        result([1, math.nan])


def test_bootstrap_is_paired_repeatable_and_covers():
    rng = np.random.default_rng(1)
    base = rng.normal(0, 10, 200)
    gain = rng.normal(0.5, 1, 200)
    low, high = bootstrap_interval(gain)
    (row,) = compare([result(base)], [result(base + gain)])
    assert (low, high) == bootstrap_interval(gain)
    assert (row.low, row.high) == pytest.approx((low, high))
    half = 1.96 * gain.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.02)
    # Not paired, the spread of the items (10) would swallow the gain.
    assert high - low < 0.1 * (2 * 1.96 * base.std() * math.sqrt(2 / 200))
    held = 0
    for seed in range(40):
        low, high = bootstrap_interval(np.random.default_rng(seed).exponential(1.0, 60))
        held += low <= 1.0 <= high
    assert held >= 33


def test_bootstrap_without_information_says_so():
    assert bootstrap_interval(np.full(9, 0.5)) == (0.5, 0.5)
    assert all(math.isnan(x) for x in bootstrap_interval(np.array([0.5])))


@pytest.mark.parametrize("n", [4, 7, 20, 100, 250, 1319])
@pytest.mark.parametrize("discordance", [0.05, 0.2, 0.5])
@pytest.mark.parametrize(("together", "least"), [(1, 4), (10, 8)])
def test_detectable_drop_is_the_smallest_that_excludes_zero(n, discordance, together, least):
    flips, confidence = max(least, round(discordance * n)), 1 - 0.05 / together
    if flips > n:
        assert detectable_drop(n, discordance, together) == math.inf
        assert tango_interval(0, n, n, confidence)[1] > 0, "not even when all items are lost"
        return
    losses = [lost for lost in range(flips + 1) if tango_interval(flips - lost, lost, n, confidence)[1] < 0]
    assert detectable_drop(n, discordance, together) == pytest.approx((2 * min(losses) - flips) / n)


def test_no_drop_is_detectable_in_three_items():
    assert detectable_drop(3) == math.inf


def test_results_and_rows_survive_files(tmp_path):
    results = [result([1, 0, 1]), result([0.1, 0.25, 1 / 3], task="bbh", metric="f1", higher=False)]
    save_results(tmp_path / "results.json", results)
    loaded = load_results(tmp_path / "results.json")
    assert [r.name for r in loaded] == ["gsm8k/exact_match", "bbh/f1"] and not loaded[1].higher_is_better
    assert all((a.values == b.values).all() and a.items == b.items for a, b in zip(results, loaded, strict=True))
    (row,) = compare([result([0.5])], [result([0.75])])
    fields = json.loads(json.dumps(row_to_json(row), allow_nan=False))
    assert fields["low"] is None and math.isnan(row_from_json(fields).low)
    old = {"benchmark", "before", "after", "difference", "low", "high", "gained", "lost", "n"}
    assert old <= fields.keys()
    earlier = row_from_json({key: fields[key] for key in old})
    assert (earlier.group, earlier.together, earlier.n) == (False, 1, 1), "tables of earlier versions can be read"
