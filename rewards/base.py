"""The protocol between rollouts and rewards."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from rollout.types import Group, Scores


class RewardError(RuntimeError):
    """A reward function raised, hung or returned nonsense. The message names function, row and cause."""


class Scorer(Protocol):
    """Scores whole groups in the background while other completions are still being sampled."""

    def submit(self, groups: Sequence[Group], trainer_state: Mapping[str, Any]) -> Future[list[Scores]]:
        """Start scoring `groups` in one call of each reward function.

        The future gives one `Scores` per group, in order, or raises `RewardError`.
        trainer_state: fields of TRL's `trainer_state`; `global_step` counts the batches before this one.
        """

    def close(self) -> None:
        """End every worker process. Safe to call twice."""
