"""Inside a reward's worker process: load the function, then answer batch after batch.

Imports neither numpy nor pydantic nor asyncio: a worker starts, and starts again after a kill, in a tenth of a second.
"""

from __future__ import annotations

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
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, SupportsFloat

from rewards.loader import load_reward

if TYPE_CHECKING:
    import asyncio

PR_SET_PDEATHSIG = 1
TRAINER_STATE = {"epoch": 0.0, "global_step": 0, "max_steps": 0, "num_train_epochs": 0, "num_input_tokens_seen": 0,
                 "log_history": [], "is_local_process_zero": True, "is_world_process_zero": True}  # fmt: skip
"""Fields of transformers' TrainerState that a reward may read, where the caller gives no value."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of a reward function is made from; whole groups, N completions in order.

    prompts, columns: one value per group. group: [N] which of them each completion belongs to.
    texts: [N]. token_ids: [N] little bytes of int32. state: fields of TRL's `trainer_state`.
    """

    prompts: Sequence[Any]
    columns: Mapping[str, Sequence[Any]]
    group: Sequence[int]
    texts: Sequence[str]
    token_ids: Sequence[bytes]
    state: Mapping[str, Any]

    def select(self, positions: Sequence[int]) -> Batch:
        """These completions only, with their groups' values."""
        groups = sorted({self.group[position] for position in positions})
        return Batch(
            [self.prompts[index] for index in groups],
            {name: [values[index] for index in groups] for name, values in self.columns.items()},
            [groups.index(self.group[position]) for position in positions],
            [self.texts[position] for position in positions],
            [self.token_ids[position] for position in positions],
            self.state,
        )


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one call.

    failure: why the call gave no values at all (with `trace`, the whole traceback), or None.
    values: [N] float, or None for "not applicable". faults: position -> why its value is no reward.
    extra: [N] values per column of `log_extra`, as str, float, int, bool or None. metrics: means of `log_metric`.
    """

    failure: str | None = None
    trace: str = ""
    values: Sequence[float | None] = ()
    faults: Mapping[int, str] = field(default_factory=dict)
    extra: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)


def main(fd: int, parent: int, setup: bytes) -> None:
    """Serve the socket `fd` until it closes. `setup`: pickled spec, args, base_dir.

    The first message says None once the function is loaded, or what is wrong with it; then a `Reply` per `Batch`.
    """
    # A function that hangs in C never reads the socket: only the kernel can end it when `parent` is killed.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    os.set_inheritable(fd, False)
    faulthandler.enable()
    connection = Connection(fd)
    spec, args, base_dir = pickle.loads(setup)
    try:
        function = load_reward(spec, args, base_dir)
    except ValueError as error:
        connection.send(str(error))
        return
    connection.send(None)
    while True:
        try:
            batch = connection.recv()
        except EOFError:
            return
        connection.send(_answer(function, args, batch))


def _answer(function: Callable[..., Any], args: Mapping[str, Any], batch: Batch) -> Reply:
    extra: dict[str, list[Any]] = defaultdict(list)
    metrics: dict[str, list[float]] = defaultdict(list)
    try:
        result = function(
            prompts=_spread(batch.prompts, batch.group),
            completions=_completions(batch),
            completion_ids=[memoryview(ids).cast("i").tolist() for ids in batch.token_ids],
            trainer_state=SimpleNamespace(**TRAINER_STATE | dict(batch.state)),
            log_extra=lambda column, values: extra[column].extend(map(_plain, values)),
            log_metric=lambda name, value: metrics[name].append(float(value)),
            **{name: _spread(values, batch.group) for name, values in batch.columns.items()},
            **args,
        )
        if inspect.isawaitable(result):
            result = _event_loop().run(_wait(result))
        if not isinstance(result, Iterable):
            raise TypeError(f"it returned {result!r:.60}, not a list of rewards")
        values = list(result)
    except BaseException as error:  # sys.exit() in a reward is an error of the reward, not the end of the worker
        return Reply(failure=_cause(error, function), trace="".join(traceback.format_exception(error)))
    size = len(batch.texts)
    if len(values) != size:
        return Reply(failure=f"returned {len(values)} rewards for {size} completions")
    for column, logged in extra.items():
        if len(logged) != size:
            return Reply(failure=f"log_extra({column!r}, ...) got {len(logged)} values for {size} completions")
    checked = [_reward(value) for value in values]
    return Reply(
        values=[None if isinstance(value, str) else value for value in checked],
        faults={position: value for position, value in enumerate(checked) if isinstance(value, str)},
        extra=dict(extra),
        metrics={name: sum(logged) / len(logged) for name, logged in metrics.items()},
    )


@functools.cache
def _event_loop() -> asyncio.Runner:
    """One loop for the worker's life, so that the clients an async reward keeps stay usable."""
    import asyncio  # half of a worker's start, and few rewards need it

    return asyncio.Runner()


async def _wait(result: Awaitable[Any]) -> Any:
    return await result


def _spread(values: Sequence[Any], group: Sequence[int]) -> list[Any]:
    """Each group's value once per completion; what can be changed in place is a copy of its own, as in TRL."""
    copies = [value if isinstance(value, str | int | float | None) else pickle.dumps(value) for value in values]
    return [pickle.loads(copy) if isinstance(copy, bytes) else copy for copy in (copies[index] for index in group)]


def _completions(batch: Batch) -> list[Any]:
    return [
        text if isinstance(batch.prompts[index], str) else [{"role": "assistant", "content": text}]
        for index, text in zip(batch.group, batch.texts, strict=True)
    ]


def _reward(value: Any) -> float | str | None:
    """The value as a float, None as it is, or what is wrong with it in words."""
    if value is None:
        return None
    # The plain types first: to ask a protocol takes 8 microseconds, and there are hundreds of values.
    number = isinstance(value, float | int) or (not isinstance(value, str | bytes) and isinstance(value, SupportsFloat))
    if not number:
        return f"returned {value!r:.60}, not a number"
    try:
        reward = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # an array of several numbers, 10**400
        return f"returned {type(value).__name__}, not one number ({error})"
    return reward if math.isfinite(reward) else f"returned {reward}"


def _plain(value: Any) -> Any:
    """Values for the log cross to a process that has not imported the user's types."""
    return value if type(value) in (str, float, int, bool, type(None)) else str(value)


def _cause(error: BaseException, function: Callable[..., Any]) -> str:
    """`ValueError: what it says (my_rules.py, line 12: the line)`, with the deepest line in the function's own file."""
    while isinstance(function, functools.partial):
        function = function.func
    source = vars(sys.modules[function.__module__]).get("__file__")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == source]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno}: {own[-1].line})" if own else ""
    return f"{type(error).__name__}: {error}{where}"
