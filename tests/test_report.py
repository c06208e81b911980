"""The report page of whole, half-finished and damaged run folders."""

import base64
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_run import DEMO
from PIL import Image

from alignment.metrics import append
from alignment.tax import row_from_json
from recipes.report import read_run, write_report
from recipes.report.charts import Chart, half_width, heat_map, line_chart, phases, stage_charts, time_chart


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
        links = [value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")]
        self.fetched += [link for link in links if not link.startswith(("#", "data:"))]
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
    titles = re.findall(r"<figcaption>(.*?)<span", html)
    for title in ("Reward", "Reward by function", "Sampler against trainer", "Time per step", "Entropy"):
        assert titles.count(title) == 1 + (title == "Time per step")
    assert titles.count("Loss") == titles.count("Learning rate") == 2
    assert "400 of 400 steps" in page.text and "350 of 350 steps" in page.text
    stage = read_run(run_dir)["stages"][1]
    first, more = stage_charts(stage | {"evals": []})
    lines = sum(len(chart.legend) or 1 for chart in first + more if chart.title != "Time per step")
    logged = {key for row in stage["metrics"] for key, value in row.items() if value and not key.startswith("time/")}
    assert lines == len(logged - {"step"})
    times = next(chart for chart in first if chart.title == "Time per step")
    assert [name for name, _ in times.legend] == ["generate", "train", "other", "handover"]


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
    assert "script" not in page.tags and "img" not in page.tags and page.open == []
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
    assert "<figcaption>Loss" in html and "<figcaption>Gradient norm" not in html


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
    stage = read_run(run_dir)["stages"][1]
    assert [group[0]["step"] for group in stage["samples"]] == [1, 101, 250, 350]
    for group in stage["samples"]:
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
    (group,) = read_run(run_dir)["stages"][1]["samples"]
    assert [sample["completion"] for sample in group] == ["1.0", "0.0", "None"]
    render(run_dir)


def test_time_beyond_the_phases_is_shown():
    assert phases({"time/a": 0.5, "time/b": 0.25, "time/step": 1.0}) == {"a": 0.5, "b": 0.25, "other": 0.25}
    assert phases({"time/a": 0.5, "time/step": 0.4}) == {"a": 0.5, "other": 0.0}
    assert phases({"time/a": None, "loss": 1.0}) == {"a": 0.0}


def by_step(values: list[float], **more: list[float]) -> pd.DataFrame:
    return pd.DataFrame({"x": values, **more}, pd.RangeIndex(1, len(values) + 1, name="step"))


def paths(chart: Chart, kind: str, color: int) -> list[np.ndarray]:
    """The corners (x, y) of what is drawn in a colour. kind: `stroke` for lines, `fill` for areas."""
    style = rf'[^>]* style="[^"]*{kind}: var\(--c{color}\)'
    found = re.findall(rf'<path d="([^"]*)"{style}', chart.svg)
    shared = re.findall(rf'<use xlink:href="#(\w+)"{style}', chart.svg)
    found += [re.search(rf'<path id="{name}" d="([^"]*)"', chart.svg)[1] for name in shared]
    return [np.array([pair.split() for pair in re.findall(r"[ML] (\S+ \S+)", d)], float) for d in found]


def heights(chart: Chart) -> dict[float, float]:
    """Number at the left axis -> its height on the page."""
    labels = re.findall(r'text-anchor: end" x="[\d.]+" y="([\d.]+)"[^>]*>([^<]*)<', chart.svg)
    return {float(label.replace("−", "-")): float(y) for y, label in labels}


def test_long_runs_stay_small_and_keep_their_spikes():
    values = [0.0 if step != 7777 else 9.0 for step in range(1, 20_001)]
    chart = line_chart("loss", by_step(values))
    assert len(chart.svg) < 20_000
    (line,), (band,) = paths(chart, "stroke", 0), paths(chart, "fill", 0)
    assert len(line) == 80 and np.ptp(band[:, 1]) > 100 > 10 * np.ptp(line[:, 1])
    assert chart.last == "0.000"


def test_a_line_has_its_points_where_the_numbers_are():
    chart = line_chart("reward", by_step([0.2, 0.5, 1.0], y=[1.0, math.nan, 0.2]))
    scale, ((x0, y0), (x1, y1), (x2, y2)) = heights(chart), paths(chart, "stroke", 0)[0]
    assert x1 - x0 == pytest.approx(x2 - x1, abs=1e-3) and x0 < x1
    assert y0 - y1 == pytest.approx(0.3 * (scale[0.0] - scale[1.0]), abs=1e-3)
    assert y1 - y2 == pytest.approx(0.5 * (scale[0.0] - scale[1.0]), abs=1e-3)
    (other,) = paths(chart, "stroke", 1)
    assert other.tolist() == [[x0, y2], [x2, y0]], "a missing value leaves its step out"
    assert chart.legend == (("x", "1.000"), ("y", "0.200"))


def test_constant_and_single_points_can_be_drawn():
    for values in ([0.0], [5.0], [0.0] * 9, [-3.0] * 9, [1e-12, 1e-12]):
        chart = line_chart("x", by_step(values).add_prefix("mismatch/"))
        assert "nan" not in chart.svg and "inf" not in chart.svg
        assert len(re.findall("<use[^>]*stroke", chart.svg)) == (len(values) == 1), "a single point is a dot"
    chart = time_chart("t", by_step([0.0], y=[0.0]))
    assert "nan" not in chart.svg and chart.last == "0.000 s"
    for rows in ([], [{"step": 1, "loss": None, "kl": math.nan}]):
        assert stage_charts({"metrics": rows, "evals": [], "experts": []}) == ([], [])


def test_on_a_logarithmic_scale_decades_are_equally_far_apart():
    chart = line_chart("x", by_step([5e-3, 5e-1]).add_prefix("mismatch/"))
    scale, ((_, first), (_, last)) = heights(chart), paths(chart, "stroke", 0)[0]
    assert scale.keys() == {1e-2, 1e-1}
    assert first - last == pytest.approx(2 * (scale[1e-2] - scale[1e-1]), abs=1e-3) and first > last
    assert len(heights(line_chart("x", by_step([5e-3, 5e-1])))) > 2, "other metrics have a linear one"


def test_phases_are_stacked_to_the_time_of_the_step():
    chart = time_chart("t", by_step([0.1] * 200, long=[0.3] * 200, none=[0.0] * 200))
    assert chart.legend == (("long", "0.300 s"), ("x", "0.100 s"), ("none", "0.000 s")) and chart.last == "0.400 s"
    (long,), (short,), scale = paths(chart, "fill", 0), paths(chart, "fill", 1), heights(chart)
    unit = (scale[0.0] - scale[0.2]) / 0.2
    assert long[:, 1].max() == pytest.approx(scale[0.0], abs=4), "a label stands a little below its line"
    assert np.ptp(long[:, 1]) == pytest.approx(0.3 * unit, abs=1e-3)
    assert np.ptp(short[:, 1]) == pytest.approx(0.1 * unit, abs=1e-3)
    assert short[:, 1].max() == pytest.approx(long[:, 1].min(), abs=1e-3)


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


def cells(chart: Chart) -> np.ndarray:
    """How full each cell of a heat map is: [lines, steps]."""
    data = base64.b64decode(re.search(r'href="data:image/png;base64,([^"]*)"', chart.svg)[1])
    found = np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 3] / 255
    return found[::-1] if "scale(1 -1)" in chart.svg else found


def test_the_heat_map_is_blank_without_tokens_and_full_from_twice_the_mean_on():
    load = [[0, 100, 200, 100], [400, 0, 0, 50]]
    chart = heat_map("experts", [{"step": step, "load": load} for step in (1, 2)])
    assert cells(chart) == pytest.approx(np.repeat([[0], [0.5], [1], [0.5], [1], [0], [0], [0.25]], 2, 1), abs=0.01)
    assert "MoE 1" in chart.svg and "MoE 2" in chart.svg and chart.last == "at most 4.0 x"
    steps = [{"step": step, "load": np.full((30, 160), step).tolist()} for step in range(1, 201)]
    many = cells(heat_map("experts", steps))
    assert many.shape == (30, 80), "of large models a line per layer"
    assert (np.diff(many, axis=1) >= 0).all() and many[:, -1] == pytest.approx(1, abs=0.02)
