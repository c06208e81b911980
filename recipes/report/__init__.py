"""One self-contained HTML page about a run: what each stage gave and what it cost."""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.grpo import BENCHMARK
from alignment.metrics import read, write_text
from alignment.tax import load_results, row_from_json
from recipes.progress import format_number, format_seconds, step_tokens
from recipes.report.charts import half_width, stage_charts
from recipes.resume import StageFolder

SAMPLED_PROMPTS, SAMPLED_COMPLETIONS, LONGEST_TEXT, MOST_LOST = 4, 4, 3000, 5


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what lies in the folder, of a finished run or not; its path.

    Raises ValueError when `run_dir` is no run folder or a file in it is damaged."""
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, **blocks)
    environment.filters |= {"number": format_number, "seconds": format_seconds, "text": shown_text}
    page = environment.get_template("page.html").render(
        read_run(run_dir), half_width=half_width, stage_charts=stage_charts
    )
    return write_text(run_dir / "report.html", page)


def read_run(run_dir: Path) -> dict[str, Any]:
    """What the page shows of a run folder; empty where a file is not there yet.

    recipe, versions, contamination (None: unknown): as their files hold them; recipe_text: the first as it is written.
    tables: those of `tax.json`, their `rows` as TaxRows, and the items `lost` of benchmarks that got worse.
    stages: those of the recipe, begun or not: see `_stage`.

    Raises ValueError when `run_dir` is no run folder, or a file in it is damaged."""
    recipe = _load(run_dir / "recipe.yaml", yaml.safe_load)
    if recipe is None:
        raise ValueError(
            f"{run_dir} is no run folder: it has no recipe.yaml; give the folder that `align run --output` wrote"
        )
    tables = []
    for table in _load(run_dir / "tax.json", json.loads) or []:  # a reward and benchmarks have no scale in common
        by_scale = groupby(map(row_from_json, table["rows"]), lambda row: row.benchmark == BENCHMARK)
        tables += [table | {"rows": list(rows)} for _, rows in by_scale]
    stages = [_stage(run_dir, number, *next(iter(s.items()))) for number, s in enumerate(recipe["stages"], start=1)]
    folders = {name.split("-", 1)[1]: run_dir / name for name in ("00-base", *(stage["folder"] for stage in stages))}
    return {
        "recipe": recipe,
        "recipe_text": (run_dir / "recipe.yaml").read_text(encoding="utf-8"),
        "versions": _load(run_dir / "versions.json", json.loads),
        "tables": [table | {"lost": _lost_items(table, folders)} for table in tables],
        "stages": stages,
        "contamination": _load(run_dir / "contamination.json", json.loads),
    }


def _load(path: Path, parser: Callable[[str], Any]) -> Any:
    """What the file holds; None if there is none."""
    try:
        return parser(path.read_text(encoding="utf-8")) if path.is_file() else None
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}; the file was edited or damaged") from error


def _stage(run_dir: Path, number: int, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """`folder`: its name; the rows of `metrics`, `experts` and `evals`; a list of `samples` for each prompt that is
    shown; the steps `planned`, if it says so; the `seconds` and `tokens` of all steps; whether it is `finished`."""
    folder = StageFolder(run_dir, number, config.get("name") or kind)
    files = {"metrics": folder.metrics, "samples": folder.samples, "experts": folder.experts, "evals": folder.evals}
    rows = {name: read(path) if path.is_file() else [] for name, path in files.items()}
    return rows | {
        "folder": folder.path.name,
        "samples": _choose(rows["samples"]),
        "planned": config.get("steps"),
        "seconds": sum(row.get("time/step") or 0.0 for row in rows["metrics"]),
        "tokens": sum(map(step_tokens, rows["metrics"])),
        "finished": folder.final.is_dir(),
    }


def _lost_items(table: Mapping[str, Any], folders: Mapping[str, Path]) -> list[dict[str, str]]:
    """Of each benchmark that got worse, the items that lost most, if both evals are there to show them: `benchmark`,
    `prompt`, `target` and both completions, `before` and `after`."""
    worse = {row.benchmark for row in table["rows"] if row.verdict < 0}
    places = ((table["before"], "evals"), (table["after"], table["evals"]))
    evals = [folders[name] / place for name, place in places if name in folders]
    if not worse or sum((e / name).is_file() for e in evals for name in ("results.json", "samples.jsonl")) < 4:
        return []
    lost, samples = [], [read(folder / "samples.jsonl") for folder in evals]
    for old, new in zip(*(load_results(folder / "results.json") for folder in evals), strict=True):
        changes = (new.values - old.values) * (1 if old.higher_is_better else -1)
        for item in np.argsort(changes, kind="stable")[:MOST_LOST] if worse & {old.task, old.name} else ():
            if changes[item] < 0:  # a task's first filter, which its result is of, comes first
                pair = [[row for row in side if row["task"] == old.task][item] for side in samples]
                asked = {"prompt": pair[0]["arguments"][0][0], "target": str(pair[0]["target"])}
                before, after = map(_answer, pair)
                lost.append({"benchmark": old.task, **asked, "before": before, "after": after})
    return lost


def _answer(sample: Mapping[str, Any]) -> str:
    """The completion, or the choices with their log-likelihoods."""
    pairs = zip(sample["arguments"], sample["resps"], strict=True)
    answers = ((arguments[-1], responses[0]) for arguments, responses in pairs)
    return "\n".join(got if isinstance(got, str) else f"{np.ravel(got)[0]:.2f}  {text}" for text, got in answers)


def _choose(rows: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of a few prompts, from the first step to the last, the best completions and the worst.

    A masked completion, which has no reward, is the worst."""
    groups = [list(group) for _, group in groupby(rows, key=itemgetter("step", "prompt_index"))]
    places = np.linspace(0, len(groups) - 1, min(SAMPLED_PROMPTS, len(groups)), dtype=int)
    half, best_first = SAMPLED_COMPLETIONS // 2, lambda row: (row["reward"] is None, -(row["reward"] or 0.0))
    ranked = [sorted(groups[place], key=best_first) for place in places]
    return [group[:half] + group[half:][-half:] for group in ranked]


def shown_text(value: str | list[dict[str, Any]]) -> str:
    """A string as it is, chat messages with their roles; the middle of a very long one is left out."""
    text = value if isinstance(value, str) else "\n\n".join(f"{m['role']}: {m['content']}" for m in value)
    half, cut = LONGEST_TEXT // 2, len(text) - LONGEST_TEXT
    return text if cut <= 0 else f"{text[:half]}\n[… {cut:,} characters left out …]\n{text[-half:]}"
