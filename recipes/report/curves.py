"""Which metrics of a stage become which charts: known ones first, in an order that tells the story."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from recipes.report.charts import Chart, line_chart, stack_chart
from recipes.report.data import phases

KNOWN: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Reward", ("reward/mean",)),
    ("Loss", ("loss",)),
    ("Reward spread within groups", ("reward/std",)),
    ("Groups without signal", ("groups/without_signal",)),
    ("Completion length, tokens", ("completions/mean_length", "completions/max_length")),
    ("Cut at the length limit", ("completions/truncated",)),
    ("KL to the reference", ("kl",)),
    ("Sampler against trainer", ("mismatch/k3", "mismatch/p99", "mismatch/max")),
    ("Entropy", ("entropy",)),
    ("Gradient norm", ("grad_norm",)),
    ("Learning rate", ("learning_rate",)),
)
REWARD_TOTALS = ("reward/mean", "reward/std", "reward/masked")
LOGARITHMIC = ("mismatch/", "handover/")


def stage_charts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """The charts of a stage, and those of metrics that nobody asks for first."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    points = {key: values for key in keys if key != "step" and (values := _points(rows, key))}
    parts = [k for k in points if k.startswith("reward/") and k.count("/") == 1 and k not in REWARD_TOTALS]
    if len(parts) == 1 and points[parts[0]] == points.get("reward/mean"):
        parts = []
    first, used = [], set(parts) | {k for k in points if k.startswith("time/")}
    for title, names in KNOWN:
        chosen = [name for name in names if name in points]
        used.update(chosen)
        if chosen:
            first.append(_lines(title, chosen, points))
        if title == "Reward" and parts:
            first.append(_lines("Reward by function", parts, points))
    tokens = [k for k in points if k.startswith("tokens/")]
    used.update(tokens)
    if tokens:
        first.append(_lines("Tokens per step", tokens, points))
    timed = [(row["step"], phases(row)) for row in rows if phases(row)]
    if timed:
        names = dict.fromkeys(name for _, times in timed for name in times)
        stacked = {name: [(step, times.get(name, 0.0)) for step, times in timed] for name in names}
        first.append(stack_chart("Time per step", stacked, " s"))
    rest = [_lines(key, [key], points) for key in points if key not in used and any(value for _, value in points[key])]
    return first, rest


def _points(rows: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def _lines(title: str, keys: Sequence[str], points: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    named = {key.split("/", 1)[-1].replace("_", " "): points[key] for key in keys}
    return line_chart(title, named, logarithmic=keys[0].startswith(LOGARITHMIC))
