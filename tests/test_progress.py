"""What a terminal shows of a stage, and the tax table after it."""

from __future__ import annotations

import io
import math
import re

from rich.cells import cell_len
from rich.console import Console

from alignment.tax import TaxRow
from recipes.progress import StageProgress, format_number, format_seconds, print_tax


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_prints_first_last_and_few_between():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=60, get_time=clock)
    with StageProgress("grpo", 100, console) as progress:
        for step in range(1, 101):
            clock.now += 0.5
            progress.step(
                step, {"reward/mean": 0.4, "mismatch/k3": 2e-8, "tokens/prompt": 300.0, "tokens/completion": 200.0}
            )
    lines = out.getvalue().splitlines()
    assert [int(re.search(r"(\d+)/100", line)[1]) for line in lines] == [1, 21, 41, 61, 81, 100]
    assert lines[1] == "grpo   21/100 · reward 0.400 · mismatch 2.0e-08 · 1,000 tokens/s · 0:00:40 left"
    assert lines[-1].endswith("done")


def test_a_resumed_stage_estimates_from_its_own_steps():
    out, clock = io.StringIO(), Clock()
    with StageProgress("sft", 100, Console(file=out, get_time=clock), first=90) as progress:
        clock.now += 2
        progress.step(91, {"loss": 1.5, "tokens/total": 4000})
    assert out.getvalue() == "sft   91/100 · loss 1.500 · 2,000 tokens/s · 0:00:18 left\n"


def test_live_progress_shows_the_last_step():
    out = io.StringIO()
    with StageProgress("sft", 3, Console(file=out, force_terminal=True, width=100)) as progress:
        progress.step(1, {"loss": 1.5})
    assert "1/3 · loss 1.500" in out.getvalue()


def test_tax_table_fits_80_columns_with_full_names():
    out = io.StringIO()
    rows = [
        TaxRow("bbh_multistep_arithmetic_two", 0.361, 0.512, 0.151, 0.118, 0.184, 18_000, 2900, 100_000),
        TaxRow("add[it]ion", 0.361, 0.512, 0.151, 0.118, 0.184, 180, 29, 1000),
        TaxRow("f1", 1, 1, 0, math.nan, math.nan, 0, 0, 1),
    ]
    print_tax(rows, Console(file=out, width=80), before="sft", after="grpo")
    lines = out.getvalue().splitlines()
    assert len(lines) == 5 and max(map(cell_len, lines)) <= 80
    text = " ".join(out.getvalue().split())
    assert "sft → grpo benchmark before after diff 95% interval gained lost" in text
    assert "bbh_multistep_arithmetic_two 0.361 0.512 +0.151 +0.118 … +0.184 18,000 2,900" in text
    assert "add[it]ion 0.361 0.512 +0.151 +0.118 … +0.184 180 29" in text
    assert "f1 1.000 1.000 +0.000 – 0 0" in text


def test_numbers_and_times_are_short():
    assert [format_seconds(s) for s in (4.6, 65, 7800)] == ["0:00:05", "0:01:05", "2:10:00"]
    values = (0.0, 0.4, 12.34, 2e-8, 12345.6, math.nan, None)
    assert [format_number(v) for v in values] == ["0.000", "0.400", "12.3", "2.0e-08", "12,346", "–", "–"]
