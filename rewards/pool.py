"""Rewards scored by killable worker processes, in the background.

submit(groups) ──> one thread per reward ──> its worker process: one call with all completions
                                               │ the call fails: every completion alone, to find the culprit
                   Future[list[Scores]] <── weighted sum, when every reward has answered
"""

import math
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rewards.config import NOT_COLUMNS, RewardConfig
from rewards.worker import Batch, Reply
from rollout.types import Group, Scores


class RewardError(RuntimeError):
    """A reward function raised, hung or returned nonsense. The message names function, row and cause."""


class RewardSource(Protocol):
    """What answers for one reward. Its calls queue in `thread`."""

    config: RewardConfig
    thread: ThreadPoolExecutor

    def ready(self) -> None:
        """Wait until it can answer; RewardError when it never will."""

    def call(self, batch: Batch) -> Reply:
        """Score `batch`; whatever goes wrong is a `Reply` with `failure`. Raises as `ready`."""

    def close(self) -> None:
        """End it for good. Safe to call twice."""


LOAD_LIMIT = 300.0  # seconds for importing a reward's module, which may bring torch along


class RewardPool(AbstractContextManager["RewardPool"]):
    """Scores whole groups with a stage's rewards, in the background while other completions are still being sampled.

    A function that returns None for a completion does not apply to it and leaves the weighted sum, as in TRL; where no
    function applies, the total is NaN. on_error "stop": the future raises RewardError. "mask": the completions at fault
    have total NaN; the others' rewards come from one more call without them, never from calls with one completion
    alone, whose values a function that compares completions would get wrong.
    Scores.extra: where two functions log one name, the later function's; `log_metric` is of the whole submission."""

    def __init__(
        self, configs: Sequence[RewardConfig], base_dir: Path, steps: int = 0, models: Mapping[str, RewardSource] = {}
    ) -> None:
        """Start a process per reward function; returns before they are ready. The calling thread must outlive the pool.

        steps: of the stage, for `trainer_state`. models: what answers for the other rewards, by label; the pool
        closes them. A function that cannot be loaded makes the futures raise."""
        self._steps = steps
        self._workers = [models.get(config.label) or WorkerProcess(config, base_dir) for config in configs]
        self._sum = ThreadPoolExecutor(1)

    def submit(self, groups: Sequence[Group], trainer_state: Mapping[str, Any]) -> Future[list[Scores]]:
        """Start scoring `groups` in one call of each reward function.

        The future gives one `Scores` per group, in order, or raises `RewardError`.
        trainer_state: fields of TRL's `trainer_state`; `global_step` counts the batches before this one."""
        rows = [(group, completion) for group in groups for completion in group.completions]
        names = dict.fromkeys(name for group in groups for name in group.prompt.columns if name not in NOT_COLUMNS)
        # A column that some rows lack is None there, as in a `datasets.Dataset`.
        columns: dict[str, list[Any]] = {name: [group.prompt.columns.get(name) for group, _ in rows] for name in names}
        columns["prompts"] = [group.prompt.text for group, _ in rows]
        columns["completions"] = [group.answer(completion) for group, completion in rows]
        columns["completion_ids"] = [completion.token_ids.tolist() for _, completion in rows]
        batch = Batch(columns, {"max_steps": self._steps, **trainer_state})
        replies = [worker.thread.submit(_score, worker, groups, batch) for worker in self._workers]
        return self._sum.submit(_combine, groups, [worker.config for worker in self._workers], replies)

    def close(self) -> None:
        """Kill every worker; futures that are not done raise RewardError. Safe to call twice."""
        for worker in self._workers:
            worker.close()
        self._sum.shutdown()

    def __exit__(self, *exception: object) -> None:
        self.close()


class WorkerProcess:
    """One process with one reward function, loading from the start; started again after a hang or a death.

    A fresh interpreter: it inherits no torch, Ray or CUDA state, and the parent's `__main__` is not run again.
    It leads its own session, so that Ctrl-C does not reach it and a kill takes its children along. The kernel kills it
    when the thread that started it ends."""

    def __init__(self, config: RewardConfig, base_dir: Path) -> None:
        self.config = config
        self.thread = ThreadPoolExecutor(1)
        self._setup = pickle.dumps((config.function, config.args, base_dir))
        self._lock = threading.Lock()
        self._closed = False
        self._launch()

    def ready(self) -> None:
        if self._process.returncode is not None:
            self._launch()
        if not self._loaded and (failure := self._exchange(LOAD_LIMIT).failure) is not None:
            self._kill()
            reward = f"reward {self.config.function!r}"
            raise RewardError("the reward pool is closed" if self._closed else f"{reward}: {failure}")
        self._loaded = True

    def call(self, batch: Batch) -> Reply:
        self.ready()
        return self._exchange(self.config.timeout, batch)

    def close(self) -> None:
        with self._lock:
            self._closed = True
        self._kill()
        self.thread.shutdown()

    def _launch(self) -> None:
        self._connection, theirs = Pipe()
        bootstrap = (
            f"import sys; sys.path[:] = {sys.path!r}; from rewards.worker import main; "
            f"main({theirs.fileno()}, {os.getpid()}, {self._setup!r})"
        )
        with self._lock, theirs:
            if self._closed:
                raise RewardError("the reward pool is closed")
            self._loaded = False
            # The parent's standard output belongs to those who read it.
            streams = {"stdin": subprocess.DEVNULL, "stdout": 2, "pass_fds": (theirs.fileno(),)}
            command = [sys.executable, "-u", "-c", bootstrap]
            self._process = subprocess.Popen(command, **streams, start_new_session=True)

    def _exchange(self, limit: float, *batches: Batch) -> Reply:
        """Send, and wait for the next message; without one the process is dead afterwards."""
        try:
            for batch in batches:
                self._connection.send(batch)
            if self._connection.poll(limit):
                return self._connection.recv()
            self._kill()
            return Reply(failure=f"gave no answer within {limit:g} s")
        except (EOFError, ConnectionError):
            code = self._kill()  # too late for one that has exited: its exit code stays
            end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return Reply(failure=f"its process {end}")

    def _kill(self) -> int:
        """Kill the process and its children, and return its exit code (negative: the signal)."""
        with self._lock:
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
            return self._process.wait()


def _score(worker: RewardSource, groups: Sequence[Group], batch: Batch) -> Reply:
    """One function's values of a submission, a str where the completion is masked; RewardError as `on_error` says."""
    reply = worker.call(batch)
    values = reply.values if reply.failure is None else _one_by_one(worker, batch)
    sound = [position for position, value in enumerate(values) if not isinstance(value, str)]
    if worker.config.on_error == "stop" and (reply.failure is not None or len(sound) < len(values)):
        raise _error(worker.config, groups, reply, values)
    if reply.failure is None:
        return reply
    again = worker.call(batch.select(sound)) if 0 < len(sound) < len(values) else reply
    if again.failure is not None:
        return Reply(values=["masked"] * len(batch))

    def spread(found: Sequence[Any], other: Any) -> list[Any]:
        given = dict(zip(sound, found, strict=True))
        return [given.get(position, other) for position in range(len(batch))]

    logged = {name: spread(found, None) if isinstance(found, list) else found for name, found in again.logged.items()}
    return Reply(values=spread(again.values, "masked"), logged=logged)


def _one_by_one(worker: RewardSource, batch: Batch) -> list[float | str | None]:
    """Call the function with each completion alone: the values of those that were tried, a str for what went wrong. To
    stop the run one culprit is enough; after two time limits a batch that timed out was merely slow. To mask, every
    culprit is wanted, and each one that hangs costs a time limit: after ten the rest counts as untried."""
    stop = worker.config.on_error == "stop"
    worker.ready()  # the time that loading takes is not the function's
    deadline = time.monotonic() + worker.config.timeout * (2 if stop else 10)
    values: list[float | str | None] = []
    for position in range(len(batch)):
        reply = worker.call(batch.select([position]))
        values.append(reply.failure or reply.values[0])
        if time.monotonic() > deadline or (stop and isinstance(values[-1], str)):
            break
    return values


def _error(config: RewardConfig, groups: Sequence[Group], reply: Reply, values: Sequence[Any]) -> RewardError:
    """What went wrong in a call; `values`: of its completions, or of those that were then tried alone."""
    places = [(group.prompt.index, position) for group in groups for position in range(len(group.completions))]
    faults = [(place, cause) for place, cause in zip(places, values, strict=False) if isinstance(cause, str)]
    whole = f"the call with all {len(places)} completions"
    if faults:
        (row, completion), cause = faults[0]
        other = f"; {whole}: {reply.failure}" if reply.failure not in (None, cause) else ""
        said = f", dataset row {row} (counted from 0), completion {completion} of its group: {cause}{other}"
    else:
        said = (
            f": {whole} failed: {reply.failure}; with one at a time, the first {len(values)} passed. Look for what "
            "depends on the whole batch (its size, state, `timeout`)"
        )
    error = RewardError(f"reward {config.label!r} ({config.source}){said}")
    if reply.trace:
        error.add_note(reply.trace)
    return error


def _combine(groups: Sequence[Group], configs: Sequence[RewardConfig], futures: list[Future[Reply]]) -> list[Scores]:
    """Weighted sums of what applies to a completion (TRL's nansum); NaN where nothing does, or a function failed."""
    replies = [future.result() for future in futures]
    logged = {name: value for reply in replies for name, value in reply.logged.items()}
    failed_RN = np.array([[isinstance(value, str) for value in reply.values] for reply in replies])
    values_RN = np.array([[v if isinstance(v, float) else math.nan for v in reply.values] for reply in replies])
    applies_RN, weights_R1 = ~np.isnan(values_RN), np.array([[config.weight] for config in configs])
    totals_N = sum(np.where(applies_RN, weights_R1 * values_RN, 0.0))  # one after the other, not pairwise
    totals_N[failed_RN.any(axis=0) | ~applies_RN.any(axis=0)] = math.nan
    scores, end = [], 0
    for group in groups:
        own = slice(end, end := end + len(group.completions))
        extra = {name: value[own] if isinstance(value, list) else value for name, value in logged.items()}
        parts = {config.label: part_N[own] for config, part_N in zip(configs, values_RN, strict=True)}
        scores.append(Scores(totals_N[own], parts, extra))
    return scores
