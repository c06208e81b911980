"""The report page of whole, half-finished and damaged run folders."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fake_run import DEMO

from alignment.metrics import append
from alignment.tax import row_from_json
from recipes.report import write_report
from recipes.report.charts import BOTTOM, TOP, Chart, half_width, heat_map, line_chart, nice_ticks, time_chart
from recipes.report.data import phases, read_run


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
    for name in ("01-sft", "02-grpo"):
        samples = run_dir / name / "evals" / "samples.jsonl"
        samples.write_text(samples.read_text().replace("question", "<img src=q>").replace("right", "<script>"))
    checkpoint = {"step": 1, "reward/held_out": 0.5, "scores": {attack: 0.5}}
    (run_dir / "02-grpo" / "evals.jsonl").write_text(json.dumps(checkpoint) + "\n")
    found = {"source": attack, "task": attack, "contaminated": 3, "items": 9, "rows": [7], "words": attack}
    (run_dir / "contamination.json").write_text(json.dumps([found]))
    with (run_dir / "02-grpo" / "metrics.jsonl").open("a") as metrics:
        metrics.write(json.dumps({"step": 351, f"reward/{attack}": 0.5, "reward/b": 1.0}) + "\n")
    recipe = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(recipe.replace("name: demo\n", f"name: {json.dumps(attack)}\n", 1))
    _, page = render(run_dir)
    assert page.tags.count("script") == 1 and "img" not in page.tags and page.open == []
    assert f"user: {attack}" in page.text and "<img src=q>" in page.text


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
    assert "02-grpo No step is logged yet (metrics.jsonl)." in page.text


def test_a_run_that_has_only_begun_has_a_page(tmp_path):
    shutil.copy(DEMO, tmp_path / "recipe.yaml")
    _, page = render(tmp_path)
    assert page.text.count("No step is logged yet") == 2 and page.open == []
    metrics = tmp_path / "01-sft" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.touch()
    _, page = render(tmp_path)
    assert page.text.count("No step is logged yet") == 2
    append(metrics, [{"step": 1, "loss": 3.0, "grad_norm": None, "time/train": 0.1}])
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
    assert [group[0]["step"] for group in stage.samples] == [1, 101, 250, 350]
    for group in stage.samples:
        assert len(group) == 4 and len({sample["prompt"] for sample in group}) == 1
        assert group[0]["reward"] == max(s["reward"] for s in group)


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
        for r in (None, 0.0, 1.0)
    ]
    (run_dir / "02-grpo" / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,) = read_run(run_dir).stages[1].samples
    assert [sample["completion"] for sample in group] == ["1.0", "0.0", "None"]
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
        chart = line_chart("x", {"mismatch/x": list(enumerate(values, 1))})
        assert "nan" not in chart.svg and "inf" not in chart.svg
    assert "nan" not in time_chart("t", {1: {"a": 0.0, "b": 0.0}}).svg


def test_on_a_logarithmic_scale_decades_are_equally_far_apart():
    chart = line_chart("x", {"mismatch/x": [(1, 5e-3), (2, 5e-1)]})
    heights = {
        float(label): float(y) for y, label in re.findall(r'<text x="42" y="([\d.]+)"[^>]*>(1e[-\d]+)<', chart.svg)
    }
    assert heights.keys() == {1e-3, 1e-2, 1e-1, 1e0}
    gaps = [heights[10.0**e] - heights[10.0 ** (e + 1)] for e in (-3, -2, -1)]
    assert gaps == pytest.approx([gaps[0]] * 3, abs=0.2) and gaps[0] > 0
    path = re.search(r'class="line c0" d="M([^"]*)"', chart.svg)[1]
    (_, first), (_, last) = (map(float, pair.split(",")) for pair in path.split("L"))
    assert first - last == pytest.approx(2 * gaps[0], abs=0.2)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.37, 0.58), (-2, 9), (1, 350), (0, 5e-9), (3e7, 4e7)])
def test_ticks_are_few_round_and_within(low, high):
    ticks = nice_ticks(low, high, 4)
    assert 2 <= len(ticks) <= 5 and all(low - 1e-9 <= t <= high + 1e-9 * high for t in ticks)


def test_forest_bars_put_gains_right_of_zero(run_dir):
    html, _ = render(run_dir)
    bars = re.findall(r'class="interval" x1="([-\d.]+)" x2="([-\d.]+)".*?circle cx="([-\d.]+)"', html, re.DOTALL)
    tables = json.loads((run_dir / "tax.json").read_text())
    rows = [(row, half_width([row_from_json(r) for r in table["rows"]])) for table in tables for row in table["rows"]]
    assert len(bars) == len(rows)
    for bar, (row, scale) in zip(bars, rows, strict=True):
        ends = [row["low"], row["high"], row["difference"]]
        assert all(abs(end) <= scale for end in ends)
        assert [float(x) for x in bar] == pytest.approx([110 * end / scale for end in ends])


def cells(chart: Chart) -> dict[tuple[float, float], float]:
    """(x, y) of every drawn cell -> its darkness."""
    found = {}
    for darkness, path in re.findall(r'class="heat" fill-opacity="([\d.]+)" d="([^"]*)"', str(chart.svg)):
        found |= {(float(x), float(y)): float(darkness) for x, y in re.findall(r"M([\d.]+),([\d.]+)h", path)}
    return found


def test_the_heat_map_is_white_without_tokens_and_black_from_twice_the_mean_on():
    load = [[0, 100, 200, 100], [400, 0, 0, 0]]
    found = cells(heat_map("experts", [{"step": step, "load": load} for step in (1, 2)]))
    lines = sorted({y for _, y in found})
    assert [found[x, y] for x, y in sorted(found) if x == min(found)[0]] == [0.5, 1.0, 0.5, 1.0]
    assert len(found) == 8 and np.allclose(np.diff(lines), (BOTTOM - TOP) / 8 * np.array([1, 1, 1]), atol=0.01)
    steps = [{"step": step, "load": np.full((30, 160), 100).tolist()} for step in range(1, 200)]
    many = cells(heat_map("experts", steps))
    assert len({y for _, y in many}) == 30 and set(many.values()) == {0.5}, "of large models a line per layer"
