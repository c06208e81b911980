"""Waiting for actors so that a failure ends the run with its first cause, and soon."""

from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

LOOK = 10.0  # seconds without an answer after which the actors that should be idle are looked for
GRACE = 5.0  # seconds to look for the death that made the others fail, once one call has failed


class WorkerError(RuntimeError):
    """An actor died or raised. The message names the actor and says what happened first."""


def wait_all(calls: Mapping[str, ray.ObjectRef], idle: Mapping[str, Any] = {}) -> list[Any]:
    """The results of calls running at once, in order. calls: a name for messages -> the call's reference. idle: actors
    that have nothing to do meanwhile, by name: their death is noticed too.
    Raises WorkerError as soon as one fails, naming the one that died where a death made others fail too."""
    names = {ref: name for name, ref in calls.items()}
    pending = list(names)
    while pending:
        done = wait_any(pending, idle)
        pending.remove(done)
        if (failure := _failure(done)) is not None:
            failed, failure = _first_cause(done, failure, pending)
            raise WorkerError(f"{names[failed]}: {describe(failure)}") from failure
    return ray.get(list(names))


def wait_any(pending: Iterable[Any], idle: Mapping[str, Any]) -> Any:
    """The first of `pending` (references or streams) that is ready. Raises WorkerError when an idle actor has died."""
    while True:
        done, _ = ray.wait(list(pending), num_returns=1, timeout=LOOK)
        if done:
            return done[0]
        if idle:  # an idle actor answers at once, a dead one with an error
            wait_all({name: actor.pid.remote() for name, actor in idle.items()})


def _failure(ref: ray.ObjectRef) -> RayError | None:
    try:
        ray.get(ref)
    except RayError as error:
        return error
    return None


def _first_cause(failed: ray.ObjectRef, failure: RayError, pending: list[ray.ObjectRef]) -> tuple[Any, RayError]:
    """A dead rank makes the living ones fail in their collectives: a death outranks an exception."""
    if isinstance(failure, RayTaskError) and pending:
        for ref in ray.wait(pending, num_returns=len(pending), timeout=GRACE)[0]:
            if isinstance(other := _failure(ref), RayActorError):
                failed, failure = ref, other
    return failed, failure


def describe(error: RayError) -> str:
    """What happened, without Ray's own frames."""
    if isinstance(error, RayTaskError):
        return f"{type(error.cause).__name__}: {error.cause}"
    if isinstance(error, RayActorError) and error.actor_init_failed:
        lines = [line for line in str(error).strip().splitlines() if line.strip(" ^~")]
        frames = [number for number, line in enumerate(lines) if line.lstrip().startswith('File "')]
        own = lines[frames[-1] + 2 :] if frames else lines[-1:]  # the exception's, after its traceback
        return "it could not start: " + "\n".join(own)
    if isinstance(error, RayActorError):
        return f"the process died ({str(error).strip().splitlines()[-1].strip()})"
    return f"{type(error).__name__}: {error}"
