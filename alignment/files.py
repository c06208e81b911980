"""Files and folders that are there whole or not at all, whenever the process ends."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
