"""A process that holds one vLLM engine and runs functions on it: two engines cannot live in one process."""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import tiny
from torch.distributed.elastic.utils.distributed import get_free_port

from hybrid_engine.layout import rollout_ranks
from rollout.config import RolloutConfig
from rollout.vllm.environment import environment, installed

CAPABLE = installed().device == "cuda" or installed().version >= (0, 32)
"""vLLM's CPU build before 0.32 has no MLA, tells no routes, has no engines of several ranks, and packs no experts."""
needs_capable_vllm = pytest.mark.skipif(not CAPABLE, reason="vLLM's CPU build cannot do this before 0.32")


class EngineHost:
    """Starts a fresh process with `environment`, makes the engine there, and calls functions on it."""

    def __init__(self, factory: Callable[[], Any], environment: Mapping[str, str], *, wait: bool = True):
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
        self._send(factory)
        if wait:
            self.wait()

    def wait(self) -> Any:
        """Until the engine is there."""
        return self._receive()

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """`function(engine, *args)` in the process; what it raises is raised here, its traceback in the notes."""
        return self._ask(function, *args)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()

    def _ask(self, *message: Any) -> Any:
        self._send(*message)
        return self._receive()

    def _send(self, *message: Any) -> None:
        self._pipe.send_bytes(cloudpickle.dumps(message))

    def _receive(self, timeout: float = 240.0) -> Any:
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


class EngineGroup:
    """Every rank of every engine of a rollout layout, a host for each; all make the same calls at the same time."""

    def __init__(self, folder: Path, config: RolloutConfig):
        ports = [str(get_free_port()) for _ in range(config.replicas)]
        places = rollout_ranks(config)
        self._threads = ThreadPoolExecutor(len(places))

        def start() -> Any:
            from rollout.vllm.engine import VllmEngine

            return VllmEngine(folder, config, dummy=True)

        # One after the other: each changes this process's environment while it starts its own.
        meet = [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} for port in ports]
        variables = [environment(config, place.rank) | meet[place.engine] for place in places]
        self.hosts = [EngineHost(start, own, wait=False) for own in variables]
        self.each(EngineHost.wait)

    def each(self, function: Callable[..., Any], *args: Sequence[Any]) -> list[Any]:
        """`function(host, *args of that rank)` for every rank's host at once."""
        return list(self._threads.map(function, self.hosts, *args))

    def close(self) -> None:
        """End the processes."""
        for host in self.hosts:
            host.close()


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
