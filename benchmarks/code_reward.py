"""Programs a minute of the code reward: HumanEval's own solutions, each with all its tests, in the sandbox.

    python benchmarks/code_reward.py --data ../shared/data/humaneval/test.jsonl

Every solution runs twice: as it is (must score 1) and with its last line broken (must score 0). Goal: 500 a minute on
two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards.code import passes_tests, require_sandbox

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "humaneval" / "test.jsonl"


def broken(solution: str) -> str:
    """The solution with its last line replaced by one that returns nothing."""
    lines = solution.rstrip().splitlines()
    indent = len(lines[-1]) - len(lines[-1].lstrip())
    return "\n".join([*lines[:-1], " " * indent + "return None"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    require_sandbox()
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    solutions = [row["canonical_solution"] for row in rows]
    columns = {"tests": [row["test"] for row in rows] * 2, "entry_point": [row["entry_point"] for row in rows] * 2}
    completions = solutions + [broken(solution) for solution in solutions]
    prompts = [row["prompt"] for row in rows] * 2
    print(f"{len(os.sched_getaffinity(0))} cores, {platform.machine()}, Python {platform.python_version()}")
    for round_number in range(1, args.rounds + 1):
        start = time.perf_counter()
        rewards = passes_tests(completions=completions, prompts=prompts, prefix="prompts", **columns)
        seconds = time.perf_counter() - start
        wrong = sum(rewards[: len(rows)]) != len(rows) or any(rewards[len(rows) :])
        said = "WRONG SCORES" if wrong else "all scores right"
        speed = f"{len(rewards)} programs in {seconds:.1f} s, {60 * len(rewards) / seconds:,.0f} a minute"
        print(f"round {round_number}: {speed}, load {os.getloadavg()[0]:.1f}; {said}")


if __name__ == "__main__":
    main()
