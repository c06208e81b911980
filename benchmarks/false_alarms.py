"""How often the gate raises an alarm where nothing has changed: the same weights against themselves, sampled anew.

    python benchmarks/false_alarms.py --run runs/two_stage/seed-0 --stage sft --output benchmarks/results/two_stage.md

Both evals of a comparison ask a live vLLM engine the run's own benchmarks, at temperature 1, with seeds that no other
eval has. The limits are as strict as they can be: no benchmark and no group may lose anything at all (`keep: 0`).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from transformers import AutoTokenizer

from alignment.config import StageConfig
from alignment.evals import run_evals
from alignment.tax import compare
from benchmarks.workload import RECIPE, machine_line, publish, set_environment, table
from hybrid_engine.engine import HybridEngine
from recipes.gate import breaches
from recipes.schema import load_recipe


def sampled(task: str, folder: Path) -> str:
    """A task of the recipe as one of `folder` that samples its answers."""
    path = RECIPE.parent / task
    text = (
        f"include: {path}\ngeneration_kwargs: {{until: ['\\n'], max_gen_toks: 16, do_sample: true, temperature: 1.0}}\n"
    )
    (folder / path.name).write_text(text, encoding="utf-8")
    return str(folder / path.name)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True, help="folder of a run")
    parser.add_argument("--stage", default="sft", help="whose final weights are compared with themselves")
    parser.add_argument("--comparisons", type=int, default=20, help="how many")
    parser.add_argument("--output", type=Path, help="append the report to this Markdown file")
    args = parser.parse_args()
    set_environment()
    recipe = load_recipe(args.run / "recipe.yaml").recipe
    (final,) = args.run.resolve().glob(f"*-{args.stage}/final")
    engine = HybridEngine(final, recipe.train, recipe.rollout, seed=recipe.seed)
    try:
        with tempfile.TemporaryDirectory() as folder:
            tasks = {group: [sampled(t, Path(folder)) for t in names] for group, names in recipe.evals.groups.items()}
            config = recipe.evals.model_copy(update={"tasks": tasks})
            engine.load(final, final, StageConfig())
            tokenizer = AutoTokenizer.from_pretrained(final)
            evals = [
                run_evals(config, engine.sampler, tokenizer, Path(folder), seed)[0]
                for seed in range(1, 2 * args.comparisons + 1)
            ]
    finally:
        engine.close()
    tables = [compare(before, after) for before, after in zip(evals[::2], evals[1::2], strict=True)]
    alarms = [breaches(rows, {row.benchmark: 0.0 for row in rows}) for rows in tables]
    lines = [
        [
            rows[0].benchmark,
            str(rows[0].n),
            f"{np.mean([row.before for row in rows]):.3f}",
            f"{np.mean([row.gained + row.lost for row in rows]):.0f}",
            f"{100 * min(row.difference for row in rows):+.1f} to {100 * max(row.difference for row in rows):+.1f}",
            str(sum(breach.benchmark == rows[0].benchmark for found in alarms for breach in found)),
        ]
        for rows in zip(*tables, strict=True)
    ]
    header = ["benchmark or group", "items", "score", "items that flip", "differences x 100", "alarms"]
    count = f"{sum(map(bool, alarms))} of {args.comparisons} comparisons raised an alarm."
    text = f"{machine_line()}\n\n{recipe.name}, seed {recipe.seed}, {args.stage}. {count}\n\n{table(header, lines)}\n"
    publish("The gate where nothing has changed", text, args.output)


if __name__ == "__main__":
    main()
