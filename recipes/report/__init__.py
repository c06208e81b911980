"""One self-contained HTML page about a run: what each stage gave and what it cost."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from alignment.files import write_text
from recipes.progress import format_number, format_seconds, step_tokens
from recipes.report.charts import half_width, stage_charts
from recipes.report.data import Run, Stage, read_run, shown_text

HERE = Path(__file__).parent


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what lies in the folder, of a finished run or not; its path.

    Raises ValueError when `run_dir` is no run folder or a file in it is damaged.
    """
    run = read_run(run_dir)
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "text": shown_text}
    page = environment.get_template("page.html").render(
        run=run,
        facts=_facts(run),
        stages=[(stage, _stage_facts(stage), *stage_charts(stage.metrics)) for stage in run.stages],
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "script.js").read_text(encoding="utf-8")),
        half_width=half_width,
    )
    return write_text(run_dir / "report.html", page)


def _facts(run: Run) -> list[tuple[str, str]]:
    model = run.recipe.get("model", {})
    started = model.get("path") or (model.get("init") or {}).get("preset")
    seconds = sum(stage.seconds for stage in run.stages)
    time = format_seconds(seconds) if seconds else None
    facts = {"model": started, "seed": run.recipe.get("seed"), "time in steps": time}
    return [(name, str(value)) for name, value in facts.items() if value is not None]


def _stage_facts(stage: Stage) -> list[str]:
    if not stage.metrics:
        return []
    steps = stage.metrics[-1]["step"]
    facts = [f"{steps:,} of {stage.planned:,} steps" if stage.planned else f"{steps:,} steps"]
    tokens = sum(step_tokens(row) or 0 for row in stage.metrics)
    facts += [f"{tokens:,.0f} tokens"] if tokens else []
    facts += [format_seconds(stage.seconds)] if stage.seconds else []
    return facts + ([f"{tokens / stage.seconds:,.0f} tokens/s"] if tokens and stage.seconds else [])
