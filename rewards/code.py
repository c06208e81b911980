"""Reward: the completion is a program that passes its tests. Each runs in a sandbox of its own; a socket between them
carries calls and plain values, and the verdict comes over a pipe that only the tests' process has.

The sandbox is bubblewrap's: no network, no files but the system's, an unprivileged user, limits. All its processes end
with its first, and that one with the thread that started it.
"""

import json
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from threading import get_native_id
from typing import Any

from rewards.exact_match import completion_text

PYTHON = (os.path.realpath(sys.executable), "-I", "-S", "-X", "int_max_str_digits=0", "-c")
SEEN = ("/usr", "/bin", "/lib", "/lib64", os.path.realpath(sys.base_prefix))
ABOVE = [part for at in ("/dev", *Path(SEEN[-1]).parents[-2::-1]) for part in ("--perms", "755", "--dir", str(at))]
OUTPUT = 16 << 20  # bytes of standard output that are read, and of a file that can be written
SIDE = (*PYTHON, Path(__file__).with_name("inside.py").read_text())


@dataclass(frozen=True, slots=True)
class Sandbox:
    """seconds: in `run`. memory: MiB of a process, and of /tmp. processes: with threads. bare: only `seconds` holds."""

    seconds: float = 60.0
    memory: int = 512
    processes: int = 8
    bare: bool = False

    def run(self, command: Sequence[str | bytes], given: bytes = b"", **options: Any) -> bytes:
        """What a command, with `given` on its standard input, prints before its time is up. Options as in `start`."""
        with os.fdopen(os.memfd_create("input"), "r+b", 0) as file:
            os.pwrite(file.fileno(), given, 0)
            process = self.start(["timeout", "-sKILL", f"{self.seconds}", *command], stdin=file, stdout=PIPE, **options)
        with process:
            try:
                return process.stdout.read(OUTPUT)
            finally:
                process.kill()

    def start(self, command: Sequence[str | bytes], fds: Sequence[int] = (), **streams: Any) -> Popen[bytes]:
        """Start a command, which inherits `fds`. Killing the process that is returned ends all of the sandbox."""
        streams = {"stdin": DEVNULL, "stdout": DEVNULL, "stderr": DEVNULL, "pass_fds": fds, **streams}
        if self.bare:
            return Popen(command, **streams)
        size, user = self.memory << 20, 61184 + get_native_id() % 4336  # no account has an id of this range
        # RLIMIT_NPROC does not bind root; bubblewrap puts any other user into a namespace, where it counts anew.
        become = () if os.getuid() else ("setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups")
        return Popen(
            ["choom", "-n", "1000", "--", "bwrap", "--die-with-parent", "--new-session", *ABOVE]  # out of memory: first
            + [f"--unshare-{space}" for space in ("pid", "net", "ipc", "uts")]
            + [part for folder in SEEN for part in ("--ro-bind-try", folder, folder)]
            + ["--dev-bind", "/dev/null", "/dev/null", "--perms", "1777", "--size", str(size), "--tmpfs", "/tmp"]
            + ["--remount-ro", "/", *become, "prlimit", f"--nproc={self.processes}", f"--as={size}"]
            + [f"--fsize={OUTPUT}", "--nofile=64", "--core=0", *command],
            env={"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"},
            **streams,
        )


def require_sandbox(documents: Any = None) -> Any:
    """The documents of an lm-eval task, as they are. Raises ValueError, with what to do, where no sandbox starts."""
    said = Sandbox().run([*PYTHON, "print(1)"], stderr=STDOUT).decode(errors="replace").strip()
    if said != "1":
        raise ValueError(f"running programs needs bubblewrap (`apt-get install bubblewrap`), which says here: {said}")
    return documents


def passes_tests(
    completions: Sequence[Any], tests: Sequence[Any], prefix: str | None = None, command: str | None = None,
    seconds: float = 5.0, memory: int = 512, processes: int = 8, sandbox: str = "bubblewrap", **columns: Any,
) -> list[float | None]:  # fmt: skip
    """1.0 where the completion's program (its last fenced block, else all of it) passes the row's `tests`, else 0.0.

    A row without tests gets None.

    tests: Python, a text or a list of texts, which calls the program's functions by name or, like HumanEval's, defines
    `check(candidate)` for the one that the column `entry_point` names. Copies of plain data (None, numbers, str, bytes,
    lists, tuples, sets, dicts) and builtin exceptions cross. prefix: the column (`prompts`) with Python that precedes
    the program. command: of another language; the program becomes its last argument, and `tests` are a list of
    {"input", "output"}. seconds, memory (MiB of a process), processes: limits. sandbox "none": with your own rights.
    Raises SyntaxError for tests or a prefix that are no Python, RuntimeError where no sandbox starts."""
    box = Sandbox(seconds if command else seconds + 60, memory, processes, bare=sandbox == "none")

    if command and not box.run(["sh", "-c", 'command -v "$0"', shlex.split(command)[0]]):
        raise RuntimeError(f"the sandbox cannot run {command!r}: it sees the system's folders alone")

    def score(position: int) -> bool | None:
        if tests[position] is None:
            return None
        text, test = completion_text(completions[position]), tests[position]
        before = columns[prefix][position] if prefix else ""
        program = (re.findall(r"(?s)```[^\n]*\n(.*?)(?:```|\Z)", text) or [text])[-1]
        if command:
            call = [*shlex.split(command), (before + program).replace("\0", "").encode(errors="replace")[:100_000]]
            return all(box.run(call, one["input"].encode()).split() == one["output"].encode().split() for one in test)
        source = test if isinstance(test, str) else "\n".join(test)
        source += "\ncheck(candidate)" * ("def check(" in source)
        compile(f"{before}\n{source}", "tests", "exec")
        entry = columns["entry_point"][position] if prefix or "candidate" in source else None
        return _passes(box, prefix=before, program=program, tests=source, entry_point=entry, seconds=seconds)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return [None if passed is None else float(passed) for passed in pool.map(score, range(len(completions)))]


def _passes(box: Sandbox, **job: Any) -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        program = box.start([*SIDE, "program", str(theirs.fileno())], [theirs.fileno()])
        theirs.close()
        with program:
            try:
                said = box.run([*SIDE, "tests", str(ours.fileno())], json.dumps(job).encode(), fds=[ours.fileno()])
            finally:
                program.kill()
    if not said:
        raise RuntimeError(f"no sandbox came up within {box.seconds:g} s; `align check` says why it cannot")
    return said == b"ready passed"


def pass_at_1(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results` for HumanEval."""
    return {"pass@1": passes_tests(results[:1], [doc["test"]], "prompt", **{key: [doc[key]] for key in doc})[0]}
