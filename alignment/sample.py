"""Scored completions as data: rows, preference pairs (DeepSeek-V2 section 4.2) and the best of each prompt."""

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from alignment.grpo import rollout_metrics
from alignment.metrics import append, atomic_directory, read
from alignment.protocols import Engine, Step
from rewards.normalize import RewardNormalizer
from rewards.pool import RewardPool
from rollout.prompts import Stream
from rollout.sampler import Sampling
from rollout.types import Group, Prompt


def sample(
    engine: Engine, prompts: Stream[Prompt], sampling: Sampling, scorer: RewardPool, scale: RewardNormalizer, first: int
) -> Iterator[Step]:
    """Every prompt once, a batch a `next()`, from batch `first` (from 1) on; the weights stay as they are."""
    size, total = prompts.batch_size, len(prompts.items)
    batches = ((step, next(prompts)[: total - (step - 1) * size]) for step in range(first, -(-total // size) + 1))
    for step, groups in enumerate(map(scale, engine.rollouts(batches, sampling, scorer)), first):
        yield Step(step, rollout_metrics(groups), groups)


def sampled_rows(step: int, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """`step`, `prompt_index`, `prompt`, `completion` (in the prompt's form) and `score` of what has a score."""
    return [
        {
            "step": step,
            "prompt_index": group.prompt.index,
            "prompt": group.prompt.text,
            "completion": group.answer(completion),
            "score": float(score),
        }
        for group in groups
        for completion, score in zip(group.completions, group.scores.total, strict=True)
        if not math.isnan(score)
    ]


def write_data(rows_file: Path, out_dir: Path) -> dict[str, int]:
    """Write the folder that later stages read, whole or not at all, and return how many rows each file got.

    rows.jsonl: `prompt`, `completion`, `score`. pairs.jsonl: `prompt`, `chosen`, `rejected` and their scores: the best
    and the worst completion of each prompt where their scores differ. best.jsonl: `prompt`, `completion`, `score` of
    the best one. Of equal ones the first."""
    groups = [list(group) for _, group in groupby(read(rows_file), key=itemgetter("step", "prompt_index"))]
    best, worst = ([f(group, key=itemgetter("score")) for group in groups] for f in (max, min))
    pairs = [
        {"prompt": good["prompt"], "chosen": good["completion"], "rejected": bad["completion"],
         "score_chosen": good["score"], "score_rejected": bad["score"]}
        for good, bad in zip(best, worst, strict=True)
        if good["score"] > bad["score"] and good["completion"] != bad["completion"]
    ]  # fmt: skip
    names = ("prompt", "completion", "score")
    found = {"rows": [{name: row[name] for name in names} for group in groups for row in group], "pairs": pairs}
    found["best"] = [{name: row[name] for name in names} for row in best]
    with atomic_directory(out_dir) as folder:
        for name, rows in found.items():
            append(folder / f"{name}.jsonl", rows)
    return {name: len(rows) for name, rows in found.items()}
