"""What a person sees while a stage runs: a live line on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table
from rich.text import Text

from alignment.tax import TaxRow

WINDOW = 20
"""Steps over which speed is averaged."""


class StageProgress:
    """Progress of one stage: steps, reward or loss, tokens/s, time left.

    total: the stage's last step; first: steps that were done before (a resumed stage starts there).
    On a terminal one live line; elsewhere the first and the last step and at most one line every `every` seconds.
    """

    def __init__(
        self,
        name: str,
        total: int,
        console: Console,
        *,
        first: int = 0,
        every: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total, self._console, self._every, self._clock = name, total, console, every, clock
        self._recent: deque[tuple[float, float]] = deque([(clock(), 0.0)], maxlen=WINDOW + 1)
        self._printed: float | None = None
        self._first, self._live, self._task = first, None, TaskID(0)
        if console.is_terminal:
            columns = (SpinnerColumn(), TextColumn("[bold]{task.description}"), BarColumn(24, complete_style="cyan"))
            self._live = Progress(*columns, TextColumn("{task.fields[line]}"), console=console)

    def __enter__(self) -> StageProgress:
        self._recent.clear()
        self._recent.append((self._clock(), 0.0))
        if self._live is not None:
            self._live.start()
            self._task = self._live.add_task(self._name, total=self._total, completed=self._first, line="starting")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show that `step` (from 1) is done, with its metrics."""
        now = self._clock()
        self._recent.append((now, step_tokens(metrics)))
        line = self._line(step, metrics)
        if self._live is not None:
            self._live.update(self._task, completed=step, line=line)
        elif self._printed is None or step == self._total or now - self._printed >= self._every:
            self._printed = now
            self._console.print(Text(f"{self._name}  {line}"), soft_wrap=True)

    def print(self, *what: RenderableType) -> None:
        """Print above the live line."""
        self._console.print(*what)

    def _line(self, step: int, metrics: Mapping[str, float]) -> str:
        parts = [f"{step:>{len(str(self._total))}}/{self._total}"]
        shown = ("reward/mean", "kl", "mismatch/k3") if "reward/mean" in metrics else ("loss",)
        parts += [f"{key.split('/')[0]} {format_number(metrics[key])}" for key in shown if key in metrics]
        seconds = self._recent[-1][0] - self._recent[0][0]
        steps = len(self._recent) - 1
        tokens = sum(tokens for _, tokens in list(self._recent)[1:])
        if seconds > 0:
            if tokens > 0:
                parts.append(f"{tokens / seconds:,.0f} tokens/s")
            left = (self._total - step) * seconds / steps
            parts.append(f"{format_seconds(left)} left" if step < self._total else "done")
        return " · ".join(parts)


def step_tokens(metrics: Mapping[str, float]) -> float:
    """Tokens that a step worked on: `tokens/total`, or prompts and completions."""
    if "tokens/total" in metrics:
        return metrics["tokens/total"]
    return metrics.get("tokens/prompt", 0.0) + metrics.get("tokens/completion", 0.0)


def format_number(value: float | None) -> str:
    """Three decimals, or two digits and an exponent where these would hide the value; a dash for none."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:.3f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def format_seconds(seconds: float) -> str:
    """`42s`, `3m 05s`, `2h 10m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def print_tax(rows: Sequence[TaxRow], console: Console, *, before: str = "before", after: str = "after") -> None:
    """Print a tax table; a difference whose interval leaves out zero is coloured, and named in words."""
    table = Table(title=f"{before} → {after}", title_justify="left", title_style="bold", header_style="dim", box=None)
    table.add_column("benchmark")
    for name in ("before", "after", "difference", "95% interval", "gained", "lost", "items"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for row in rows:
        style = {1: "green", -1: "red", 0: ""}[row.verdict]
        interval = "–" if math.isnan(row.low) else f"{row.low:+.3f} … {row.high:+.3f}"
        table.add_row(
            Text(row.benchmark),
            f"{row.before:.3f}",
            f"{row.after:.3f}",
            Text(f"{row.difference:+.3f}", style=style),
            Text(interval, style="dim"),
            *(f"{count:,}" for count in (row.gained, row.lost, row.n)),
            Text({1: "better", -1: "worse", 0: ""}[row.verdict], style=style),
        )
    console.print(table)
