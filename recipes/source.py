"""A YAML file as plain values, and where each of them was written: what error messages point at.

Scalars are read as YAML 1.2 reads them: `1e-6` is a number, `on`, `no` and `12:30` are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from recipes.errors import Problem, RecipeError, shorten
from rollout.functions import nearest

Key = tuple[str | int, ...]
DEEPEST = 40


@dataclass(frozen=True, slots=True)
class Source:
    """values: the mapping of the file, overrides applied. origins: `file:line` or the override that wrote a key."""

    path: Path
    values: Mapping[str, Any]
    origins: Mapping[Key, str]

    def origin(self, key: Key) -> str:
        """Where `key`, or else the nearest section around it, was written."""
        while key and key not in self.origins:
            key = key[:-1]
        return self.origins.get(key, str(self.path))

    def problem(self, key: Key, message: str) -> Problem:
        """A problem at `key`."""
        return Problem(self.origin(key), ".".join(map(str, key)), message)


def read_source(path: Path, overrides: Sequence[str] = ()) -> Source:
    """Read a YAML mapping and apply `key.path=value` overrides.

    Raises RecipeError: no such file, not YAML, not a mapping, a key that stands twice, an override of nothing.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError([Problem(str(path), "", f"cannot read this recipe: {_reason(error)}")]) from None
    origins: dict[Key, str] = {}
    values = _read(text, str(path), origins)
    if not isinstance(values, dict):
        raise RecipeError([Problem(str(path), "", "a recipe is a YAML mapping (`name: ...`, `model: ...`, ...)")])
    problems = []
    for override in overrides:
        try:
            _apply(values, origins, override)
        except _BadOverride as error:
            problems.append(Problem(f"--set {override}", "", str(error)))
    if problems:
        raise RecipeError(problems)
    return Source(path, values, origins)


class _BadOverride(Exception):
    pass


class _Loader(yaml.SafeLoader):
    """Refuses keys that stand twice; YAML 1.2's scalars."""

    yaml_implicit_resolvers: ClassVar[dict[str, list]] = {}

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.name = name
        self.twice: list[Problem] = []

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        first: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", key.start_mark)
            if key.value in first:
                message = f"this key stands twice, first on line {first[key.value]}"
                self.twice.append(Problem(f"{self.name}:{line}", key.value, message))
            first.setdefault(key.value, line)
        return node


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("merge", r"<<", "<"),
):
    _letters = [*_first, ""] if _tag == "null" else list(_first)
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _letters)


def _read(text: str, name: str, origins: dict[Key, str]) -> Any:
    """Values of a YAML text; `origins` gains `name:line` of every key."""
    try:
        loader = _Loader(text, name)
        node = loader.get_single_node()
        values = None if node is None else _plain(loader, node, (), origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise RecipeError([Problem(where, "", f"not YAML: {error.problem or error.context}")]) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError([Problem(name, "", f"not YAML: {shorten(str(error), lines=1)}")]) from None
    if loader.twice:
        raise RecipeError(loader.twice)
    return values


def _plain(loader: _Loader, node: yaml.Node, key: Key, origins: dict[Key, str]) -> Any:
    if len(key) > DEEPEST:
        raise yaml.composer.ComposerError(None, None, "nested too deeply (an alias inside itself?)", node.start_mark)
    origins.setdefault(key, f"{loader.name}:{node.start_mark.line + 1}")
    if isinstance(node, yaml.MappingNode):
        loader.flatten_mapping(node)
        values = {}
        for name, child in node.value:
            origins[(*key, name.value)] = f"{loader.name}:{name.start_mark.line + 1}"
            values[name.value] = _plain(loader, child, (*key, name.value), origins)
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, child, (*key, index), origins) for index, child in enumerate(node.value)]
    return loader.construct_object(node)


def _apply(values: dict[str, Any], origins: dict[Key, str], override: str) -> None:
    """Set one value in place: `rollout.max_length=64`, `stages.1.grpo.steps=20` or `stages.NAME.steps=20`."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise _BadOverride("write KEY=VALUE, e.g. stages.1.grpo.steps=20")
    try:
        value = _read(text, "value", {})
    except RecipeError as error:
        raise _BadOverride(str(error)) from None
    node: Any = values
    key: Key = ()
    for part in parts[:-1]:
        step = _step(node, key, part)
        for name in step:
            if isinstance(node, dict) and node.get(name) is None:
                node[name] = {}
            node = node[name]
        key += step
    step = _step(node, key, parts[-1])
    for name in step[:-1]:
        node = node[name]
    node[step[-1]] = value
    key += step
    for old in [old for old in origins if old[: len(key)] == key]:
        del origins[old]
    origins[key] = f"--set {override}"


def _step(node: Any, key: Key, part: str) -> Key:
    """The keys that one part of an override's path stands for, inside `node`."""
    where = ".".join(map(str, key)) or "the recipe"
    if isinstance(node, dict):
        return (part,)
    if not isinstance(node, list):
        raise _BadOverride(f"`{where}` is a value: there is no `{part}` in it")
    if part.isdecimal() and int(part) < len(node):
        return (int(part),)
    names = _stage_names(node) if key == ("stages",) else {}
    if part in names:
        return names[part]
    known = [str(index) for index in range(len(node))] + list(names)
    raise _BadOverride(f"`{where}` has no item `{part}`{nearest(part, known)}")


def _stage_names(stages: list) -> dict[str, Key]:
    names: dict[str, Key] = {}
    for index, stage in enumerate(stages):
        if isinstance(stage, dict) and len(stage) == 1:
            kind, config = next(iter(stage.items()))
            name = config.get("name") or kind if isinstance(config, dict) else kind
            names.setdefault(str(name), (index, kind))
    return names


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else f"it is not UTF-8 text ({error.reason})"
