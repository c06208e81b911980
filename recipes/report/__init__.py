"""One self-contained HTML page about a run: what each stage gave and what it cost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.files import write_text
from recipes.progress import format_number, format_seconds, step_tokens
from recipes.report.charts import Chart, checkpoint_charts, half_width, stage_charts
from recipes.report.data import Run, Stage, read_run, shown_text


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what lies in the folder, of a finished run or not; its path.

    Raises ValueError when `run_dir` is no run folder or a file in it is damaged.
    """
    run = read_run(run_dir)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "text": shown_text}
    page = environment.get_template("page.html").render(
        run=run,
        facts=_facts(run),
        stages=[(stage, _stage_facts(stage), *_charts(stage)) for stage in run.stages],
        half_width=half_width,
    )
    return write_text(run_dir / "report.html", page)


def _charts(stage: Stage) -> tuple[list[Chart], list[Chart]]:
    first, more = stage_charts(stage.metrics, stage.experts)
    return checkpoint_charts(stage.evals) + first, more


def _facts(run: Run) -> dict[str, Any]:
    model, seconds = run.recipe["model"], sum(stage.seconds for stage in run.stages)
    facts = {"model": model.get("path") or model["init"]["preset"], "seed": run.recipe.get("seed", 0)}
    return facts | {"time in steps": format_seconds(seconds)}


def _stage_facts(stage: Stage) -> list[str]:
    if not stage.metrics:
        return []
    steps, tokens = stage.metrics[-1]["step"], sum(map(step_tokens, stage.metrics))
    facts = [f"{steps:,} of {stage.planned:,} steps" if stage.planned else f"{steps:,} steps"]
    if tokens and stage.seconds:
        facts += [f"{tokens:,.0f} tokens", format_seconds(stage.seconds), f"{tokens / stage.seconds:,.0f} tokens/s"]
    return facts
