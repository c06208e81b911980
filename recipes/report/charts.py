"""Small static charts as inline SVG, and which metrics become which. Colours and fonts come from the style sheet."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from alignment.tax import TaxRow
from recipes.progress import format_number
from recipes.report.data import phases

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 150, 48, 332, 8, 130
BINS = 80
SHADES, MOST_LINES = 16, 128
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

Points = Sequence[tuple[int, float]]
Scale = tuple[Callable[[Any], Any], Sequence[tuple[float, str]]]
"""From values to heights on the page, and the values that get a label."""


@dataclass(frozen=True, slots=True)
class Chart:
    """What the page shows: `legend` is name and last value of each line, in colour order; empty for a single one."""

    title: str
    svg: Markup
    last: str
    legend: tuple[tuple[str, str], ...]


def stage_charts(
    rows: Sequence[Mapping[str, Any]], experts: Sequence[Mapping[str, Any]] = ()
) -> tuple[list[Chart], list[Chart]]:
    """The charts of a stage, and those of metrics that nobody asks for first. rows: its metrics, one row a step.
    experts: the load of its experts."""
    keys = dict.fromkeys(key for row in rows for key, value in row.items() if key != "step" and value is not None)
    points = {key: [(row["step"], row[key]) for row in rows if row.get(key) is not None] for key in keys}
    parts = [k for k in points if k.startswith("reward/") and k.count("/") == 1 and k not in REWARD_TOTALS]
    if len(parts) == 1 and points[parts[0]] == points.get("reward/mean"):
        parts = []
    tokens = [k for k in points if k.startswith("tokens/")]
    first, used = [], {k for k in points if k.startswith("time/")}
    for title, names in (KNOWN[0], ("Reward by function", parts), *KNOWN[1:], ("Tokens per step", tokens)):
        chosen = {name: points[name] for name in names if name in points}
        used.update(chosen)
        if chosen:
            first.append(line_chart(title, chosen))
    if timed := {row["step"]: times for row in rows if (times := phases(row))}:
        first.append(time_chart("Time per step", timed))
    if experts:
        first.append(heat_map("Load of the experts", experts))
    rest = [key for key in points if key not in used and any(value for _, value in points[key])]
    return first, [line_chart(key, {key: points[key]}) for key in rest]


def checkpoint_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The held-out reward against the benchmarks: one chart if all are shares, else one each. rows: `evals.jsonl`."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        values = {"reward/held-out reward": row.get("reward/held_out")}
        for name, value in (values | {f"score/{name}": mean for name, mean in row.get("scores", {}).items()}).items():
            if value is not None:
                found.setdefault(name, []).append((row["step"], value))
    reward = {name: points for name, points in found.items() if name.startswith("reward/")}
    scores = {name: points for name, points in found.items() if name not in reward}
    charts = {"Held-out reward, by checkpoint": reward, "Benchmarks, by checkpoint": scores}
    if all(0 <= value <= 1 for points in found.values() for _, value in points):
        charts = {"Reward against benchmarks, by checkpoint": found}
    return [line_chart(title, chart) for title, chart in charts.items() if chart]


def line_chart(title: str, series: Mapping[str, Points]) -> Chart:
    """series: metric -> (step, value) points. Lines are means of neighbouring steps, their range drawn faint behind."""
    binned = {key.split("/", 1)[-1].replace("_", " "): _bin(points) for key, points in series.items()}
    values = np.concatenate([bins[1:] for bins in binned.values()], axis=1)
    low, high = float(values.min()), float(values.max())
    logarithmic = next(iter(series)).startswith(LOGARITHMIC) and 0 < low < high / 30
    shapes = [[("band", upper, lower), ("line", mean)] for _, mean, lower, upper in binned.values()]
    svg = _svg(title, binned, (_log_scale if logarithmic else _linear_scale)(low, high), shapes)
    legend = [(name, format_number(points[-1][1])) for name, points in zip(binned, series.values(), strict=True)]
    return Chart(title, svg, "", tuple(legend)) if len(legend) > 1 else Chart(title, svg, legend[0][1], ())


def time_chart(title: str, times: Mapping[int, Mapping[str, float]]) -> Chart:
    """times: step -> phase -> seconds. Phases are stacked, the longest at the bottom."""
    names = dict.fromkeys(name for row in times.values() for name in row)
    binned = {name: _bin([(step, row.get(name, 0.0)) for step, row in times.items()]) for name in names}
    binned = dict(sorted(binned.items(), key=lambda item: -item[1][1].sum()))
    means = [bins[1] for bins in binned.values()]
    edges = np.cumsum([np.zeros_like(means[0]), *means], axis=0)
    scale = _linear_scale(0.0, float(np.percentile(edges[-1], 99)))
    svg = _svg(title, binned, scale, [[("area", top, below)] for below, top in pairwise(edges)])
    *medians, total = (f"{format_number(float(np.median(seconds)))} s" for seconds in (*means, edges[-1]))
    return Chart(title, svg, total, tuple(zip(binned, medians, strict=True)))


def heat_map(title: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    """rows: `step`, and `load` [L, E] in percent of the mean. A line of cells for each expert, of large models for each
    layer's most loaded one; the darker, the more tokens: none is white, twice the mean or more is black."""
    load = np.array([row["load"] for row in rows], float)
    layers, lines = load.shape[1:] if load[0].size <= MOST_LINES else (load.shape[1], 1)
    load = load if lines > 1 else load.max(-1, keepdims=True)
    edges = np.unique(np.linspace(0, len(rows), min(BINS // 2, len(rows)) + 1).astype(int))[:-1]
    means = np.add.reduceat(load.reshape(len(rows), -1), edges) / np.diff([*edges, len(rows)])[:, None]
    width, height = (RIGHT - LEFT) / len(edges), (BOTTOM - TOP) / (layers * lines)
    shade = np.clip(means / 200 * SHADES, 0, SHADES).round().astype(int)
    parts = []
    for level in range(1, SHADES + 1):
        cells = (
            f"M{LEFT + x * width:.1f},{TOP + y * height:.2f}h{width:.1f}v{height:.2f}h-{width:.1f}z"
            for x, y in np.argwhere(shade == level)
        )
        parts.append(f'<path class="heat" fill-opacity="{level / SHADES:g}" d="{"".join(cells)}"/>')
    for layer in range(layers):
        top = TOP + layer * lines * height
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{top:.1f}" y2="{top:.1f}"/>')
        if layer % math.ceil(layers / 8) == 0:
            parts.append(f'<text x="{LEFT - 6}" y="{top + 10:.1f}" text-anchor="end">MoE {layer + 1}</text>')
    for x, row, anchor in ((LEFT, rows[0], "start"), (RIGHT, rows[-1], "end")):
        parts.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{row["step"]}</text>')
    opening = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
    return Chart(title, Markup(opening + "".join(parts) + "</svg>"), f"at most {means[-1].max() / 100:.1f} x", ())


def half_width(rows: Sequence[TaxRow]) -> float:
    """The scale that all rows of a table share, one digit: every interval fits, and zero is in the middle."""
    most = max([1e-6, *(abs(end) for row in rows for end in (row.low, row.high, row.difference) if math.isfinite(end))])
    power = 10.0 ** math.floor(math.log10(most))
    return math.ceil(most / power) * power


def _bin(points: Points) -> np.ndarray:
    """Steps, means, minima and maxima of at most BINS neighbourhoods: [4, bins]."""
    both = np.array(points, dtype=float).T
    edges = np.unique(np.linspace(0, len(points), min(BINS, len(points)) + 1).astype(int))[:-1]
    means = np.add.reduceat(both, edges, axis=1) / np.diff([*edges, len(points)])
    return np.array([*means, np.minimum.reduceat(both[1], edges), np.maximum.reduceat(both[1], edges)])


def _linear_scale(low: float, high: float) -> Scale:
    if 0 < low < 0.5 * high:
        low = 0.0
    if high - low <= 1e-9 * max(abs(high), abs(low)):
        room = abs(high) / 2 or 0.5
        low, high = low - room, high + room
    ticks = [(t, f"{t:.5g}".replace("e-0", "e-").replace("e+0", "e")) for t in nice_ticks(low, high, 4)]
    high += 0.03 * (high - low)
    return lambda values: np.interp(values, (low, high), (BOTTOM, TOP)), ticks


def _log_scale(low: float, high: float) -> Scale:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    ticks = [(10.0**e, f"1e{e}") for e in range(first, last + 1, math.ceil((last - first) / 4))]
    return lambda values: np.interp(np.log10(values), (first, last), (BOTTOM, TOP)), ticks


def nice_ticks(low: float, high: float, most: int) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) within [low, high]; at most `most` + 1."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    gap = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    return [gap * i for i in range(math.ceil(low / gap - 1e-9), math.floor(high / gap + 1e-9) + 1)]


def _svg(title: str, binned: Mapping[str, np.ndarray], scale: Scale, shapes: Sequence[Sequence[Any]]) -> Markup:
    """Axes, shapes, and the numbers that the pointer reads. shapes: of each series, a kind and its one or two edges."""
    y, ticks = scale
    first, last = min(bins[0][0] for bins in binned.values()), max(bins[0][-1] for bins in binned.values())
    ends = (first, last) if first < last else (first - 1, last + 1)
    parts = []
    for value, label in ticks:
        at = f"{y(value):.1f}"
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at}" dy="3" text-anchor="end">{label}</text>')
    for step in nice_ticks(first, last, 5) if last - first >= 5 else sorted({first, last}):
        if step == int(step):
            x = np.interp(step, ends, (LEFT, RIGHT))
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 5}" text-anchor="middle">{step:g}</text>')
    for color, (bins, drawn) in enumerate(zip(binned.values(), shapes, strict=True)):
        x = np.interp(bins[0], ends, (LEFT, RIGHT))
        for kind, top, *bottom in drawn:
            ways = [(x, y(top)), *((x[::-1], y(edge)[::-1]) for edge in bottom)]
            d = "L".join(f"{across:.1f},{up:.1f}" for way in ways for across, up in zip(*way, strict=True))
            parts.append(f'<path class="{kind} c{color % 6}" d="M{d}{"Z" if bottom else ""}"/>')
    data = {name: [[round(s), float(f"{v:.4g}")] for s, v in bins[:2].T.tolist()] for name, bins in binned.items()}
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" data-left="{LEFT}" '
        f'data-right="{RIGHT}" data-series="{escape(json.dumps(data, separators=(",", ":")))}">{"".join(parts)}'
        f'<line class="cursor" y1="{TOP}" y2="{BOTTOM}" visibility="hidden"/></svg>'
    )
