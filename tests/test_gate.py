"""The gate: intervals against limits by hand, its false alarms and its power by simulation, and the way back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from alignment.tax import TaskResult, TaxRow, compare, detectable_drop, tango_interval
from recipes.check import smallest_drops, undetectable, unknown_limits
from recipes.gate import breaches, choose_checkpoint
from recipes.schema import load_recipe


def row(low: float, high: float, *, name: str = "bbh", higher: bool = True, group: bool = False) -> TaxRow:
    return TaxRow(name, 0.5, 0.5 + (low + high) / 2, (low + high) / 2, low, high, 1, 1, 100, higher, group)


@pytest.mark.parametrize(
    ("low", "high", "limit", "broken"),
    [
        (-0.09, -0.03, -0.02, True),
        (-0.09, -0.01, -0.02, False),  # the estimate alone, -0.05, is below the limit
        (-0.09, -0.02, -0.02, False),  # touches it
        (-0.09, 0.03, -0.02, False),
        (0.01, 0.05, -0.02, False),
        (0.03, 0.09, -0.02, False),  # a rise of which the sign is lost would be a drop
        (-0.05, -0.01, 0.0, True),
        (-0.01, 0.02, 0.03, True),  # a gain may be asked for
        (math.nan, math.nan, -0.02, False),
    ],
)
def test_a_limit_is_broken_when_the_whole_interval_lies_below_it(low, high, limit, broken):
    expected = [f"bbh: {low:+.3f} … {high:+.3f} lies below its limit of {limit:+g}"] if broken else []
    assert breaches([row(low, high)], {"bbh": limit}) == expected
    turned = breaches([row(-high, -low, higher=False)], {"bbh": limit})
    assert turned == expected, "where lower is better, a rise is a drop"


def test_each_benchmark_and_group_has_its_own_limit():
    rows = [
        row(-0.5, -0.4, name="a"),
        row(-0.05, -0.04, name="b"),
        row(-0.3, -0.2, name="c"),
        row(-0.4, -0.3, name="reasoning", group=True),
    ]
    found = breaches(rows, {"reasoning": -0.1, "b": -0.1, "a": -0.1})
    assert found[0].startswith("reasoning: ") and len(found) == 2
    assert found[1] == "a: -0.500 … -0.400 lies below its limit of -0.1"
    assert breaches(rows, {}) == []


def test_a_limit_for_what_is_not_evaluated_is_named_with_the_nearest():
    with pytest.raises(ValueError, match=r"no benchmark or group is called `bhb`; did you mean 'bbh'\?"):
        breaches([row(0, 1)], {"bhb": -0.02})
    assert unknown_limits(["bbh", "reasoning", "mlu"], ["bbh", "mmlu", "reasoning"]) == [
        "no benchmark or group is called `mlu`; did you mean 'mmlu'?"
    ]


def evals(rng: np.random.Generator, chances: list[np.ndarray]) -> list[TaskResult]:
    items = tuple(map(str, range(len(chances[0]))))
    return [TaskResult(str(k), "acc", True, items, (rng.random(len(p)) < p) * 1.0) for k, p in enumerate(chances)]


@pytest.mark.parametrize("benchmarks", [1, 4, 12])
def test_of_twenty_comparisons_of_the_same_weights_at_most_three_raise_an_alarm(benchmarks: int):
    """Sampled evals, another seed, and the strictest limit, zero: 15 times twenty of them."""
    rng, worst, alarms = np.random.default_rng(benchmarks), 0, 0
    keep = {str(k): 0.0 for k in range(benchmarks)} | {"all": 0.0}
    for _ in range(15):
        of_twenty = 0
        for _ in range(20):
            chances = [rng.beta(1, 1, 80) for _ in range(benchmarks)]
            rows = compare(evals(rng, chances), evals(rng, chances), {"all": [str(k) for k in range(benchmarks)]})
            of_twenty += bool(breaches(rows, keep))
        worst, alarms = max(worst, of_twenty), alarms + of_twenty
    assert worst <= 3 and alarms / 300 < 0.05


def test_a_planted_tax_is_caught_and_named():
    rng = np.random.default_rng(0)
    chances = [rng.beta(2, 1, 250) for _ in range(4)]
    spoilt = [*chances[:2], chances[2] * 0.6, chances[3]]
    keep = {str(k): -0.02 for k in range(4)}
    caught = [
        {one.split(":")[0] for one in breaches(compare(evals(rng, chances), evals(rng, spoilt)), keep)}
        for _ in range(20)
    ]
    assert caught.count({"2"}) >= 19


def test_drops_that_cannot_be_told_from_chance_are_warned_of():
    drops = smallest_drops({"bbh": 250, "mmlu": 14_000, "tiny": 3}, {"both": ["bbh", "mmlu"]})
    assert drops["bbh"] == detectable_drop(250, together=4) and drops["tiny"] == math.inf
    assert drops["both"] == pytest.approx(math.hypot(drops["bbh"], drops["mmlu"]) / 2)
    flips, lost = 50, round((50 + 250 * drops["bbh"]) / 2)
    assert tango_interval(flips - lost, lost, 250, 1 - 0.05 / 4)[1] < 0
    assert tango_interval(flips - lost + 1, lost - 1, 250, 1 - 0.05 / 4)[1] > 0
    (warning,) = undetectable({"bbh": -0.02, "mmlu": -0.02}, drops)
    assert warning == f"bbh: the limit is -0.02, but only a drop of {drops['bbh']:.3f} or more can be told from chance"
    assert undetectable({"bbh": -0.2}, drops) == [] and len(undetectable({"tiny": -0.5}, drops)) == 1


def test_the_drop_of_a_group_is_about_the_one_that_its_interval_can_show():
    """20% of the items flip in each of four benchmarks; a net loss of a little more or less than the drop."""
    drop = smallest_drops(dict.fromkeys("abcd", 250), {"all": "abcd"})["all"]
    for factor, seen in ((0.85, False), (1.15, True)):
        lost = round(250 * (0.2 + factor * drop) / 2)
        before = np.repeat([1.0, 0.0, 1.0], [lost, 50 - lost, 200])
        after = np.repeat([0.0, 1.0, 1.0], [lost, 50 - lost, 200])
        items = tuple(map(str, range(250)))
        pair = [[TaskResult(name, "acc", True, items, values) for name in "abcd"] for values in (before, after)]
        assert (compare(*pair, {"all": "abcd"})[-1].high < 0) == seen


def test_rollback_takes_the_highest_reward_that_keeps_every_limit():
    breach = ["bbh: -0.200 … -0.100 lies below its limit of -0.02"]
    rewards = {10: 0.2, 20: 0.6, 30: 0.4, 40: 0.9, 50: math.nan, 60: None, 70: 0.6}
    asked: list[int] = []

    def broken(step: int) -> list[str]:
        asked.append(step)
        return breach if step == 40 else []

    for order in (rewards, dict(reversed(rewards.items()))):
        asked.clear()
        assert choose_checkpoint(order, broken) == 20
        assert asked == [40, 20], "a full eval is dear: no more of them than it takes"
    assert choose_checkpoint({1: -3.0, 2: -2.0}, broken) == 2
    assert choose_checkpoint({40: 0.9, 50: math.nan}, broken) is None and choose_checkpoint({}, broken) is None


DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo.yaml"


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.1.grpo.keep=rollback", "evals.during={every: 2}"], "stages.1.grpo.keep: .*set `held_out`"),
        (["evals={keep: {addition: -0.1}}"], "evals: `keep` limits benchmarks: it needs `tasks`"),
        (["evals.during={items: 2}"], "evals: `during` needs `every`"),
    ],
)
def test_gate_that_could_not_work_is_refused(overrides: list[str], words: str):
    with pytest.raises(ValueError, match=words):
        load_recipe(DEMO, overrides)
