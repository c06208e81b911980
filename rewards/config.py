"""Configuration of rewards. No torch, Ray or vLLM here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rollout.config import Config


class RewardConfig(Config):
    """One reward function of a stage."""

    function: str
    """`module:function` or `file.py:function` with TRL's reward signature."""
    name: str | None = None
    """Name in metrics (`reward/<name>`) and reports; the function's own by default."""
    weight: float = 1.0
    """Factor of this reward in the sum."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Extra keyword arguments for the function."""
    timeout: float = Field(60.0, gt=0)
    """Seconds that one call may take."""
    on_error: Literal["stop", "mask"] = "stop"
    """A reward that raises, hangs or returns nonsense: end the run, or leave the completion out and count it."""

    @property
    def label(self) -> str:
        """The reward's name in metrics and reports."""
        return self.name or self.function.rpartition(":")[2]
