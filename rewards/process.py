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
    """One process with one reward function loaded.

    A fresh interpreter: it inherits no torch, Ray or CUDA state, and the parent's `__main__` is not run again.
    It leads its own session, so that Ctrl-C does not reach it and `kill` takes its children along. What it prints
    goes to standard error. The kernel kills it when the thread that launched it ends.
    """

    def __init__(self, spec: str, args: Mapping[str, Any], base_dir: Path) -> None:
        self._spec = spec
        self._setup = pickle.dumps((spec, dict(args), base_dir))
        self._lock = threading.Lock()
        self._closed = False
        self._ready = False
        self._process: subprocess.Popen[bytes] | None = None

    def launch(self) -> None:
        """Start the process and return at once; `call` waits until the function is loaded."""
        ours, theirs = Pipe()
        bootstrap = (
            f"import sys; sys.path[:] = {sys.path!r}; from rewards.worker import main; "
            f"main({theirs.fileno()}, {os.getpid()}, {self._setup!r})"
        )
        with self._lock, theirs:
            if self._closed:
                raise RewardError("the reward pool is closed")
            self._ready = False
            self._connection = ours
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-c", bootstrap],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # the parent's standard output belongs to those who read it
                start_new_session=True,
            )

    def await_ready(self) -> None:
        """Wait until the function is loaded; RewardError when it cannot be."""
        if self._process is None:
            self.launch()
        if self._ready:
            return
        try:
            problem = self._connection.recv() if self._connection.poll(LOAD_LIMIT) else f"took over {LOAD_LIMIT:g} s"
        except (EOFError, ConnectionError):
            problem = f"its process {self._ending()}"
        if problem is not None:
            self._kill()
            self._process = None
            raise RewardError("the reward pool is closed" if self._closed else f"reward {self._spec!r}: {problem}")
        self._ready = True

    def call(self, batch: Batch, limit: float) -> Reply:
        """Score `batch` within `limit` seconds. A hang or a death is a `Reply` with `failure`, and a new process.

        Raises RewardError when the function cannot be loaded, or the worker is closed.
        """
        self.await_ready()
        try:
            self._connection.send(batch)
            if self._connection.poll(limit):
                return self._connection.recv()
            self._kill()
            failure = f"gave no answer within {limit:g} s"
        except (EOFError, ConnectionError):
            failure = f"its process {self._ending()}"
        self.launch()
        return Reply(failure=failure)

    def close(self) -> None:
        """Kill the process for good; a `call` under way in another thread raises RewardError."""
        with self._lock:
            self._closed = True
        self._kill()

    def _ending(self) -> str:
        """How the process ended; the kill comes too late for one that has exited, and leaves its exit code alone."""
        code = self._kill()
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def _kill(self) -> int:
        """Kill the process and its children, and return its exit code (negative: the signal)."""
        with self._lock:
            if self._process is None:  # never launched
                return 0
            if self._process.returncode is None:
                os.killpg(self._process.pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
            return self._process.wait()
