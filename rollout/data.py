"""Rows of a dataset as plain dicts: local files, a hub dataset, or a function."""

import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rollout.config import DataConfig
from rollout.functions import load_function

FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


def load_rows(config: DataConfig, base_dir: Path, data_dir: Path | None = None) -> list[dict[str, Any]]:
    """The rows of a dataset, columns renamed, at most `limit` of them.

    A relative path is read from `data_dir` when given, else from `base_dir` (the recipe's folder). A .json file holds
    a list of objects, or an object with such a list under `examples`. Rows are counted from 0 in every message.

    Raises `ValueError` naming the file or function, and the row or line, when the data is not what it should be."""
    if config.function is not None:
        source, rows = config.function, _function_rows(config.function, config.args, base_dir)
    else:
        source, rows = _path_rows(config, data_dir or base_dir)
    if not rows:
        raise ValueError(f"{source}: the dataset is empty")
    rows, names = rows[: config.limit], config.columns
    for index, row in enumerate(rows):
        if not isinstance(row, dict):
            raise ValueError(f"{source}, row {index}: expected an object with columns, got {type(row).__name__}")
        if missing := [old for old in names.values() if old not in row]:
            raise ValueError(f"{source}, row {index}: no column `{missing[0]}`; there are: {', '.join(row)}")
    return [row | {new: row[old] for new, old in names.items()} for row in rows]


def row_texts(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Every string that a policy reads or writes: what to train a tokenizer on (prompts, completions, chats)."""
    for row in rows:
        for name in ("prompt", "completion", "chosen", "rejected", "messages", "conversations"):
            value = row.get(name)
            for item in value if isinstance(value, list) else [value]:
                fields = item.values() if isinstance(item, Mapping) else [item]
                yield from (field for field in fields if field and isinstance(field, str))


def _path_rows(config: DataConfig, folder: Path) -> tuple[str, list[Any]]:
    path = folder / Path(config.path).expanduser()
    if path.is_file() and path.suffix in FILE_SUFFIXES:
        if config.args:
            raise ValueError(f"{path}: `args` are for `function` and for hub datasets; remove them")
        return str(path), _file_rows(path)
    if path.is_file():
        raise ValueError(f"{path}: cannot read this kind of file; use one of {', '.join(FILE_SUFFIXES)}")
    if not path.is_dir() and (path.suffix in FILE_SUFFIXES or config.path.startswith((".", "~", "/"))):
        raise ValueError(f"{path}: no such file")
    import datasets

    name = str(path) if path.is_dir() else config.path  # `datasets` reads a directory of files as it reads the hub
    arguments = {"split": "train"} | config.args
    try:
        dataset = datasets.load_dataset(name, **arguments)
    except (OSError, ValueError, TypeError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{name}: neither a file here nor loadable as a hub dataset ({arguments}): {error}") from error
    return name, dataset.select(range(min(config.limit or len(dataset), len(dataset)))).to_list()


def _file_rows(path: Path) -> list[Any]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            return pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowException as error:
            raise ValueError(f"{path}: not a readable Parquet file: {error}") from error
    data = path.read_bytes()
    if path.suffix == ".jsonl":
        lines = enumerate(data.splitlines(), start=1)
        return [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    content = _parse(data, str(path))
    rows = content.get("examples") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f'{path}: expected a list of objects, or an object like {{"examples": [...]}}')
    return rows


def _parse(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise ValueError(f"{where}: not valid JSON: {error}") from error


def _function_rows(spec: str, args: Mapping[str, Any], base_dir: Path) -> list[Any]:
    function = load_function(spec, base_dir)
    try:
        inspect.signature(function).bind(**args)
    except TypeError as error:
        raise ValueError(f"{spec}: the recipe's `args` do not fit the function: {error}") from error
    try:
        rows = function(**args)
    except Exception as error:
        raise ValueError(f"{spec} raised {type(error).__name__}: {error}") from error
    if isinstance(rows, (str, bytes, Mapping)) or not isinstance(rows, Iterable):
        raise ValueError(f"{spec} must return a list of row dicts, got {type(rows).__name__}")
    return list(rows)
