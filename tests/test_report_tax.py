"""The report's tax section: groups, lost items, reward against benchmarks, eval items in training rows."""

from __future__ import annotations

import json

import numpy as np
from eval_fakes import BigramSampler
from test_evals import CHOICE, GENERATE, LETTERS, run, write_task
from test_report import render

from alignment.tax import TaskResult, compare, load_results, row_to_json, save_results
from recipes.report import read_run
from recipes.report.charts import checkpoint_charts
from recipes.resume import StageFolder

CHANGE = {"before": 0.5, "after": 0.4, "difference": -0.1, "low": -0.2, "high": -0.01, "gained": 0, "lost": 1, "n": 9}


def table(*rows: dict[str, object]) -> dict[str, object]:
    """A table of `tax.json`."""
    return {"stage": "grpo", "before": "sft", "after": "grpo", "evals": "evals", "gate": [], "rows": rows}


def test_the_line_of_a_group_is_marked_and_intervals_say_how_many_hold_at_once(run_dir):
    html, page = render(run_dir)
    assert html.count(' mean"') == 2 and page.text.count("95% interval, all 4 at once") == 2
    (run_dir / "tax.json").write_text(json.dumps([table({"benchmark": "sorting"} | CHANGE)]))
    _, page = render(run_dir)
    assert "95% interval gained" in page.text, "one that holds alone"


def test_items_that_a_benchmark_lost_are_shown_with_both_completions(run_dir):
    lost = [item for table in read_run(run_dir)["tables"] for item in table["lost"]]
    assert [item["benchmark"] for item in lost] == ["sorting"] * 5, "addition gained, reversing did not change"
    before, after = (load_results(run_dir / folder / "evals" / "results.json")[1] for folder in ("01-sft", "02-grpo"))
    first = [i for i, (b, a) in enumerate(zip(before.values, after.values, strict=True)) if b > a][:5]
    for number, item in zip(first, lost, strict=True):
        assert (item["prompt"], item["target"]) == (f"question {number} of sorting", f"sorting {number}")
        completions = (item["before"], item["after"])
        assert completions == (f"right {number} none in 01-sft", f"wrong {number} none in 02-grpo")
    _, page = render(run_dir)
    assert f"question {first[0]} of sorting before right {first[0]} none in 01-sft after wrong" in page.text
    assert page.text.count("lost items, both completions") == 1


def test_lost_items_of_choices_and_of_a_metric_where_lower_is_better(run_dir):
    def write(folder: str, values: list[float], resps: list[list[list[object]]]) -> None:
        evals = run_dir / folder / "evals"
        save_results(evals / "results.json", [TaskResult("choice", "loss", False, tuple("012"), np.array(values))])
        sample = {"task": "choice", "target": 1, "arguments": [["q", " <b>x"], ["q", " y"]], "resps": resps}
        (evals / "samples.jsonl").write_text(3 * (json.dumps(sample) + "\n"))

    write("01-sft", [1.0, 2.0, 3.0], [[[-1.5, False]], [[-0.25, True]]])
    write("02-grpo", [1.5, 2.0, 9.0], [[[-0.5, True]], [[-2.0, False]]])
    row = {"benchmark": "choice", "higher_is_better": False, "low": 1.0, "high": 3.0, "gained": 0, "lost": 2, "n": 3}
    rows = [row | {"before": 2.0, "after": 4.0, "difference": 2.0}]
    (run_dir / "tax.json").write_text(json.dumps([table(*rows)]))
    lost = read_run(run_dir)["tables"][0]["lost"]
    assert [item["after"] for item in lost] == ["-0.50   <b>x\n-2.00   y"] * 2, "the most first, the same never"
    html, _ = render(run_dir)
    assert "-1.50   &lt;b&gt;x" in html
    (run_dir / "01-sft" / "evals" / "samples.jsonl").unlink()
    assert read_run(run_dir)["tables"][0]["lost"] == []


def test_the_reward_stands_against_the_benchmarks_at_every_checkpoint(run_dir):
    html, _ = render(run_dir)
    assert html.count("<figcaption>Reward against benchmarks, by checkpoint") == 1
    (chart,) = checkpoint_charts(read_run(run_dir)["stages"][1]["evals"])
    assert chart.legend == (("held-out reward", "0.700"), ("addition", "0.510"), ("sorting", "0.900"))
    rows = [{"step": 5, "reward/held_out": -2.5, "scores": {"a/acc": 0.5, "b": 0.4}}, {"step": 9, "scores": {"b": 0.3}}]
    for score, shown in ((-2.5, "-2.500"), (2.5, "2.500")):
        reward, scores = checkpoint_charts([rows[0] | {"reward/held_out": score}, rows[1]])
        assert (reward.title, reward.last) == ("Held-out reward, by checkpoint", shown)
        assert scores.legend == (("a/acc", "0.500"), ("b", "0.300"))
    (both,) = checkpoint_charts([rows[0] | {"reward/held_out": 0.5}, rows[1]])  # a checkpoint without one is no reason
    assert both.title == "Reward against benchmarks, by checkpoint"
    assert checkpoint_charts([]) == []


def test_eval_items_in_training_rows_are_named(run_dir):
    _, page = render(run_dir)
    assert "3 of 1000 items of sorting stand in the data of sft, first in rows 7, 90: “sort b a”" in page.text
    (run_dir / "contamination.json").write_text("[]")
    assert "Eval items in training rows None" in render(run_dir)[1].text
    (run_dir / "contamination.json").unlink()
    assert "Eval items in training rows" not in render(run_dir)[1].text


def test_the_samples_that_lm_eval_leaves_are_read(run_dir, tmp_path):
    """Two policies, one of which answers in upper case: a task of two filters, choices, the likelihood of a text."""
    take = [{"function": "take_first"}]
    two = {"filter_list": [{"name": name, "filter": take} for name in ("plain", "again")]}
    metric = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{a}}",
        "metric_list": metric,
    }
    tasks = (
        write_task(tmp_path, "upper", LETTERS * 3, **GENERATE, **two),
        write_task(tmp_path, "choice", [{"q": "a", "c": ["b", "c"], "t": 0}] * 9, **CHOICE),
        write_task(tmp_path, "text", [{"a": "abab"}, {"a": "ab"}], **rolling),
    )
    found = [
        run(BigramSampler(lambda prompt, request: prompt[-2].upper()), tmp_path, *tasks),
        run(BigramSampler(lambda prompt, request: "no"), tmp_path, *tasks),
    ]
    for result in found[1][0][1:]:  # the sampler's own probabilities are fixed: a verdict is made up for the others
        result.values[:] += 1.0 if result.task == "text" else -1.0
    for number, name, results in zip((1, 2), ("sft", "grpo"), found, strict=True):
        StageFolder(run_dir, number, name).save_evals(*results)
    rows = [row_to_json(row) for row in compare(found[0][0], found[1][0])]
    (run_dir / "tax.json").write_text(json.dumps([table(*rows)]))
    lost = {item["benchmark"]: item for item in read_run(run_dir)["tables"][0]["lost"][::-1]}
    assert [lost["upper"][name] for name in ("prompt", "target", "before", "after")] == ["a=", "A", "A", "no"]
    assert lost["choice"]["before"] == "-0.69  b\n-1.39  c" and lost["text"]["before"].endswith("  abab")
    render(run_dir)
