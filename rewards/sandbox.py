"""Processes in a bubblewrap sandbox: no network, no files but the system's, an unprivileged user, limits. All processes
of a sandbox end with its first, and that one with the thread that started it."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import DEVNULL, PIPE, STDOUT, Popen
from threading import get_native_id
from typing import Any

PYTHON = (os.path.realpath(sys.executable), "-I", "-S", "-X", "int_max_str_digits=0", "-c")
SEEN = ("/usr", "/bin", "/lib", "/lib64", os.path.realpath(sys.base_prefix))
ABOVE = [part for at in ("/dev", *Path(SEEN[-1]).parents[-2::-1]) for part in ("--perms", "755", "--dir", str(at))]
OUTPUT = 16 << 20  # bytes of standard output that are read, and of a file that can be written


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
