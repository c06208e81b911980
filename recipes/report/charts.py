"""Small static charts as inline SVG, and which metrics become which. Colours and fonts come from the style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from alignment.tax import TaxRow
from recipes.progress import format_number
from recipes.report.data import phases

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 150, 48, 8, 8, 20
BINS = 80
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


@dataclass(frozen=True, slots=True)
class Chart:
    """What the page shows: `legend` is (name, last value, colour index) of each line, empty for a single one."""

    title: str
    svg: Markup
    last: str
    legend: tuple[tuple[str, str, int], ...]


def stage_charts(rows: Sequence[Mapping[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """The charts of a stage, and those of metrics that nobody asks for first. rows: its metrics, one row a step."""
    keys = dict.fromkeys(key for row in rows for key in row if key != "step")
    points = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in keys}
    points = {key: values for key, values in points.items() if values}
    parts = [k for k in points if k.startswith("reward/") and k.count("/") == 1 and k not in REWARD_TOTALS]
    if len(parts) == 1 and points[parts[0]] == points.get("reward/mean"):
        parts = []
    tokens = [k for k in points if k.startswith("tokens/")]
    first, used = [], {k for k in points if k.startswith("time/")}
    for title, names in (KNOWN[0], ("Reward by function", parts), *KNOWN[1:], ("Tokens per step", tokens)):
        chosen = [name for name in names if name in points]
        used.update(chosen)
        if chosen:
            first.append(_lines(title, chosen, points))
    timed = [(row["step"], phases(row)) for row in rows if phases(row)]
    if timed:
        names = dict.fromkeys(name for _, times in timed for name in times)
        stacked = {name: [(step, times.get(name, 0.0)) for step, times in timed] for name in names}
        first.append(stack_chart("Time per step", stacked, " s"))
    rest = [_lines(key, [key], points) for key in points if key not in used and any(value for _, value in points[key])]
    return first, rest


def _lines(title: str, keys: Sequence[str], points: Mapping[str, Sequence[tuple[int, float]]]) -> Chart:
    named = {key.split("/", 1)[-1].replace("_", " "): points[key] for key in keys}
    return line_chart(title, named, logarithmic=keys[0].startswith(LOGARITHMIC))


def line_chart(title: str, series: Mapping[str, Sequence[tuple[int, float]]], *, logarithmic: bool = False) -> Chart:
    """series: name -> (step, value) points. Lines are means of neighbouring steps, their range drawn faint behind."""
    binned = {name: _bin(points) for name, points in series.items()}
    everything = np.concatenate([np.concatenate(b[1:]) for b in binned.values()])
    logarithmic = logarithmic and bool((everything > 0).all()) and everything.max() > 30 * everything.min()
    low, high = float(everything.min()), float(everything.max())
    y, ticks = _log_scale(low, high) if logarithmic else _linear_scale(low, high)
    x, frame = _frame(binned, y, ticks)
    lines = []
    for color, (steps, mean, lower, upper) in enumerate(binned.values()):
        band = [*zip(steps, upper, strict=True), *zip(steps[::-1], lower[::-1], strict=True)]
        lines.append(f'<path class="band c{color % 6}" d="{_path(band, x, y)}Z"/>')
        lines.append(f'<path class="line c{color % 6}" d="{_path(zip(steps, mean, strict=True), x, y)}"/>')
    legend = tuple((name, format_number(points[-1][1]), i % 6) for i, (name, points) in enumerate(series.items()))
    svg = _svg(title, frame + "".join(lines), binned)
    return Chart(title, svg, "", legend) if len(legend) > 1 else Chart(title, svg, legend[0][1], ())


def stack_chart(title: str, series: Mapping[str, Sequence[tuple[int, float]]], unit: str) -> Chart:
    """series: name -> (step, value >= 0) points of the same steps, largest part at the bottom."""
    order = sorted(series, key=lambda name: -sum(value for _, value in series[name]))
    binned = {name: _bin(series[name]) for name in order}
    heights = np.cumsum([b[1] for b in binned.values()], axis=0)
    y, ticks = _linear_scale(0.0, float(np.percentile(heights[-1], 99)))
    x, frame = _frame(binned, y, ticks)
    steps = next(iter(binned.values()))[0]
    below, areas = np.zeros(len(steps)), []
    for color, top in enumerate(heights):
        outline = [*zip(steps, top, strict=True), *zip(steps[::-1], below[::-1], strict=True)]
        areas.append(f'<path class="area c{color % 6}" d="{_path(outline, x, y)}Z"/>')
        below = top
    medians = [
        (name, f"{format_number(float(np.median(binned[name][1])))}{unit}", i % 6) for i, name in enumerate(order)
    ]
    total = f"{format_number(float(np.median(heights[-1])))}{unit}"
    return Chart(title, _svg(title, frame + "".join(areas), binned), total, tuple(medians))


def half_width(rows: Sequence[TaxRow]) -> float:
    """The scale that all rows of a table share, one digit: every interval fits, and zero is in the middle."""
    most = max([1e-6, *(abs(end) for row in rows for end in (row.low, row.high, row.difference) if math.isfinite(end))])
    power = 10.0 ** math.floor(math.log10(most))
    return math.ceil(most / power) * power


def _bin(points: Sequence[tuple[int, float]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Steps, means, minima and maxima of at most BINS neighbourhoods: [bins] each."""
    steps, values = np.array([p[0] for p in points], dtype=float), np.array([p[1] for p in points], dtype=float)
    edges = np.unique(np.linspace(0, len(steps), min(BINS, len(steps)) + 1).astype(int))[:-1]
    counts = np.diff(np.append(edges, len(steps)))
    return (
        np.add.reduceat(steps, edges) / counts,
        np.add.reduceat(values, edges) / counts,
        np.minimum.reduceat(values, edges),
        np.maximum.reduceat(values, edges),
    )


def _linear_scale(low: float, high: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    if low > 0 and low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        low, high = (low - 0.5, high + 0.5) if high == 0 else (low - abs(low) / 2, high + abs(high) / 2)
    ticks = [(t, f"{t:.5g}".replace("e-0", "e-").replace("e+0", "e")) for t in nice_ticks(low, high, 4)]
    low, high = min(low, ticks[0][0]), high + 0.03 * (high - low)
    return lambda value: (min(value, high) - low) / (high - low), ticks


def _log_scale(low: float, high: float) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / 4))
    ticks = [(10.0**e, f"1e{e}") for e in range(first, last + 1, every)]
    return lambda value: (math.log10(max(value, low)) - first) / (last - first), ticks


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high]; at most `most` + 1."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [gap * i for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def _frame(
    binned: Mapping[str, tuple[np.ndarray, ...]], y: Callable[[float], float], ticks: Sequence[tuple[float, str]]
) -> tuple[Callable[[float], float], str]:
    """The scale of the steps, and axes as SVG."""
    first, last = min(b[0][0] for b in binned.values()), max(b[0][-1] for b in binned.values())

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * ((step - first) / (last - first) if last > first else 0.5)

    parts = []
    for value, label in ticks:
        at = _height(y(value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 3}" text-anchor="end">{label}</text>')
    for step in nice_ticks(first, last, 5) if last - first >= 5 else sorted({first, last}):
        if step == int(step):
            parts.append(f'<text x="{x(step):.1f}" y="{HEIGHT - 5}" text-anchor="middle">{step:g}</text>')
    return x, "".join(parts)


def _height(share: float) -> float:
    return round(TOP + (HEIGHT - TOP - BOTTOM) * (1 - share), 1)


def _path(points: Sequence[tuple[float, float]], x: Callable[[float], float], y: Callable[[float], float]) -> str:
    return "M" + "L".join(f"{x(step):.1f},{_height(y(value))}" for step, value in points)


def _svg(title: str, inside: str, binned: Mapping[str, tuple[np.ndarray, ...]]) -> Markup:
    """The chart with the numbers that the pointer reads from it."""
    data = {
        name: [[round(float(s)), float(f"{v:.4g}")] for s, v in zip(*b[:2], strict=True)] for name, b in binned.items()
    }
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" data-left="{LEFT}" '
        f'data-right="{RIGHT}" data-series="{escape(json.dumps(data, separators=(",", ":")))}">{inside}'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/></svg>'
    )
