"""Configuration of rewards. No torch, Ray or vLLM here."""

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from rollout.config import Config


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
