"""The parent's side of a worker process: start it, call it with a time limit, kill it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from rewards.base import RewardError
from rewards.worker import Batch, Reply

LOAD_LIMIT = 300.0
"""Seconds for importing a reward's module, which may bring torch along."""


class WorkerProcess:
    """One process with one reward function, loading from the start; started again after a hang or a death.

    A fresh interpreter: it inherits no torch, Ray or CUDA state, and the parent's `__main__` is not run again.
    It leads its own session, so that Ctrl-C does not reach it and a kill takes its children along. What it prints
    goes to standard error. The kernel kills it when the thread that started it ends.
    """

    def __init__(self, spec: str, args: Mapping[str, Any], base_dir: Path) -> None:
        self._spec = spec
        self._setup = pickle.dumps((spec, dict(args), base_dir))
        self._lock = threading.Lock()
        self._closed = False
        self._launch()

    def ready(self) -> None:
        """Wait until the function is loaded; RewardError when it cannot be, or the worker is closed."""
        if self._process.returncode is not None:
            self._launch()
        if not self._loaded:
            failure = self._exchange(LOAD_LIMIT).failure
            if failure is not None:
                self._kill()
                raise RewardError("the reward pool is closed" if self._closed else f"reward {self._spec!r}: {failure}")
            self._loaded = True

    def call(self, batch: Batch, limit: float) -> Reply:
        """Score `batch` within `limit` seconds; a hang or a death is a `Reply` with `failure`. Raises as `ready`."""
        self.ready()
        return self._exchange(limit, batch)

    def close(self) -> None:
        """Kill the process for good; a `call` after it raises RewardError."""
        with self._lock:
            self._closed = True
        self._kill()

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
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", bootstrap],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # the parent's standard output belongs to those who read it
                start_new_session=True,
            )

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
