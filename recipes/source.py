"""A YAML file as plain values, where each of them was written, and the errors that point there."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Key = tuple[str | int, ...]
SCREEN = 20


class RecipeError(ValueError):
    """The recipe or the command line is wrong (exit code 2). The text names every problem, at most a screen of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = [f"... and {len(problems) - SCREEN} more"] if len(problems) > SCREEN else []
        super().__init__("\n".join([*problems[:SCREEN], *more]))


def shorten(text: str, lines: int = 4, width: int = 300) -> str:
    """The first `lines` lines of `text`, at most `width` characters of each."""
    kept = text.strip().splitlines()
    dots = ["..."] if len(kept) > lines else []
    return "\n".join([line if len(line) <= width else line[:width] + "..." for line in kept[:lines]] + dots)


class Source(NamedTuple):
    """values: the mapping of the file, overrides applied. origins: `file:line` or the override that wrote a key."""

    values: Mapping[str, Any]
    origins: Mapping[Key, str]

    def problem(self, key: Key, message: str) -> str:
        """`file:line: key: message`, with the line of `key` or else of the nearest section around it."""
        written = key
        while written not in self.origins:
            written = written[:-1]
        return f"{self.origins[written]}: {'.'.join(map(str, key))}: {message}"


def read_source(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Read a YAML mapping and apply `key.path=value` overrides.

    Raises RecipeError: no such file, not YAML, not a mapping, a key that stands twice, an override of nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([f"{path}: cannot read this recipe: {error}"]) from None
    values, origins = _read(text, str(path))
    if not isinstance(values, dict):
        raise RecipeError([f"{path}: a recipe is a YAML mapping (`name: ...`, `model: ...`, ...)"])
    problems = []
    for override in overrides:
        try:
            _apply(values, origins, override)
        except ValueError as error:
            problems.append(f"--set {override}: {error}")
    if problems:
        raise RecipeError(problems)
    return Source(values, origins)


class _Loader(yaml.SafeLoader):
    """Refuses keys that stand twice; `1e-6` is a number, as in YAML 1.2."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        names: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be plain text", problem_mark=key.start_mark)
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` stands twice", problem_mark=key.start_mark)
            names.add(key.value)
        return node


_EXPONENT = re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))


def _read(text: str, name: str) -> tuple[Any, dict[Key, str]]:
    """Values of a YAML text, of which nothing is shared between aliases, and `name:line` of every key."""
    origins: dict[Key, str] = {}

    def plain(node: yaml.Node, mark: yaml.Mark, key: Key) -> Any:
        origins[key] = f"{name}:{mark.line + 1}"
        if isinstance(node, yaml.MappingNode):
            loader.flatten_mapping(node)
            return {part.value: plain(child, part.start_mark, (*key, part.value)) for part, child in node.value}
        if isinstance(node, yaml.SequenceNode):
            return [plain(child, child.start_mark, (*key, index)) for index, child in enumerate(node.value)]
        return loader.construct_object(node)

    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return node and plain(node, node.start_mark, ()), origins
    except yaml.MarkedYAMLError as error:
        raise RecipeError([f"{name}:{error.problem_mark.line + 1}: not YAML: {error.problem}"]) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # the last: an alias inside itself
        raise RecipeError([f"{name}: not YAML: {shorten(str(error), lines=1)}"]) from None


def _apply(values: dict[str, Any], origins: dict[Key, str], override: str) -> None:
    """Set one value in place: `rollout.max_length=64` or `stages.1.grpo.steps=20`."""
    path, equals, text = override.partition("=")
    key = tuple(int(part) if part.isdecimal() else part for part in path.strip().split("."))
    if not equals or "" in key:
        raise ValueError("write KEY=VALUE, e.g. stages.1.grpo.steps=20")
    value, _ = _read(text, "value")
    node: Any = values
    try:
        for part in key[:-1]:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]
        node[key[-1]] = value
    except (IndexError, TypeError):
        there = shorten(repr(node), 1, 60)
        raise ValueError(f"there is no such key in `{there}`; items of lists count from 0") from None
    for old in [old for old in origins if old[: len(key)] == key]:
        del origins[old]
    origins[key] = f"--set {override}"
