"""Waiting for actors so that a failure ends the run with its first cause, and in bounded time."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

CALL_TIMEOUT = 3600.0
"""Seconds that one call of an actor may take; a rank that waits for a dead one is found long before."""

GRACE = 5.0
"""Seconds to look for the death that made the others fail, once one call has failed."""


class WorkerError(RuntimeError):
    """An actor died or raised. The message names the actor and says what happened first."""


def wait_all(calls: Mapping[str, ray.ObjectRef], timeout: float = CALL_TIMEOUT) -> list[Any]:
    """The results of calls running at once, in order. `calls`: a name for messages -> the call's reference.

    Raises WorkerError as soon as one fails, naming the one that died where a death made others fail too.
    """
    names = {ref: name for name, ref in calls.items()}
    pending = list(names)
    deadline = time.monotonic() + timeout
    while pending:
        done, pending = ray.wait(pending, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not done:
            waiting = ", ".join(names[ref] for ref in pending)
            raise WorkerError(f"no answer within {timeout:.0f} s from {waiting}")
        failure = _failure(done[0])
        if failure is not None:
            _raise_first_cause(names, done[0], failure, pending)
    return ray.get(list(names))


def result(name: str, ref: ray.ObjectRef, timeout: float = CALL_TIMEOUT) -> Any:
    """The result of one call; raises as `wait_all` does."""
    return wait_all({name: ref}, timeout)[0]


def _failure(ref: ray.ObjectRef) -> RayError | None:
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _raise_first_cause(
    names: Mapping[ray.ObjectRef, str], failed: ray.ObjectRef, failure: RayError, pending: list[ray.ObjectRef]
) -> None:
    """A dead rank makes the living ones fail in their collectives: a death outranks an exception."""
    if isinstance(failure, RayTaskError):
        done, _ = ray.wait(pending, num_returns=len(pending), timeout=GRACE) if pending else ([], [])
        for ref in done:
            other = _failure(ref)
            if isinstance(other, RayActorError):
                failed, failure = ref, other
    raise WorkerError(f"{names[failed]}: {describe(failure)}") from failure


def describe(error: RayError) -> str:
    """What happened, without Ray's own frames."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        return f"{type(cause).__name__}: {cause}"
    if isinstance(error, RayActorError):
        return f"the process died ({str(error).strip().splitlines()[-1].strip()})"
    if isinstance(error, GetTimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}"
