"""What a person sees while a stage runs: a live line on a terminal, a plain line now and then elsewhere."""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn
from rich.table import Table
from rich.text import Text

from alignment.tax import TaxRow

WINDOW, EVERY = 20, 10.0
"""Steps over which speed is averaged; seconds between two plain lines."""


class StageProgress(Progress):
    """Progress of one stage: steps, reward or loss, tokens/s, time left.

    total: the stage's last step; first: steps that were done before (a resumed stage starts there).
    On a terminal one live line; elsewhere the first and the last step and at most one line every EVERY seconds."""

    def __init__(self, name: str, total: int, console: Console, *, first: int = 0) -> None:
        bar = (SpinnerColumn(), "[bold]{task.description}", BarColumn(24, complete_style="cyan"), "{task.fields[line]}")
        super().__init__(*bar, console=console, disable=not console.is_terminal)
        self._stage = self.add_task(name, total=total, completed=first, line="starting")
        self._recent = deque([(self.get_time(), 0.0)], maxlen=WINDOW + 1)  # (time, tokens so far) after each step
        self._printed = -math.inf

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` (from 1) is done, with its metrics."""
        now, total = self.get_time(), self.tasks[0].total
        self._recent.append((now, self._recent[-1][1] + step_tokens(metrics)))
        seconds, tokens = (last - first for first, last in zip(self._recent[0], self._recent[-1], strict=True))
        shown = ("reward/mean", "kl", "mismatch/k3") if "reward/mean" in metrics else ("loss",)
        parts = [f"{step:>{len(str(total))}}/{total}"]
        parts += [f"{key.split('/')[0]} {format_number(metrics[key])}" for key in shown if key in metrics]
        if tokens and seconds:
            parts.append(f"{tokens / seconds:,.0f} tokens/s")
        left = (total - step) * seconds / (len(self._recent) - 1)
        line = " · ".join([*parts, f"{format_seconds(left)} left" if step < total else "done"])
        self.update(self._stage, completed=step, line=line)
        if self.disable and (step == total or now - self._printed >= EVERY):
            self._printed = now
            self.console.print(Text(f"{self.tasks[0].description}  {line}"), soft_wrap=True)


def step_tokens(metrics: Mapping[str, float]) -> float:
    """Tokens that a step worked on: `tokens/total` of SFT, prompts and completions of GRPO."""
    return sum(metrics.get(f"tokens/{part}") or 0.0 for part in ("total", "prompt", "completion"))


def format_number(value: float | None) -> str:
    """0.412, 12.3, 8,412, 3.1e-05; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if 0 < abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{3 if abs(value) < 10 else 1}f}"


def format_seconds(seconds: float) -> str:
    """`0:03:05`."""
    return str(timedelta(seconds=round(seconds)))


def print_tax(rows: Sequence[TaxRow], console: Console, *, before: str = "before", after: str = "after") -> None:
    """Print a tax table, 80 columns wide with names of up to 28; a difference is coloured where its interval leaves out
    zero."""
    table = Table(header_style="dim", box=None, padding=(0, 1, 0, 0))
    table.add_column("benchmark", overflow="fold")
    for name in ("before", "after", "diff", "95% interval", "gained", "lost"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        means, flips = (f"{row.before:.3f}", f"{row.after:.3f}"), (f"{row.gained:,}", f"{row.lost:,}")
        difference = Text(f"{row.difference:+.3f}", style={1: "green", -1: "red", 0: ""}[row.verdict])
        interval = Text("–" if math.isnan(row.low) else f"{row.low:+.3f} … {row.high:+.3f}", style="dim")
        table.add_row(Text(row.benchmark), *means, difference, interval, *flips)
    console.print(Text(f"{before} → {after}", style="bold"), table, sep="\n")
