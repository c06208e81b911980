"""What the demo's GRPO gains, over its SFT and over a control, item by item, on several seeds.

    python benchmarks/demo.py --seeds 0 1 2 --output benchmarks/results/demo.md

Runs `recipes/demo.yaml` and `recipes/demo_control.yaml` for each seed (some 9 minutes each on two cores; runs that are
in --runs already are continued, or read). The control trains on the SFT data for as many tokens as GRPO trained on.
Differences are paired, with the 95% intervals of the tax table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.metrics import read
from alignment.tax import TaxRow, compare, load_results
from benchmarks.workload import machine_line, publish, table
from recipes.schema import load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def align(recipe: str, folder: Path, seed: int, overrides: list[str]) -> str:
    """`align run`; its seconds, of a run that was not begun before. Exits with its last lines where it fails."""
    begun, known = time.monotonic(), folder.exists()
    command = [str(Path(sys.executable).with_name("align")), "run", str(RECIPES / recipe), "--output", str(folder)]
    settings = ["--set", f"seed={seed}", *overrides]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe}, seed {seed} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return "continued" if known else f"{time.monotonic() - begun:.0f} s"


def one_seed(runs: Path, seed: int, overrides: list[str], control: bool) -> tuple[list[list[str]], list[str]]:
    """Lines of the table of differences, and lines on what was spent and how the reward rose."""
    demo, other = runs / f"demo-{seed}", runs / f"control-{seed}"
    seconds = align("demo.yaml", demo, seed, overrides)
    sft, grpo, more = demo / "01-sft", demo / "02-grpo", other / "02-more-sft"
    completions = load_recipe(demo / "recipe.yaml", []).recipe.stages[1].config.completions
    steps = read(grpo / "metrics.jsonl")
    tokens = sum(completions * step["tokens/prompt"] + step["tokens/completion"] for step in steps)
    tenths = [f"{fmean(steps[i]['reward/mean'] for i in part):.2f}" for part in np.array_split(range(len(steps)), 10)]
    notes = [
        f"seed {seed}, demo: {seconds}; GRPO trained on {tokens:,.0f} tokens (a prompt counts for each completion)",
        f"seed {seed}, reward of sampled completions, by tenths of the stage: {' '.join(tenths)}",
    ]
    comparisons = {"SFT -> GRPO": (sft, grpo)}
    if control:
        seconds = align("demo_control.yaml", other, seed, overrides)
        tokens = sum(step["tokens/total"] for step in read(more / "metrics.jsonl"))
        notes.append(f"seed {seed}, control: {seconds}; trained on {tokens:,.0f} tokens")
        comparisons |= {"SFT -> control": (sft, more), "control -> GRPO": (more, grpo)}
    results = {
        name: [load_results(stage / "evals" / "results.json") for stage in pair] for name, pair in comparisons.items()
    }
    return [[f"{seed}: {name}", *line] for name, pair in results.items() for line in map(cells, compare(*pair))], notes


def cells(row: TaxRow) -> list[str]:
    """A benchmark's columns."""
    interval = f"{100 * row.difference:+.1f} ({100 * row.low:+.1f} to {100 * row.high:+.1f})"
    return [row.benchmark, f"{row.before:.3f}", f"{row.after:.3f}", interval, str(row.gained), str(row.lost)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of both recipes")
    parser.add_argument("--runs", type=Path, default=Path("runs/seeds"), help="folder of the runs")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of both recipes")
    parser.add_argument("--no-control", action="store_true", help="the demo alone")
    parser.add_argument("--title", default="The demo", help="of the section that is written")
    parser.add_argument("--output", type=Path, help="append the report to this Markdown file")
    args = parser.parse_args()
    found = [one_seed(args.runs, seed, args.set, not args.no_control) for seed in args.seeds]
    header = ["seed, from -> to", "benchmark", "from", "to", "difference in points, 95% interval", "gained", "lost"]
    settings = f"\n\n`--set {' '.join(args.set)}`" if args.set else ""
    notes = "\n".join(f"- {note}" for _, notes in found for note in notes)
    differences = table(header, [line for lines, _ in found for line in lines])
    text = f"{machine_line()}{settings}\n\n{notes}\n\n{differences}\n"
    publish(args.title, text, args.output)


if __name__ == "__main__":
    main()
