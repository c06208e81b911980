"""One self-contained HTML page about a run: what each stage gave and what it cost."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from alignment.metrics import write_text
from recipes.progress import format_number, format_seconds
from recipes.report.charts import half_width, stage_charts
from recipes.report.data import read_run, shown_text


def write_report(run_dir: Path) -> Path:
    """Write `run_dir`/report.html from what lies in the folder, of a finished run or not; its path.

    Raises ValueError when `run_dir` is no run folder or a file in it is damaged.
    """
    run = read_run(run_dir)
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "seconds": format_seconds, "text": shown_text}
    page = environment.get_template("page.html").render(run=run, half_width=half_width, stage_charts=stage_charts)
    return write_text(run_dir / "report.html", page)
