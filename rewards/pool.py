"""Rewards scored by killable worker processes, in the background.

submit(groups) ──> one queue per reward ──> its worker process(es): one call with all completions
                                              │ the call fails: every completion alone, to find the culprit
                   Future[list[Scores]] <── weighted sum, when every reward has answered
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rewards.base import RewardError
from rewards.config import RewardConfig, reward_names
from rewards.loader import NOT_COLUMNS
from rewards.process import WorkerProcess
from rewards.worker import Batch, Reply
from rollout.types import Group, Scores


class RewardPool:
    """Scores groups with a stage's reward functions (implements `rewards.base.Scorer`).

    A function that returns None for a completion does not apply to it and leaves the weighted sum, as in TRL. A
    completion to which no function applies has total NaN, leaves its group and is counted in `not_applicable`.

    on_error "stop": the future raises RewardError. "mask": the completions at fault have total NaN and are counted in
    `masked/<name>`; the others' rewards come from one more call without them, never from calls with one completion
    alone, whose values a function that compares completions would get wrong.

    Scores.extra of each group: columns of `log_extra` (lists of G; a column that two functions log is called
    `<name>/<column>` the second time), `log_metric` values (floats of the whole submission), `not_applicable` and,
    for each reward with on_error "mask", `masked/<name>` (counts in the group).

    Example: `with RewardPool(stage.rewards, recipe_dir) as pool: scores = pool.submit(groups, {}).result()`.
    """

    def __init__(self, configs: Sequence[RewardConfig], base_dir: Path, workers: int = 1) -> None:
        """Launch `workers` processes per reward; returns before they are ready.

        With one worker, a function that keeps state sees every batch, in order of submission. ValueError for two
        rewards of one name. A function that cannot be loaded makes the futures raise RewardError.
        """
        names = reward_names(configs)
        self._lanes = [_Lane(name, config, queue.SimpleQueue()) for name, config in zip(names, configs, strict=True)]
        self._processes: list[WorkerProcess] = []
        self._threads: list[threading.Thread] = []
        self._workers = workers
        self._closed = False
        for lane in self._lanes:
            for _ in range(workers):
                process = WorkerProcess(lane.config.function, lane.config.args, base_dir)
                # Daemons: an exception in the main thread must not wait for a reward that hangs.
                thread = threading.Thread(target=_serve, args=(lane, process), name=f"reward {lane.name}", daemon=True)
                thread.start()
                self._processes.append(process)
                self._threads.append(thread)

    def submit(self, groups: Sequence[Group], trainer_state: Mapping[str, Any]) -> Future[list[Scores]]:
        """As `Scorer.submit`. Raises RewardError at once when the pool is closed."""
        if self._closed:
            raise RewardError("the reward pool is closed")
        submission = _Submission(self._lanes, groups, trainer_state)
        for index, lane in enumerate(self._lanes):
            lane.jobs.put((submission, index))
        return submission.future

    def close(self) -> None:
        """Kill every worker; futures that are not done raise RewardError. Safe to call twice."""
        self._closed = True
        for process in self._processes:
            process.close()
        for lane in self._lanes:
            for _ in range(self._workers):
                lane.jobs.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Lane:
    """One reward function and the queue of its jobs: (submission, index of the lane), or None to end."""

    name: str
    config: RewardConfig
    jobs: queue.SimpleQueue[tuple[_Submission, int] | None]


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What one function gave. values: [N], NaN for None and where masked. masked: [N] bool."""

    values: np.ndarray
    masked: np.ndarray
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


class _Submission:
    """Some groups on their way through every reward; the last outcome completes the future, the first error ends it."""

    def __init__(self, lanes: Sequence[_Lane], groups: Sequence[Group], trainer_state: Mapping[str, Any]) -> None:
        self.groups = groups
        self.batch = _batch(groups, trainer_state)
        self.places = [(group.prompt.index, position) for group in groups for position in range(len(group.completions))]
        self.future: Future[list[Scores]] = Future()
        self.future.set_running_or_notify_cancel()  # a submission cannot be cancelled
        self._lanes = lanes
        self._outcomes: dict[int, _Outcome] = {}
        self._lock = threading.Lock()

    def deliver(self, index: int, outcome: _Outcome) -> None:
        with self._lock:
            self._outcomes[index] = outcome
            if len(self._outcomes) == len(self._lanes):
                outcomes = [self._outcomes[index] for index in range(len(self._lanes))]
                self.future.set_result(_combine(self.groups, self._lanes, outcomes))

    def fail(self, error: BaseException) -> None:
        with self._lock:
            if not self.future.done():
                self.future.set_exception(error)


def _serve(lane: _Lane, process: WorkerProcess) -> None:
    """A thread per worker process, which must outlive it (see `WorkerProcess`)."""
    broken: Exception | None = None
    try:
        process.launch()
    except (OSError, RewardError) as error:
        broken = error
    while (job := lane.jobs.get()) is not None:
        submission, index = job
        try:
            if broken is not None:
                raise broken
            submission.deliver(index, _score(lane, process, submission))
        except Exception as error:  # whatever it is, it belongs to the one who waits for the future
            submission.fail(error)


def _score(lane: _Lane, process: WorkerProcess, submission: _Submission) -> _Outcome:
    """One function's values of one submission; RewardError as its `on_error` says."""
    batch, config = submission.batch, lane.config
    size = len(batch.texts)
    reply = process.call(batch, config.timeout)
    if reply.failure is None:
        if reply.faults and config.on_error == "stop":
            raise _error(lane, submission, reply, reply.faults, size)
        return _outcome(reply, range(size), size)
    faults, tried = _one_by_one(process, batch, config)
    if config.on_error == "stop":
        raise _error(lane, submission, reply, faults, tried)
    sound = [position for position in range(tried) if position not in faults]
    if faults and sound:
        again = process.call(batch.select(sound), config.timeout)
        if again.failure is None:
            return _outcome(again, sound, size)
    return _Outcome(np.full(size, np.nan), np.ones(size, bool))


def _one_by_one(process: WorkerProcess, batch: Batch, config: RewardConfig) -> tuple[dict[int, str], int]:
    """Call the function with each completion alone: position -> what went wrong, and how many were tried.

    To stop the run one culprit is enough; after two time limits a batch that timed out was merely slow. To mask,
    every culprit is wanted, and each one that hangs costs a time limit: after ten the rest counts as untried.
    """
    stop = config.on_error == "stop"
    process.await_ready()  # the time that loading takes is not the function's
    deadline = time.monotonic() + config.timeout * (2 if stop else 10)
    faults: dict[int, str] = {}
    for position in range(len(batch.texts)):
        if time.monotonic() > deadline or (stop and faults):
            return faults, position
        reply = process.call(batch.select([position]), config.timeout)
        fault = reply.failure or reply.faults.get(0)
        if fault is not None:
            faults[position] = fault
    return faults, len(batch.texts)


def _error(lane: _Lane, submission: _Submission, reply: Reply, faults: Mapping[int, str], tried: int) -> RewardError:
    reward = f"reward {lane.name!r} ({lane.config.function})"
    size = len(submission.places)
    if faults:
        position, cause = min(faults.items())
        row, completion = submission.places[position]
        message = f"{reward}, dataset row {row} (counted from 0), completion {completion} of its group: {cause}"
        if reply.failure not in (None, cause):
            message += f"; the call with all {size} completions: {reply.failure}"
    else:
        passed = "every completion passed" if tried == size else f"the first {tried} passed, no time for the rest"
        message = (
            f"{reward}: the call with all {size} completions failed: {reply.failure}; called with one completion at a "
            f"time, {passed}. Look for what depends on the whole batch (its size, state, `timeout`)"
        )
    error = RewardError(message)
    if reply.trace:
        error.add_note(reply.trace)
    return error


def _outcome(reply: Reply, positions: Sequence[int], size: int) -> _Outcome:
    """A reply about the completions at `positions`, spread over the submission; the others are masked."""
    at = np.asarray(positions)
    values, masked = np.full(size, np.nan), np.ones(size, bool)
    values[at] = [np.nan if value is None else value for value in reply.values]
    masked[at] = [position in reply.faults for position in range(len(at))]
    extra = {column: [None] * size for column in reply.extra}
    for column, logged in reply.extra.items():
        for position, value in zip(positions, logged, strict=True):
            extra[column][position] = value
    return _Outcome(values, masked, extra, reply.metrics)


def _combine(groups: Sequence[Group], lanes: Sequence[_Lane], outcomes: Sequence[_Outcome]) -> list[Scores]:
    """The weighted sum of what applies (TRL's nansum). R rewards, N completions of all groups."""
    values_RN = np.stack([outcome.values for outcome in outcomes])
    weights_R = np.array([lane.config.weight for lane in lanes])
    masked_N = np.any([outcome.masked for outcome in outcomes], axis=0)
    unscored_N = np.isnan(values_RN).all(axis=0) & ~masked_N
    total_N = np.where(masked_N | unscored_N, np.nan, np.nansum(weights_R[:, None] * values_RN, axis=0))
    metrics: dict[str, float] = {}
    columns: dict[str, Sequence[Any]] = {}
    for lane, outcome in zip(lanes, outcomes, strict=True):
        for name, value in outcome.metrics.items():
            metrics[f"{lane.name}/{name}" if name in metrics else name] = value
        for name, values in outcome.extra.items():
            columns[f"{lane.name}/{name}" if name in columns else name] = values
    scores, start = [], 0
    for group in groups:
        own = slice(start, start + len(group.completions))
        start = own.stop
        extra = {name: values[own] for name, values in columns.items()} | metrics
        extra["not_applicable"] = int(unscored_N[own].sum())
        for lane, outcome in zip(lanes, outcomes, strict=True):
            if lane.config.on_error == "mask":
                extra[f"masked/{lane.name}"] = int(outcome.masked[own].sum())
        parts = {lane.name: values[own] for lane, values in zip(lanes, values_RN, strict=True)}
        scores.append(Scores(total_N[own], parts, extra))
    return scores


def _batch(groups: Sequence[Group], trainer_state: Mapping[str, Any]) -> Batch:
    """A column that some rows lack is None there, as in a `datasets.Dataset`."""
    names = {name: None for group in groups for name in group.prompt.columns if name not in NOT_COLUMNS}
    return Batch(
        prompts=[group.prompt.text for group in groups],
        columns={name: [group.prompt.columns.get(name) for group in groups] for name in names},
        group=[index for index, group in enumerate(groups) for _ in group.completions],
        texts=[one.text for group in groups for one in group.completions],
        token_ids=[np.asarray(one.token_ids, np.int32).tobytes() for group in groups for one in group.completions],
        state=trainer_state,
    )
