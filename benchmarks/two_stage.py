"""What each stage of the two-stage recipe gives and costs, and how good its reward models are, on several seeds.

    python benchmarks/two_stage.py --seeds 0 1 2 --output benchmarks/results/two_stage.md

Runs `recipes/deepseek_v2_two_stage.yaml` for each seed (some 11 minutes each on two cores; runs that are in --runs
already are continued, or read). Intervals are those of the tax table: 95% for all rows of a stage at once, the held-out
reward's by itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.metrics import read
from alignment.tax import row_from_json
from benchmarks.demo import align, cells
from benchmarks.workload import machine_line, publish, table

JUDGED = ("accuracy", "margin", "calibration_error", "length_correlation", "longer_chosen")


def reward_models(run: Path, seed: int) -> list[list[str]]:
    """A line per reward model: what its held-out pairs say."""
    lines = []
    for path in sorted(run.glob("*/metrics.jsonl")):
        last = read(path)[-1]
        if "held_out/accuracy" in last:
            lines.append([f"{seed}: {path.parent.name[3:]}", *(f"{last[f'held_out/{name}']:.3f}" for name in JUDGED)])
    return lines


def stages(run: Path, seed: int) -> list[list[str]]:
    """The lines of the tax tables, in points for benchmarks, in its own unit for the held-out reward."""
    tables = json.loads((run / "tax.json").read_text(encoding="utf-8"))
    found = [(t, row_from_json(row)) for t in tables if t["before"] != "base" for row in t["rows"]]
    return [[f"{seed}: {t['before']} -> {t['after']} {' '.join(t['gate'])}".strip(), *cells(row)] for t, row in found]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the recipe")
    parser.add_argument("--runs", type=Path, default=Path("runs/two_stage"), help="folder of the runs")
    parser.add_argument("--recipe", default="deepseek_v2_two_stage.yaml", help="another recipe of the same folder")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    parser.add_argument("--title", default="The two-stage recipe", help="of the section that is written")
    parser.add_argument("--output", type=Path, help="append the report to this Markdown file")
    args = parser.parse_args()
    runs = {seed: args.runs / f"seed-{seed}" for seed in args.seeds}
    notes = "\n".join(f"- seed {seed}: {align(args.recipe, run, seed, args.set)}" for seed, run in runs.items())
    settings = f"\n\n`--set {' '.join(args.set)}`" if args.set else ""
    judges = [line for seed, run in runs.items() for line in reward_models(run, seed)]
    text = f"{machine_line()}{settings}\n\n{notes}\n"
    if judges:
        text += f"\n{table(['seed: reward model', *(name.replace('_', ' ') for name in JUDGED)], judges)}\n"
    header = ["seed: from -> to", "benchmark", "from", "to", "difference x 100, interval", "gained", "lost"]
    text += f"\n{table(header, [line for seed, run in runs.items() for line in stages(run, seed)])}\n"
    publish(args.title, text, args.output)


if __name__ == "__main__":
    main()
