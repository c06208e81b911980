"""What a bare interpreter in a sandbox runs, `program FD` or `tests FD`: one side of the socket FD. Plain data cross as
JSON lines; no pickle, no marshal, which could run what a program makes up."""

import builtins
import io
import json
import os
import re
import signal
import sys
from collections.abc import Callable

PLAIN = {kind.__name__: kind for kind in (list, tuple, set, frozenset, dict, bytes, complex)}
CHANNEL = io.BufferedRWPair(io.FileIO(int(sys.argv[2])), io.FileIO(int(sys.argv[2]), "w", closefd=False))


def pack(value: object) -> object:
    """Plain data for JSON; of a subclass what its plain base holds. Raises TypeError for any other object."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for name, kind in PLAIN.items():
        if isinstance(value, kind):
            return [name, *map(pack, value.items() if kind is dict else [str(value)] if kind is complex else value)]
    raise TypeError(f"a {type(value).__name__} is no plain data")


def unpack(data: object) -> object:
    if not isinstance(data, list):
        return data
    return complex(*data[1:]) if data[0] == "complex" else PLAIN[data[0]](map(unpack, data[1:]))


def send(*message: object) -> None:
    CHANNEL.write(json.dumps(message).encode() + b"\n")
    CHANNEL.flush()


def receive() -> list:
    """The next message; where the other side has ended, or sends more than 16 MiB, this one ends too."""
    line = CHANNEL.readline(1 << 24)
    return json.loads(line) if line.endswith(b"\n") else os._exit(1)


def serve_program() -> None:
    """Load the program that the other side sends, then answer calls of its functions."""
    names = vars(sys.modules.setdefault("program", type(sys)("program")))
    send("ready")
    exec(compile(*receive(), "program", "exec"), names)
    send("loaded")
    while True:
        name, args, kwargs = receive()
        try:
            reply = None, pack(names[name](*unpack(args), **unpack(kwargs)))
        except BaseException as error:  # the tests judge it
            reply = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"), str(error)
        send(*reply)


def run_tests() -> None:
    """Run the tests of the job on standard input; say `ready` and, if all pass, `passed` on standard output."""
    job, sys.stdout = json.load(sys.stdin), sys.stderr  # what tests print is no verdict
    receive()
    os.write(1, b"ready")
    signal.setitimer(signal.ITIMER_REAL, job["seconds"])  # which ends this process; the start took none of them
    send(job["prefix"] + job["program"])
    receive()
    # A name without a meaning is the program's; what the row's prefix defines is not the program's to change.
    names = {name: stand_in(name) for name in set(re.findall(r"\w+", job["tests"])) - vars(builtins).keys()}
    exec(compile(job["prefix"], "prefix", "exec"), names)
    names |= {name: stand_in(job["entry_point"]) for name in (job["entry_point"], "candidate")}
    exec(compile(job["tests"], "tests", "exec"), names)
    os.write(1, b" passed")


def stand_in(name: str) -> Callable[..., object]:
    """The program's function for the tests. It gets copies: what it changed could be what they compare with."""

    def call(*args: object, **kwargs: object) -> object:
        send(name, pack(args), pack(kwargs))
        error, value = receive()
        if error is not None:
            kind = vars(builtins).get(error)
            raise kind(value) if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(error, value)
        return unpack(value)

    return call


{"program": serve_program, "tests": run_tests}[sys.argv[1]]()
