"""Small static charts as inline SVG, and which metrics become which. Colours and fonts come from the style sheet."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
import yaml
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from alignment.grpo import BENCHMARK
from alignment.tax import TaxRow
from recipes.progress import format_number

STYLE = Path(__file__).with_name("charts.mplstyle")
BINS, MOST_LINES = 80, 128
SHADES = LinearSegmentedColormap.from_list("load", ["#2f62c900", "#2f62c9"])
KNOWN: dict[str, list[str]] = yaml.safe_load(Path(__file__).with_name("charts.yaml").read_text(encoding="utf-8"))
REWARD_TOTALS = ("reward/mean", "reward/std", "reward/masked")
LOGARITHMIC = ("mismatch/", "handover/")


class Chart(NamedTuple):
    """What the page shows: `legend` is name and last value of each line, in colour order; empty for a single one."""

    title: str
    svg: Markup
    last: str
    legend: tuple[tuple[str, str], ...]


def stage_charts(stage: Mapping[str, Any]) -> tuple[list[Chart], list[Chart]]:
    """The charts of a stage's rows of `metrics`, `evals` and `experts`; after them those that nobody asks for first."""
    rows = stage["metrics"]
    metrics = _frame(rows, [row["step"] for row in rows]).drop(columns="step", errors="ignore")
    parts = [key for key in metrics if key.startswith("reward/") and key.count("/") == 1 and key not in REWARD_TOTALS]
    if len(parts) == 1 and metrics[parts[0]].equals(metrics.get("reward/mean")):
        parts = []
    tokens = [key for key in metrics if key.startswith("tokens/")]
    titles = KNOWN | {"Reward by function": parts, "Tokens per step": tokens}
    first = checkpoint_charts(stage["evals"])
    first += [line_chart(title, chosen) for title, keys in titles.items() if (chosen := metrics.filter(keys)).size]
    times = _frame(map(phases, rows), metrics.index)
    if times.size:
        first.append(time_chart("Time per step", times.fillna(0.0)))
    if stage["experts"]:
        first.append(heat_map("Load of the experts", stage["experts"]))
    used = {key for keys in titles.values() for key in keys}
    rest = [key for key in metrics if key not in used and not key.startswith("time/") and metrics[key].any()]
    return first, [line_chart(key, metrics[[key]]) for key in rest]


def phases(row: Mapping[str, Any]) -> dict[str, float]:
    """Phase name -> seconds of one step; what `time/step`, the whole, has beyond the phases is `other`."""
    named = {key[5:]: value or 0.0 for key, value in row.items() if key.startswith("time/") and key != "time/step"}
    return named | ({"other": max(0.0, row["time/step"] - sum(named.values()))} if row.get("time/step") else {})


def checkpoint_charts(rows: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The held-out reward against the benchmarks: one chart if all are shares, else one each. rows: `evals.jsonl`."""
    scores = [{f"score/{name}": mean for name, mean in row.get("scores", {}).items()} for row in rows]
    rewards = [{f"reward/{BENCHMARK}": row.get("reward/held_out")} for row in rows]
    found = _frame(map(dict.__or__, rewards, scores), [row["step"] for row in rows])
    charts = {"Held-out reward, by checkpoint": "^reward/", "Benchmarks, by checkpoint": "^score/"}
    if found.stack().dropna().between(0, 1).all():
        charts = {"Reward against benchmarks, by checkpoint": "."}
    parts = {title: found.filter(regex=names) for title, names in charts.items()}
    return [line_chart(title, part) for title, part in parts.items() if part.size]


@matplotlib.rc_context(fname=STYLE)
def line_chart(title: str, metrics: pd.DataFrame) -> Chart:
    """metrics: a column each, by step. Lines are means of neighbouring steps, their range drawn faint behind."""
    axes, legend = _axes(), []
    for key, values in metrics.items():
        bins = _bins(values.dropna())
        steps, means = bins.mean().to_numpy().T
        (line,) = axes.plot(steps, means, marker="." if len(means) == 1 else "")
        axes.fill_between(steps, bins[key].min(), bins[key].max(), color=line.get_color(), alpha=0.15)
        legend.append((key.split("/", 1)[-1].replace("_", " "), format_number(values.dropna().iloc[-1])))
    low, high = metrics.min(axis=None), metrics.max(axis=None)
    if metrics.columns[0].startswith(LOGARITHMIC) and 0 < low < high / 30:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    elif 0 < low < 0.5 * high:
        axes.set_ylim(bottom=0)
    last = "" if len(legend) > 1 else legend.pop()[1]
    return Chart(title, _svg(axes), last, tuple(legend))


@matplotlib.rc_context(fname=STYLE)
def time_chart(title: str, times: pd.DataFrame) -> Chart:
    """times: seconds of each phase, by step. Phases are stacked, the longest at the bottom."""
    times = times[times.sum().sort_values(ascending=False).index]
    axes, means = _axes(), _bins(times).mean().set_index("step")
    axes.stackplot(means.index, means.to_numpy().T, alpha=0.75)
    axes.set_ylim(0, np.percentile(means.sum(axis=1), 99) or 1)
    *medians, total = (f"{format_number(value)} s" for value in (*times.median(), times.sum(axis=1).median()))
    return Chart(title, _svg(axes), total, tuple(zip(times, medians, strict=True)))


@matplotlib.rc_context(fname=STYLE)
def heat_map(title: str, rows: Sequence[Mapping[str, Any]]) -> Chart:
    """rows: `step`, and `load` [L, E] in percent of the mean. A line of cells for each expert, of large models for each
    layer's most loaded one; the darker, the more tokens: none is blank, twice the mean or more is full."""
    load = np.array([row["load"] for row in rows], float)
    lines = load if load[0].size <= MOST_LINES else load.max(-1)
    first, last, layers = rows[0]["step"], rows[-1]["step"] + 1, load.shape[1]
    cells = _frame(lines.reshape(len(rows), -1), [row["step"] for row in rows])
    means, axes = _bins(cells).mean().set_index("step").to_numpy(), _axes()
    box = (first, last, layers + 0.5, 0.5)
    axes.grid(False)
    axes.imshow(means.T, SHADES, aspect="auto", interpolation="none", vmin=0, vmax=200, extent=box)
    axes.hlines(np.arange(layers) + 0.5, first, last, "#0000c6", linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter("MoE {x:.0f}")
    return Chart(title, _svg(axes), f"at most {means[-1].max() / 100:.1f} x", ())


def half_width(rows: Sequence[TaxRow]) -> float:
    """The scale that all rows of a table share, one digit: every interval fits, and zero is in the middle."""
    most = max([1e-6, *(abs(end) for row in rows for end in (row.low, row.high, row.difference) if math.isfinite(end))])
    power = 10.0 ** math.floor(math.log10(most))
    return math.ceil(most / power) * power


def _frame(rows: Any, steps: Sequence[int] | pd.Index) -> pd.DataFrame:
    """Numbers by step; a column without any is left out."""
    index = pd.Index(steps, name="step")
    return pd.DataFrame(list(rows), index, dtype=float).dropna(axis=1, how="all")


def _bins(values: pd.Series | pd.DataFrame) -> Any:
    """At most BINS groups of neighbouring rows; `step` is a column of theirs."""
    return values.reset_index().groupby(np.arange(len(values)) * BINS // max(BINS, len(values)))


def _axes() -> Axes:
    axes = Figure().subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.yaxis.set_major_formatter("{x:.5g}")
    return axes


def _svg(axes: Axes) -> Markup:
    """The figure as an element of a page: without what makes it a file, and in the page's own colours."""
    file = io.StringIO()
    axes.figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()[file.getvalue().index("<svg") :]
    return Markup(re.sub("#0000c([0-6])", r"var(--c\1)", re.sub(' xmlns(:xlink)?="[^"]*"', "", svg, count=2)))
