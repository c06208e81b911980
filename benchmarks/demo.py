"""What the demo's GRPO gains, over its SFT and over a control, item by item, on several seeds.

    python benchmarks/demo.py --seeds 0 1 2 --output benchmarks/results/demo.md

Runs `recipes/demo.yaml` and `recipes/demo_control.yaml` for each seed (some 9 minutes each on two cores; runs that are
in --runs already are continued, or read). The control trains on the SFT data for as many tokens as GRPO trained on.
Differences are paired, with the 95% intervals of the tax table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.tax import TaskResult, TaxRow, compare, load_results
from benchmarks.workload import machine_line, publish, table
from recipes.schema import load_recipe

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def align(recipe: str, folder: Path, seed: int, overrides: list[str]) -> float:
    """`align run`; its seconds. Exits with its last lines where it fails."""
    begun = time.monotonic()
    command = [str(Path(sys.executable).with_name("align")), "run", str(RECIPES / recipe), "--output", str(folder)]
    settings = ["--set", f"seed={seed}", *overrides]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{recipe}, seed {seed} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return time.monotonic() - begun


def evals(stage: Path) -> list[TaskResult]:
    """The stage's results, one a benchmark."""
    return load_results(stage / "evals" / "results.json")


def tokens(stage: Path, completions: int = 0) -> int:
    """Tokens trained on, prompts included; GRPO's prompts count once for each of their completions."""
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    if completions:
        return int(sum(completions * row["tokens/prompt"] + row["tokens/completion"] for row in rows))
    return int(sum(row["tokens/total"] for row in rows))


def one_seed(runs: Path, seed: int, overrides: list[str]) -> tuple[list[list[str]], str]:
    """Lines of the table of differences, and a line on what was spent."""
    demo, control = runs / f"demo-{seed}", runs / f"control-{seed}"
    seconds = [align(*job, seed, overrides) for job in (("demo.yaml", demo), ("demo_control.yaml", control))]
    completions = load_recipe(demo / "recipe.yaml", []).recipe.stages[1].config.completions
    sft, grpo, more = demo / "01-sft", demo / "02-grpo", control / "02-more-sft"
    comparisons = {"SFT -> GRPO": (sft, grpo), "SFT -> control": (sft, more), "control -> GRPO": (more, grpo)}
    lines = [
        [f"{seed}: {name}", *line]
        for name, (before, after) in comparisons.items()
        for line in map(cells, compare(evals(before), evals(after)))
    ]
    spent = f"seed {seed}: demo {seconds[0]:.0f} s, control {seconds[1]:.0f} s; trained on "
    return lines, spent + f"{tokens(grpo, completions):,} tokens by GRPO, {tokens(more):,} by the control"


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
    parser.add_argument("--title", default="The demo", help="of the section that is written")
    parser.add_argument("--output", type=Path, help="append the report to this Markdown file")
    args = parser.parse_args()
    found = [one_seed(args.runs, seed, args.set) for seed in args.seeds]
    header = ["seed, from -> to", "benchmark", "from", "to", "difference in points, 95% interval", "gained", "lost"]
    settings = f"\n\n`--set {' '.join(args.set)}`" if args.set else ""
    spent = "\n".join(f"- {line}" for _, line in found)
    differences = table(header, [line for lines, _ in found for line in lines])
    text = f"{machine_line()}{settings}\n\n{spent}\n\n{differences}\n"
    publish(args.title, text, args.output)


if __name__ == "__main__":
    main()
