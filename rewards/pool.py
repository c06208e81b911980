"""Rewards scored by killable worker processes, in the background.

submit(groups) ──> one thread per reward ──> its worker process: one call with all completions
                                               │ the call fails: every completion alone, to find the culprit
                   Future[list[Scores]] <── weighted sum, when every reward has answered
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from rewards.base import RewardError
from rewards.config import RewardConfig
from rewards.loader import NOT_COLUMNS
from rewards.process import WorkerProcess
from rewards.worker import Batch, Reply
from rollout.types import Group, Scores


class RewardPool:
    """Scores groups with a stage's reward functions (implements `rewards.base.Scorer`).

    A function that returns None for a completion does not apply to it and leaves the weighted sum, as in TRL. A
    completion to which no function applies has total NaN and leaves its group.
    on_error "stop": the future raises RewardError. "mask": the completions at fault have total NaN; the others' rewards
    come from one more call without them, never from calls with one completion alone, whose values a function that
    compares completions would get wrong.
    Scores.extra: where two functions log one name, the later function's; `log_metric` is of the whole submission.
    """

    def __init__(self, configs: Sequence[RewardConfig], base_dir: Path, max_steps: int = 0) -> None:
        """Start a process per reward; returns before they are ready. The calling thread must outlive the pool.

        max_steps: of the stage, for `trainer_state`. A function sees every batch, in order of submission. One that
        cannot be loaded makes the futures raise.
        """
        self._configs, self._max_steps = configs, max_steps
        self._processes = [WorkerProcess(config.function, config.args, base_dir) for config in configs]
        self._threads = [ThreadPoolExecutor(1) for _ in configs]
        self._sum = ThreadPoolExecutor(1)

    def submit(self, groups: Sequence[Group], trainer_state: Mapping[str, Any]) -> Future[list[Scores]]:
        """As `Scorer.submit`."""
        batch = _batch(groups, {"max_steps": self._max_steps, **trainer_state})
        calls = zip(self._threads, self._configs, self._processes, strict=True)
        replies = [thread.submit(_score, config, process, groups, batch) for thread, config, process in calls]
        return self._sum.submit(_combine, groups, self._configs, replies)

    def close(self) -> None:
        """Kill every worker; futures that are not done raise RewardError. Safe to call twice."""
        for process in self._processes:
            process.close()
        for thread in (*self._threads, self._sum):
            thread.shutdown()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _batch(groups: Sequence[Group], trainer_state: Mapping[str, Any]) -> Batch:
    """A column that some rows lack is None there, as in a `datasets.Dataset`."""
    rows = [(group.prompt, completion) for group in groups for completion in group.completions]
    names = dict.fromkeys(name for group in groups for name in group.prompt.columns if name not in NOT_COLUMNS)
    columns: dict[str, list[Any]] = {name: [prompt.columns.get(name) for prompt, _ in rows] for name in names}
    columns["prompts"] = [prompt.text for prompt, _ in rows]
    columns["completions"] = [
        one.text if isinstance(prompt.text, str) else [{"role": "assistant", "content": one.text}]
        for prompt, one in rows
    ]
    return Batch(columns, [np.asarray(one.token_ids, np.int32).tobytes() for _, one in rows], trainer_state)


def _score(config: RewardConfig, process: WorkerProcess, groups: Sequence[Group], batch: Batch) -> Reply:
    """One function's values of a submission, a str where the completion is masked; RewardError as `on_error` says."""
    tried = size = len(batch.token_ids)
    reply = process.call(batch, config.timeout)
    faults = {position: value for position, value in enumerate(reply.values) if isinstance(value, str)}
    if reply.failure is not None:
        faults, tried = _one_by_one(config, process, batch)
    if config.on_error == "stop" and (faults or reply.failure is not None):
        error = RewardError(_message(config, groups, reply, faults, tried))
        if reply.trace:
            error.add_note(reply.trace)
        raise error
    if reply.failure is None:
        return reply
    sound = [position for position in range(tried) if position not in faults]
    if faults and sound:
        again = process.call(batch.select(sound), config.timeout)
        if again.failure is None:
            extra = {column: _spread(logged, sound, [None] * size) for column, logged in again.extra.items()}
            return Reply(values=_spread(again.values, sound, ["masked"] * size), extra=extra, metrics=again.metrics)
    return Reply(values=["masked"] * size)


def _spread(values: Sequence[Any], positions: Sequence[int], others: list[Any]) -> list[Any]:
    given = dict(zip(positions, values, strict=True))
    return [given.get(position, other) for position, other in enumerate(others)]


def _one_by_one(config: RewardConfig, process: WorkerProcess, batch: Batch) -> tuple[dict[int, str], int]:
    """Call the function with each completion alone: position -> what went wrong, and how many were tried.

    To stop the run one culprit is enough; after two time limits a batch that timed out was merely slow. To mask,
    every culprit is wanted, and each one that hangs costs a time limit: after ten the rest counts as untried.
    """
    stop = config.on_error == "stop"
    process.ready()  # the time that loading takes is not the function's
    deadline = time.monotonic() + config.timeout * (2 if stop else 10)
    faults: dict[int, str] = {}
    for position in range(len(batch.token_ids)):
        if time.monotonic() > deadline or (stop and faults):
            return faults, position
        reply = process.call(batch.select([position]), config.timeout)
        fault = reply.failure or reply.values[0]
        if isinstance(fault, str):
            faults[position] = fault
    return faults, len(batch.token_ids)


def _message(config: RewardConfig, groups: Sequence[Group], reply: Reply, faults: dict[int, str], tried: int) -> str:
    reward = f"reward {config.label!r} ({config.function})"
    places = [(group.prompt.index, position) for group in groups for position in range(len(group.completions))]
    if faults:
        position, cause = min(faults.items())
        row, completion = places[position]
        other = reply.failure not in (None, cause)
        whole = f"; the call with all {len(places)} completions: {reply.failure}" if other else ""
        return f"{reward}, dataset row {row} (counted from 0), completion {completion} of its group: {cause}{whole}"
    return (
        f"{reward}: the call with all {len(places)} completions failed: {reply.failure}; with one at a time, the "
        f"first {tried} passed. Look for what depends on the whole batch (its size, state, `timeout`)"
    )


def _combine(groups: Sequence[Group], configs: Sequence[RewardConfig], futures: list[Future[Reply]]) -> list[Scores]:
    replies = [future.result() for future in futures]
    columns = {name: values for reply in replies for name, values in reply.extra.items()}
    metrics = {name: value for reply in replies for name, value in reply.metrics.items()}
    totals = [_total(values, configs) for values in zip(*(reply.values for reply in replies), strict=True)]
    parts = {
        config.label: [value if isinstance(value, float) else math.nan for value in reply.values]
        for config, reply in zip(configs, replies, strict=True)
    }
    scores, end = [], 0
    for group in groups:
        own = slice(end, end := end + len(group.completions))
        extra = {name: values[own] for name, values in columns.items()} | metrics
        scores.append(Scores(np.array(totals[own]), {name: np.array(part[own]) for name, part in parts.items()}, extra))
    return scores


def _total(values: Sequence[float | str | None], configs: Sequence[RewardConfig]) -> float:
    """A completion's weighted sum of what applies (TRL's nansum); NaN where nothing does, or a function failed."""
    terms = [config.weight * value for config, value in zip(configs, values, strict=True) if isinstance(value, float)]
    return sum(terms) if terms and not any(isinstance(value, str) for value in values) else math.nan
