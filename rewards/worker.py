"""Inside a reward's worker process: load the function, then answer batch after batch.

Imports neither numpy nor pydantic nor asyncio: a worker starts, and starts again after a kill, in a tenth of a second.
"""

import ctypes
import faulthandler
import functools
import inspect
import math
import os
import pickle
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any, Self

from rollout.functions import describe_error, load_function

PR_SET_PDEATHSIG = 1
TRAINER_STATE = {"epoch": 0.0, "global_step": 0, "max_steps": 0, "num_train_epochs": 0, "num_input_tokens_seen": 0,
                 "log_history": [], "is_local_process_zero": True, "is_world_process_zero": True}  # fmt: skip
"""Fields of transformers' TrainerState that a reward may read, where the caller gives no value."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of a reward function is made from; whole groups, N completions in order.

    columns: [N] each: `prompts`, `completions`, `completion_ids` and the dataset's. state: fields of TRL's
    `trainer_state`."""

    columns: Mapping[str, Sequence[Any]]
    state: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.columns["completions"])

    def select(self, positions: Sequence[int]) -> Self:
        columns = {name: [values[position] for position in positions] for name, values in self.columns.items()}
        return replace(self, columns=columns)


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one call.

    failure: why the call gave no values at all (with `trace`, the whole traceback), or None.
    values: [N] the reward; None for "not applicable"; a str that says why it is no reward.
    logged: [N] values per column of `log_extra`, as str, float, int, bool or None; means of `log_metric`."""

    failure: str | None = None
    trace: str = ""
    values: Sequence[float | str | None] = ()
    logged: Mapping[str, list[Any] | float] = field(default_factory=dict)


def main(fd: int, parent: int, setup: bytes) -> None:
    """Serve the socket `fd` until it closes. `setup`: pickled spec, args, base_dir. The first `Reply` comes once the
    function is loaded, or says why it is not; then one for each `Batch`."""
    # A function that hangs in C never reads the socket: only the kernel can end it when `parent` is killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.set_inheritable(fd, False)
    faulthandler.enable()
    connection = Connection(fd)
    spec, args, base_dir = pickle.loads(setup)
    try:
        function = load_function(spec, base_dir)
    except ValueError as error:
        connection.send(Reply(failure=str(error)))
        return
    connection.send(Reply())
    with suppress(EOFError):  # the parent is gone
        while True:
            connection.send(_answer(function, args, connection.recv()))


def _answer(function: Callable[..., Any], args: Mapping[str, Any], batch: Batch) -> Reply:
    extra: dict[str, list[Any]] = defaultdict(list)
    metrics: dict[str, list[float]] = defaultdict(list)
    try:
        result = function(
            trainer_state=SimpleNamespace(**TRAINER_STATE | dict(batch.state)),
            log_extra=lambda column, values: extra[column].extend(map(_plain, values)),
            log_metric=lambda name, value: metrics[name].append(float(value)),
            # As in TRL, a function may change each completion's values in place.
            **{name: [pickle.loads(pickle.dumps(value)) for value in values] for name, values in batch.columns.items()},
            **args,
        )
        if inspect.isawaitable(result):
            result = _event_loop().run_until_complete(result)
        if not isinstance(result, Iterable):
            raise TypeError(f"it returned {result!r:.60}, not a list of rewards")
        values = [_reward(value) for value in result]
    except BaseException as error:  # sys.exit() in a reward is an error of the reward, not the end of the worker
        source = vars(sys.modules[function.__module__]).get("__file__")
        return Reply(failure=describe_error(error, source), trace="".join(traceback.format_exception(error)))
    if len(values) != len(batch):
        return Reply(failure=f"returned {len(values)} rewards for {len(batch)} completions")
    for column, logged in extra.items():
        if len(logged) != len(batch):
            return Reply(failure=f"log_extra({column!r}, ...) got {len(logged)} values for {len(batch)} completions")
    means = {name: sum(logged) / len(logged) for name, logged in metrics.items()}
    return Reply(values=values, logged=dict(extra) | means)


@functools.cache
def _event_loop() -> Any:
    """One loop for the worker's life, so that the clients an async reward keeps stay usable."""
    import asyncio  # half of a worker's start, and few rewards need it

    return asyncio.new_event_loop()


def _reward(value: Any) -> float | str | None:
    """The value as a float, None as it is, or what is wrong with it in words."""
    if value is None:
        return None
    try:
        finite = math.isfinite(value)  # unlike float(), it reads no text or buffer as a number
    except (TypeError, ValueError, OverflowError, RuntimeError):  # text, an array of several numbers, 10**400
        return f"returned {value!r:.60}, not a number"
    return float(value) if finite else f"returned {float(value)}"


def _plain(value: Any) -> Any:
    """Values for the log cross to a process that has not imported the user's types."""
    return value if type(value) in (str, float, int, bool, type(None)) else str(value)
