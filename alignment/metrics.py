"""Crash-safe files of a run folder, its metrics among them, and trackers for those who want them."""

import importlib.util
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from alignment.config import TrackerKind


def write_text(path: Path, text: str) -> Path:
    """Write a file, or replace it, in one piece; `path`."""
    unfinished(path).write_text(text, encoding="utf-8")
    return unfinished(path).replace(path)


def unfinished(path: Path) -> Path:
    """Where `path` lies until it is written."""
    return path.with_name(f".{path.name}.new")


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """The new folder `unfinished(path)`, which becomes `path`, its files synced to disk, when the block ends well."""
    folder = unfinished(path)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    yield folder
    for file in filter(Path.is_file, folder.rglob("*")):
        with file.open("rb") as opened:
            os.fsync(opened)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        path.rename(old)  # never half deleted under its name
    folder.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def plain_number(key: str, value: Any) -> int | float | None:
    """A JSON number, or None for None, NaN and infinities (JSON has none). Raises ValueError naming `key`."""
    if value is not None and not isinstance(value, Real):
        raise ValueError(f"metric {key!r} is {value!r}, a {type(value).__name__}; log a number or None")
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows as a .jsonl file holds them."""
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)


def append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a .jsonl file. They reach the operating system before it returns: a killed process loses none."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json_lines(rows))


def append_step(path: Path, step: int, metrics: Mapping[str, Any]) -> None:
    """Add a step to metrics.jsonl. NaN becomes null. Raises ValueError for a value that is no number."""
    append(path, [{"step": step, **{key: plain_number(key, value) for key, value in metrics.items()}}])


def truncate_after(path: Path, step: int) -> None:
    """Forget the rows of a .jsonl file past `step`, all or nothing, and a line torn by a crash of the machine: a run
    that resumes there writes them again."""
    if path.is_file():
        write_text(path, json_lines(row for row in read(path) if row["step"] <= step))


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a .jsonl file, in order; a last line torn by a crash is left out. Raises ValueError naming
    file and line when a whole line is not JSON."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}; the file was edited or damaged") from error
    return rows


def check_trackers(kinds: Sequence[TrackerKind]) -> None:
    """Raises ValueError when a tracker's library is not installed. Imports nothing."""
    for kind in kinds:
        spec = importlib.util.find_spec(kind)
        if spec is None or spec.origin is None:  # without an origin it is a mere folder of that name
            raise ValueError(f"trackers: {kind} is not installed; `pip install {kind}`, or take it out of the recipe")


@contextmanager
def trackers(
    kinds: Sequence[TrackerKind], run_dir: Path, stage: str, config: Mapping[str, Any], first_step: int = 1
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """What logs a step of a stage (values that are None or NaN left out) to TensorBoard and W&B, through accelerate.

    TensorBoard: one run per stage in RUN/tensorboard/STAGE. W&B: one run per stage, in the group of the run folder's
    name; its id is kept in RUN/wandb/STAGE.id. `first_step` is the next step to be logged: TensorBoard drops what an
    earlier, killed process logged from there on, and W&B keeps the first of two values of a step, which are the same.
    config: what W&B shows beside the curves (the resolved recipe)."""
    check_trackers(kinds)
    started = [_start(kind, run_dir, stage, config, first_step) for kind in dict.fromkeys(kinds)]

    def log(step: int, metrics: Mapping[str, Any]) -> None:
        present = {key: number for key, value in metrics.items() if (number := plain_number(key, value)) is not None}
        for tracker in started:
            tracker.log(present, step=step)

    try:
        yield log
    finally:
        for tracker in started:
            tracker.finish()


def _start(kind: TrackerKind, run_dir: Path, stage: str, config: Mapping[str, Any], first_step: int) -> Any:
    # Imported here: who only reads metrics must not wait for torch.
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState(cpu=True)  # accelerate's logger, which its trackers use, refuses to work without it
    folder = run_dir / kind
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "tensorboard":
        tracker = TensorBoardTracker(stage, folder, purge_step=first_step)
        tracker.start()
        return tracker
    id_file, group = folder / f"{stage}.id", run_dir.resolve().name
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run_id = id_file.read_text(encoding="utf-8")
    tracker = WandBTracker("align", id=run_id, resume="allow", name=f"{group}/{stage}", group=group, dir=run_dir)
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker
