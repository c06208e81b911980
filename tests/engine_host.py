"""A process that holds one vLLM engine and runs functions on it: two engines cannot live in one process."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle
import tiny

from rollout.config import RolloutConfig
from rollout.vllm.environment import environment


class EngineHost:
    """Starts a fresh process with `environment`, makes the engine there, and calls functions on it."""

    def __init__(self, factory: Callable[[], Any], environment: Mapping[str, str]):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        before = dict(os.environ)
        os.environ.update({"OMP_NUM_THREADS": "1", **environment})
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)
        theirs.close()
        self._ask(factory)

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(engine, *args)` in the process; what it raises is raised here, its traceback in the notes."""
        return self._ask(function, *args)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _ask(self, *message: Any, timeout: float = 240.0) -> Any:
        self._pipe.send_bytes(cloudpickle.dumps(message))
        if not self._pipe.poll(timeout):
            self.close()
            raise TimeoutError(f"the engine's process gave no answer for {timeout} s")
        answer, error, trace = cloudpickle.loads(self._pipe.recv_bytes())
        if error is not None:
            error.add_note(trace)
            raise error
        return answer


@functools.cache
def shared(family: str, mla: bool) -> EngineHost:
    """One engine per model and MLA for the whole session: 256 tokens, 64 sequences, weights still to come.

    A test hands over the weights that it needs, and leaves no request running.
    """
    config = RolloutConfig(max_length=256, max_num_seqs=64, memory=0.25, mla=mla)
    folder = tiny.model_dir(family)

    def start() -> Any:
        from rollout.vllm.engine import VllmEngine

        return VllmEngine(folder, config, dummy=True)

    host = EngineHost(start, environment(config))
    atexit.register(host.close)
    return host


def _serve(pipe: Connection) -> None:
    engine: tuple[Any, ...] = ()
    while True:
        try:
            function, *args = cloudpickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer, error, trace = function(*engine, *args), None, ""
        except Exception as raised:
            answer, error, trace = None, raised, traceback.format_exc()
        if not engine:
            engine, answer = (answer,), None
        pipe.send_bytes(cloudpickle.dumps((answer, error, trace)))
