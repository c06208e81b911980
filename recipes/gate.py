"""The gate after a stage: which limits its evals break, what they can see at all, which checkpoint keeps them all."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from alignment.tax import TaxRow, detectable_drop
from rollout.functions import nearest


def breaches(rows: Iterable[TaxRow], keep: Mapping[str, float]) -> list[str]:
    """A message for each limit that is broken. rows: a tax table against the policy that the stage started from.
    keep: benchmark or group -> the least difference that it may have, -0.02 of an accuracy, say; where lower is better,
    a rise counts as the drop.

    A limit holds unless the whole interval lies below it; an interval that is NaN breaks none. Raises ValueError for a
    limit without its row: one that is never compared would never be broken.
    """
    ends = {row.benchmark: (row.low, row.high) if row.higher_is_better else (-row.high, -row.low) for row in rows}
    if unknown := unknown_limits(keep, ends):
        raise ValueError("; ".join(unknown))
    broken = [(name, limit, *ends[name]) for name, limit in keep.items() if ends[name][1] < limit]
    return [f"{name}: {low:+.3f} … {high:+.3f} lies below its limit of {limit:+g}" for name, limit, low, high in broken]


def unknown_limits(keep: Iterable[str], evaluated: Iterable[str]) -> list[str]:
    """A message for each limit (or member of a group) that is for none of the benchmarks and groups `evaluated`."""
    known = list(evaluated)
    return [f"no benchmark or group is called `{name}`{nearest(name, known)}" for name in keep if name not in known]


def smallest_drops(items: Mapping[str, int], groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """The smallest drop that a tax table of these benchmarks (name -> items) and groups can show, for each of them."""
    drops = {name: detectable_drop(n, together=len(items) + len(groups)) for name, n in items.items()}
    return drops | {name: math.hypot(*(drops[m] for m in members)) / len(members) for name, members in groups.items()}


def undetectable(keep: Mapping[str, float], drops: Mapping[str, float]) -> list[str]:
    """A warning for each limit smaller than the drop that its benchmark can show (`smallest_drops`)."""
    return [
        f"{name}: the limit is {limit:+g}, but only a drop of {drops[name]:.3f} or more can be told from chance"
        for name, limit in keep.items()
        if drops[name] > abs(limit)
    ]


def choose_checkpoint(rewards: Mapping[int, float | None], broken: Callable[[int], Sequence[str]]) -> int | None:
    """The step with the highest reward on held-out prompts that breaks no limit, of equals the earliest; None: go back.

    broken: the limits that a step's full eval breaks; asked from the highest reward on, until a step breaks none.
    """
    known = {step: reward for step, reward in rewards.items() if reward is not None and math.isfinite(reward)}
    return next((step for step in sorted(known, key=lambda step: (-known[step], step)) if not broken(step)), None)
