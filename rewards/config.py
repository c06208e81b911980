"""Configuration of rewards, and what can be known of a reward function before it is called. No torch, Ray or vLLM."""

import inspect
from collections.abc import Set
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rewards.code import require_sandbox
from rollout.config import Config
from rollout.functions import load_function, nearest

PASSED = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""What every call passes by keyword, besides the row's columns and the recipe's `args` (TRL 1.16's GRPOTrainer)."""
NOT_COLUMNS = frozenset({"prompt", "completion", "completion_ids"})  # TRL does not hand them on


class RewardConfig(Config):
    """One reward of a stage: exactly one of `function`, `model` and `path`."""

    one_of = ("function", "model", "path")

    function: str | None = None
    """`module:function` or `file.py:function` with TRL's reward signature."""
    model: str | None = None
    """Name of an earlier `reward_model` stage, whose score is the reward."""
    path: str | None = None
    """A Transformers sequence classifier with one output: a directory (from the recipe's folder) or a hub name."""
    name: str | None = None
    """Name in metrics (`reward/<name>`) and reports; the function's or model's own by default."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments for the function."""
    normalize: Literal["running", "held_out"] | None = None
    """Subtract the mean and divide by the spread: of all scores so far, or of the reward model's held-out scores."""
    timeout: float = Field(60.0, gt=0)
    """Seconds that one call of a function may take."""
    on_error: Literal["stop", "mask"] = "stop"
    """A reward that raises, hangs or returns nonsense: end the run, or leave the completion out and count it."""

    @property
    def source(self) -> str:
        return self.function or self.model or self.path or ""

    @property
    def label(self) -> str:
        """The reward's name in metrics and reports."""
        return self.name or (self.source.rpartition(":")[2] if self.function else Path(self.source).name)

    @model_validator(mode="after")
    def _fits_its_source(self) -> Self:
        if self.args and not self.function:
            raise ValueError("`args` are for a `function`; remove them")
        if self.normalize == "held_out" and not self.model:
            raise ValueError("`normalize: held_out` needs a `model`, a reward model stage of this recipe")
        return self


def check_reward(config: RewardConfig, base_dir: Path, columns: Set[str]) -> None:
    """See that the function imports, and that a call with the dataset's `columns` fits its signature.

    Raises ValueError: as `load_function`; an argument in `args` that is no named parameter, a parameter without default
    that nothing gives (the nearest name is offered); an argument that the function does not take (TRL's functions have
    `**kwargs` for what they do not use), or that two sides give; programs to run, and no sandbox for them."""
    reward, passed = f"reward {config.function!r}", columns - NOT_COLUMNS
    signature = inspect.signature(load_function(config.function, base_dir))
    if twice := sorted(passed & {*PASSED, *config.args}):
        raise ValueError(f"{reward} gets {twice[0]!r} in any case: the dataset's column needs another name")
    given = {*PASSED, *passed, *config.args}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: parameter for name, parameter in signature.parameters.items() if parameter.kind not in variadic}
    if unknown := sorted(config.args.keys() - named):
        raise ValueError(f"{reward}: `args` has {unknown[0]!r}, no parameter of it{nearest(unknown[0], named)}")
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in given:
            hint = nearest(name, passed)
            raise ValueError(f"{reward} needs {name!r}, neither a column of the dataset nor in `args`{hint}")
    try:
        signature.bind(**dict.fromkeys(sorted(given)))
    except TypeError as error:
        raise ValueError(f"{reward} {error}: add **kwargs for what it does not use, as TRL asks") from error
    if config.function.startswith("rewards.code:") and config.args.get("sandbox") != "none":
        require_sandbox()
