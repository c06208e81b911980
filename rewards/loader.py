"""A reward function from its spec, with its signature checked against what TRL's GRPOTrainer passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rollout.functions import load_function, nearest

if TYPE_CHECKING:  # a worker process loads functions without pydantic
    from rewards.config import RewardConfig

PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every call passes by keyword, besides the row's columns and the recipe's `args` (TRL 1.16's GRPOTrainer)."""
NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})
"""Columns that TRL does not hand on."""


def load_reward(spec: str, args: Mapping[str, Any], base_dir: Path) -> Callable[..., Any]:
    """Load a reward function and see that it takes what every call passes.

    TRL calls `f(prompts=..., completions=..., completion_ids=..., trainer_state=..., log_extra=..., log_metric=...,
    **columns)`, so a function without `**kwargs` must name all of these. `args` must be named parameters.

    Raises ValueError: as `load_function`, or naming what the signature lacks.
    """
    function = load_function(spec, base_dir)
    if inspect.isclass(function):
        raise ValueError(f"reward {spec!r} is a class: name a function, or an instance of the class with __call__")
    parameters = _parameters(spec, function)
    named = _named(parameters)
    unknown = [key for key in args if key not in named]
    if unknown:
        raise ValueError(f"reward {spec!r}: `args` has {unknown[0]!r}, no parameter of it{nearest(unknown[0], named)}")
    _refuse_unaccepted(spec, parameters, (*PASSED, *args))
    return function


def check_reward(config: RewardConfig, base_dir: Path, columns: Set[str]) -> None:
    """What `align check` can know of a reward: it imports, and a call with the dataset's `columns` fits its signature.

    Raises ValueError: as `load_reward`; a parameter without default that is no column (the nearest is offered); a
    column the function does not take; a column that has the name of something passed anyway or set in `args`.
    """
    function = load_reward(config.function, config.args, base_dir)
    passed = columns - NOT_COLUMNS
    for name in sorted(passed):
        if name in PASSED:
            raise ValueError(f"column {name!r} has the name of an argument that every reward gets: rename the column")
        if name in config.args:
            raise ValueError(
                f"reward {config.function!r}: {name!r} is a column of the dataset and set in `args` too: keep one"
            )
    parameters = _parameters(config.function, function)
    for name, parameter in parameters.items():
        wanted = parameter.default is parameter.empty and name in _named(parameters)
        if wanted and name not in passed and name not in PASSED and name not in config.args:
            raise ValueError(
                f"reward {config.function!r} needs {name!r}, which is neither a column of the dataset nor in "
                f"`args`{nearest(name, passed)}"
            )
    _refuse_unaccepted(config.function, parameters, sorted(passed))


def _parameters(spec: str, function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError as error:
        raise ValueError(f"reward {spec!r} has no readable signature: wrap it in a Python function") from error
    for parameter in parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
            raise ValueError(f"reward {spec!r}: {parameter.name!r} is positional-only; rewards are called by keyword")
    return parameters


def _named(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, parameter in parameters.items() if parameter.kind in kinds]


def _refuse_unaccepted(spec: str, parameters: Mapping[str, inspect.Parameter], passed: Iterable[str]) -> None:
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    lacking = [name for name in passed if name not in _named(parameters)]
    if lacking:
        raise ValueError(
            f"reward {spec!r} is called with {', '.join(map(repr, lacking))} by keyword and takes no such argument: "
            "add **kwargs to its signature (TRL's GRPOTrainer asks for the same)"
        )
