"""The metrics of every step: a crash-safe file in the run folder, and trackers for those who want them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.config import TrackerKind
from alignment.files import write_text

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker


def plain_number(key: str, value: Any) -> int | float | None:
    """A JSON number, or None for None, NaN and infinities (JSON has none). Raises ValueError naming `key`."""
    if value is not None and not isinstance(value, Real):
        raise ValueError(f"metric {key!r} is {value!r}, a {type(value).__name__}; log a number or None")
    if value is None or not math.isfinite(value):
        return None
    return int(value) if isinstance(value, Integral) else float(value)


class MetricsLog:
    """Appends one JSON object per step to `path`.

    Each line reaches the operating system before `append` returns, so a killed process loses nothing; a line torn
    by a crash of the machine is cut off when the log is opened again, and `read` ignores it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def append(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write one step. NaN becomes null. Raises ValueError for a value that is no number."""
        row = {"step": step, **{key: plain_number(key, value) for key, value in metrics.items()}}
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        self._file.close()


def truncate_after(path: Path, step: int) -> None:
    """Forget the rows of a .jsonl file past `step`, all or nothing: a run that resumes there writes them again."""
    if path.is_file():
        kept = [json.dumps(row, ensure_ascii=False) + "\n" for row in read(path) if row["step"] <= step]
        write_text(path, "".join(kept))


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a .jsonl file, in order; a last line torn by a crash is left out.

    Raises ValueError naming file and line when a whole line is not JSON.
    """
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


class Trackers:
    """Sends the metrics of one stage to TensorBoard and W&B, through accelerate's trackers.

    TensorBoard: one run per stage in RUN/tensorboard/STAGE. W&B: one run per stage, in the group of the run folder's
    name; its id is kept in RUN/wandb/STAGE.id. `first_step` is the next step to be logged: TensorBoard drops what an
    earlier, killed process logged from there on, and W&B keeps the first of two values of a step, which are the same.
    config: shown beside the curves (the resolved recipe).
    """

    def __init__(
        self, kinds: Sequence[TrackerKind], run_dir: Path, stage: str, config: Mapping[str, Any], first_step: int = 1
    ) -> None:
        check_trackers(kinds)
        self._trackers = [_start(kind, run_dir, stage, config, first_step) for kind in dict.fromkeys(kinds)]

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Log one step; values that are None or NaN are left out."""
        present = {key: number for key, value in metrics.items() if (number := plain_number(key, value)) is not None}
        for tracker in self._trackers:
            tracker.log(present, step=step)

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, *_: object) -> None:
        """Flush and end every tracker."""
        for tracker in self._trackers:
            tracker.finish()


def _start(kind: TrackerKind, run_dir: Path, stage: str, config: Mapping[str, Any], first_step: int) -> GeneralTracker:
    # Imported here: who only reads metrics must not wait for torch.
    from accelerate import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState(cpu=True)  # accelerate's logger, which its trackers use, refuses to work without it
    folder = run_dir / kind
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "tensorboard":
        fresh = not (folder / stage).exists()
        tracker = TensorBoardTracker(stage, folder, purge_step=first_step)
        tracker.start()
        if fresh:
            tracker.log({"recipe": "```\n" + json.dumps(config, indent=2, default=str) + "\n```"}, step=0)
        return tracker
    id_file = folder / f"{stage}.id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(4), encoding="utf-8")
    name = run_dir.resolve().name
    tracker = WandBTracker(
        "align", id=id_file.read_text(encoding="utf-8"), resume="allow", name=f"{name}/{stage}", group=name, dir=run_dir
    )
    tracker.start()
    tracker.store_init_configuration(dict(config))
    return tracker
