"""One GRPO step, by this project (Ray actors, every check on) and by TRL with colocated vLLM, side by side.

    python benchmarks/grpo_step.py                              the demo's SFT first (1-3 minutes), then the benchmark
    python benchmarks/grpo_step.py --model runs/demo/01-sft/final --output benchmarks/results/grpo_step.md

Both sides read the same prompts in the same order and take turns step by step, each in processes of its own, so that a
machine that gets slower slows both; a step during which other programs ran is taken again. `trl_side.py` says what TRL
needs to run here at all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

sys.path.pop(0)  # this folder, whose rollout.py would hide the package of that name, in Ray's workers too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import Questions, Side, Work, describe, publish, set_environment, table, take_turns, train_sft

PHASES = {
    "generate": "generate",
    "handover": "hand-over, ours verified",
    "canary": "canary, ours alone",
    "score": "score",
    "old_logprobs": "old log-probabilities",
    "train": "update",
    "other": "everything else",
    "step": "**whole step**",
}
MEANS = {
    "length": "mean completion length, tokens",
    "reward": "mean reward",
    "no_signal": "groups without signal (ours computes nothing for them)",
}


def run_ours(work: Work, questions: Questions) -> None:
    """Drive the engine as a recipe's GRPO stage does; answer each step's seconds, mean length, reward, agreement."""
    from transformers import AutoTokenizer

    from alignment.config import GRPOConfig, TrainConfig
    from alignment.grpo import grpo
    from hybrid_engine.engine import HybridEngine
    from rewards.config import RewardConfig
    from rewards.pool import RewardPool
    from rollout.config import DataConfig
    from rollout.prompts import make_prompts
    from rollout.sampler import Sampling

    folder = Path(work.model)
    reward = RewardConfig(function="rewards.exact_match:exact_match")
    config = GRPOConfig(
        prompts=DataConfig(function="recipes.skills:skill_prompts"), rewards=(reward,),
        steps=work.steps, prompts_per_step=work.prompts, completions=work.completions,
        max_new_tokens=work.max_new_tokens, learning_rate=work.learning_rate,
    )  # fmt: skip
    prompts = make_prompts(work.rows, AutoTokenizer.from_pretrained(folder), "benchmark")
    batches = (prompts[start : start + work.prompts] for start in range(0, len(prompts), work.prompts))
    sampling = Sampling(work.completions, work.max_new_tokens, 1.0, work.seed)
    engine = HybridEngine(folder, TrainConfig(routing_replay=work.routing_replay), work.rollout, seed=work.seed)
    try:
        engine.load(folder, folder, config)
        with RewardPool([reward], Path()) as scorer:
            steps = grpo(engine, batches, config, sampling, scorer, first=1)
            for _ in questions:
                begun = time.perf_counter()
                done = next(steps)
                metrics = done.metrics | engine.take_metrics() | {"time/step": time.perf_counter() - begun}
                questions.answer(_our_step(metrics))
    finally:
        engine.close()


def _our_step(metrics: dict[str, float]) -> dict[str, float]:
    names = ("generate", "handover", "canary", "score", "train", "step")
    return {name: metrics.get(f"time/{name}", 0.0) for name in names} | {
        "old_logprobs": 0.0,
        "length": metrics["completions/mean_length"],
        "reward": metrics["reward/mean"],
        "no_signal": metrics["groups/without_signal"],
        # Absent where no group had signal: nothing was computed then.
        "max_difference": metrics.get("mismatch/max", 0.0),
        "p99_difference": metrics.get("mismatch/p99", 0.0),
        "mean_difference": float("nan"),
        "canary_error": metrics.get("handover/canary", 0.0),
    }


def report(ours: list[dict[str, float]], other: list[dict[str, float]], against: str) -> tuple[str, float]:
    """Medians of every phase as a Markdown table with what makes them comparable below it; other / ours of the step."""
    for step in (*ours, *other):
        step["other"] = step["step"] - sum(step[name] for name in PHASES if name not in ("step", "other"))

    def medians(name: str) -> tuple[float, float]:
        first, second = (statistics.median(step[name] for step in side) for side in (ours, other))
        return first, second

    rows = []
    for name, title in PHASES.items():
        mine, theirs = medians(name)
        rows.append([title, f"{mine:.3f}", f"{theirs:.3f}", f"{theirs / mine:.2f}" if mine > 1e-4 else ""])
    ratio = float(medians("step")[1] / medians("step")[0])
    spread = [_quartiles(side) for side in (ours, other)]
    rows.append(["quartiles of the step", *spread, ""])
    for name, title in MEANS.items():
        rows.append([title, *(f"{statistics.fmean(step[name] for step in side):.3f}" for side in (ours, other)), ""])
    worst = [max(step["max_difference"] for step in side) for side in (ours, other)]
    rows.append(["largest difference of log-probabilities, sampler and trainer", *(f"{w:.1e}" for w in worst), ""])
    p99, mean = max(s["p99_difference"] for s in ours), statistics.fmean(s["mean_difference"] for s in other)
    rows.append(["its 99th percentile (ours), its mean (TRL)", f"{p99:.1e}", f"{mean:.1e}", ""])
    canary = max(step["canary_error"] for step in ours)
    rows.append(["largest difference at a hand-over's canary", f"{canary:.1e}", "", ""])
    return table([f"seconds, median of {len(ours)} steps", "ours", against, "ratio"], rows), ratio


def _quartiles(side: list[dict[str, float]]) -> str:
    low, _, high = statistics.quantiles((step["step"] for step in side), n=4)
    return f"{low:.3f}-{high:.3f}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an SFT stage's final/ directory (default: make one)")
    parser.add_argument("--sft-steps", type=int, default=400, help="SFT steps where no --model is given")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE in recipes/demo.yaml, for that SFT")
    parser.add_argument("--steps", type=int, default=20, help="measured steps of each side")
    parser.add_argument("--warmup", type=int, default=4, help="steps before them")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=Work("", 0).dtype, help="of our engine")
    parser.add_argument("--against", choices=("trl", "replay"), default="trl", help="TRL, or ours with routing replay")
    parser.add_argument("--output", type=Path, help="append the report to this Markdown file")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        set_environment()
        run_ours(Work(**json.loads(args.side)), Questions())
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder, here = Path(name), Path(__file__)
        model = args.model or train_sft(folder / "sft", args.sft_steps, args.set)
        work = Work(str(model.resolve()), args.warmup + 3 * args.steps)
        mine = replace(work, dtype=args.dtype)
        other, against = (
            [here.with_name("trl_side.py"), [json.dumps(asdict(work))]],
            "TRL" if args.dtype == work.dtype else "TRL (float32)",
        )
        if args.against == "replay":
            replayed = json.dumps(asdict(replace(mine, routing_replay=True)))
            other, against = [here, ["--side", replayed]], "ours with routing replay"
        sides = {
            "ours": Side("ours", here, ["--side", json.dumps(asdict(mine))], folder / "ours.log"),
            "other": Side(against, *other, folder / "other.log"),
        }
        for side in sides.values():
            stack.callback(side.close)
        steps, disturbed = take_turns(sides, args.steps, args.warmup)
        text, ratio = report(steps["ours"], steps["other"], against)
        text = f"{describe(mine)}\n\n{text}\n\n**{against} / ours: {ratio:.2f}**\n"
        if disturbed:
            text += f"\n{disturbed} of {args.steps} steps were disturbed by other programs: measure again.\n"
        publish("GRPO step", text, args.output)


if __name__ == "__main__":
    main()
