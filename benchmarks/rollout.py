"""Tokens a second of this project's rollouts, against bare `vllm.LLM.generate` on the same requests.

    python benchmarks/rollout.py --model runs/demo/01-sft/final --output benchmarks/results/rollout.md

The same prompts, seeds and engine options (MLA off, blocks of 32, eager, no detokenizer, log-probabilities of the
sampled tokens). Three contenders take turns, each in a process of its own that idles while the others run (a round
during which other programs ran is taken again): `LLM.generate`; `VllmEngine.generate`, which adds decoded texts and
trajectories; and `HybridEngine.rollouts`, which adds Ray, grouping, scoring and the object store (the hand-over that
begins each of its batches is not counted here; `grpo_step.py` has it). Tokens are those of the completions. Goal: at
least 90% of the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose rollout.py would hide the package of that name, in Ray's workers too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.workload import Questions, Side, Work, describe, publish, set_environment, table, take_turns, train_sft

CONTENDERS = {
    "bare": "`LLM.generate`",
    "engine": "`VllmEngine.generate`",
    "rollouts": "`HybridEngine.rollouts`, through Ray",
}
Round = tuple[float, int]
"""Seconds, and tokens sampled in them."""


def requests_of(work: Work, step: int) -> list[Any]:
    """The requests of one step's prompts, as the rollout actor makes them."""
    from rollout.sampler import group_requests

    prompts, sampling = prompts_of(work, step)
    return group_requests(prompts, range(len(prompts)), sampling, step)


def prompts_of(work: Work, step: int) -> tuple[list[Any], Any]:
    """One step's prompts, and how they are sampled."""
    from transformers import AutoTokenizer

    from rollout.prompts import make_prompts
    from rollout.sampler import Sampling

    rows = work.rows[(step - 1) * work.prompts : step * work.prompts]
    sampling = Sampling(work.completions, work.max_new_tokens, 1.0, work.seed)
    return make_prompts(rows, AutoTokenizer.from_pretrained(work.model), "benchmark"), sampling


@contextmanager
def bare(work: Work) -> Iterator[Callable[[int], Round]]:
    """vLLM alone."""
    from vllm import LLM, SamplingParams

    from rollout.vllm import faults
    from rollout.vllm.environment import installed

    llm = LLM(
        model=work.model, dtype=work.dtype, enforce_eager=True, max_num_seqs=512, max_model_len=work.max_length + 1,
        enable_prefix_caching=True, logprobs_mode="processed_logprobs",
        **faults.engine_options(work.rollout, installed()),
    )  # fmt: skip

    def run(step: int) -> Round:
        requests = requests_of(work, step)
        begun = time.perf_counter()
        inputs = [{"prompt_token_ids": request.prompt.tolist()} for request in requests]
        params = [
            SamplingParams(
                max_tokens=request.max_tokens, temperature=request.temperature, seed=request.seed, logprobs=0,
                detokenize=False,
            )
            for request in requests
        ]  # fmt: skip
        outputs = llm.generate(inputs, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        return seconds, sum(len(output.outputs[0].token_ids) for output in outputs)

    yield run


@contextmanager
def engine(work: Work) -> Iterator[Callable[[int], Round]]:
    """This project's engine in this process."""
    from rollout.vllm.engine import VllmEngine

    held = VllmEngine(work.model, work.rollout, seed=work.seed)

    def run(step: int) -> Round:
        requests = requests_of(work, step)
        begun = time.perf_counter()
        samples = [sample for finished in held.generate(requests) for sample in finished]
        seconds = time.perf_counter() - begun
        return seconds, sum(int(sample.trajectory.loss_mask.sum()) for sample in samples)

    yield run


@contextmanager
def rollouts(work: Work) -> Iterator[Callable[[int], Round]]:
    """The hybrid engine: weights handed over once, then prompts in, scored groups out."""
    from alignment.config import StageConfig, TrainConfig
    from hybrid_engine.engine import HybridEngine
    from rewards.config import RewardConfig
    from rewards.pool import RewardPool

    folder = Path(work.model)
    with ExitStack() as stack:
        held = HybridEngine(folder, TrainConfig(), work.rollout, seed=work.seed)
        stack.callback(held.close)
        held.load(folder, folder, StageConfig())
        scorer = stack.enter_context(RewardPool([RewardConfig(function="rewards.exact_match:exact_match")], Path()))

        def run(step: int) -> Round:
            prompts, sampling = prompts_of(work, step)
            begun = time.perf_counter()
            (groups,) = held.rollouts([(step, prompts)], sampling, scorer)
            seconds, taken = time.perf_counter() - begun, held.take_metrics()
            seconds -= taken["time/handover"] - taken["time/canary"]
            return seconds, sum(len(c.token_ids) for group in groups for c in group.completions)

        yield run


def serve(contender: str, work: Work) -> None:
    """In a process of its own: for each step number, seconds and tokens."""
    contexts = {"bare": bare, "engine": engine, "rollouts": rollouts}
    questions = Questions()
    with contexts[contender](work) as run:
        for step in questions:
            questions.answer(run(int(step)))


def report(rounds: dict[str, list[Round]]) -> str:
    """Tokens a second of each contender, the median over its rounds, and the ratio to bare vLLM in the same round."""
    rows = []
    for name, found in rounds.items():
        speeds = [tokens / seconds for seconds, tokens in found]
        ratios = [speed * base / tokens for speed, (base, tokens) in zip(speeds, rounds["bare"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        length = statistics.fmean(tokens for _, tokens in found)
        rows.append(
            [
                CONTENDERS[name],
                f"{statistics.median(speeds):,.0f}",
                f"{statistics.median(seconds for seconds, _ in found):.3f}",
                f"{length:,.0f}",
                f"{statistics.median(ratios):.0%} ({low:.0%}-{high:.0%})",
            ]
        )
    header = [f"median of {len(rounds['bare'])} rounds", "tokens/s", "seconds", "tokens a round"]
    return table([*header, "of bare vLLM (quartiles)"], rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an SFT stage's final/ directory (default: make one)")
    parser.add_argument("--sft-steps", type=int, default=400, help="SFT steps where no --model is given")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds of each contender")
    parser.add_argument("--warmup", type=int, default=3, help="rounds before them")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="most tokens of a completion")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=Work("", 0).dtype, help="of all three")
    parser.add_argument("--output", type=Path, help="append the report to this Markdown file")
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    set_environment()
    if args.serve:
        serve(args.serve[0], Work(**json.loads(args.serve[1])))
        return
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        folder = Path(name)
        model = args.model or train_sft(folder / "sft", args.sft_steps)
        steps = args.warmup + 3 * args.rounds
        work = Work(str(model.resolve()), steps, dtype=args.dtype, max_new_tokens=args.max_new_tokens)
        from rollout.vllm.environment import environment

        os.environ |= environment(work.rollout)
        sides = {
            key: Side(title, Path(__file__), ["--serve", key, json.dumps(asdict(work))], folder / key)
            for key, title in CONTENDERS.items()
        }
        for side in sides.values():
            stack.callback(side.close)
        rounds, disturbed = take_turns(sides, args.rounds, args.warmup)
        text = f"{describe(work)}\n\n{report(rounds)}\n"
        if disturbed:
            text += f"\n{disturbed} of {args.rounds} rounds were disturbed by other programs: measure again.\n"
        publish("Rollouts", text, args.output)


if __name__ == "__main__":
    main()
