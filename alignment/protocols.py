"""What one step of a stage needs; `hybrid_engine` implements it, tests fake it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch

from rewards.pool import RewardPool
from rollout.sampler import Sampler, Sampling
from rollout.types import Group, Handle, Prompt, Trajectory

Phase = Literal["generate", "score", "reference", "train"]


@dataclass(frozen=True, slots=True)
class Step:
    """What a finished step of a stage leaves. step: from 1. groups: scored completions, where the stage samples."""

    step: int
    metrics: dict[str, float]
    groups: Sequence[Group] = ()


@dataclass(frozen=True, slots=True)
class TrainRow:
    """One sequence to train on. The driver knows handles; the rank that gets the row puts in what lies behind them.

    group: rows of the same group share prefixes and go to the same rank.
    length: tokens of the sequence, for balancing.
    advantage: A_i (eq. 34); 1.0 in SFT; of a reward model the target, as `Judged.targets`.
    weight: factor of each of its tokens in the loss; all normalisation is in here, once (the loss is a plain sum).
    old_logprobs, reference_logprobs: float32 [tokens], or None (on-policy; no KL)."""

    trajectory: Handle | Trajectory
    group: int
    length: int
    advantage: float
    weight: float
    old_logprobs: Handle | np.ndarray | None = None
    reference_logprobs: Handle | np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Every loss-carrying token of a micro-batch, flat: all tensors [C], C tokens.

    logprobs: log p of each token under the weights in training (carries the gradient); of a reward model its score.
    old_logprobs: under the weights that sampled them, by the trainer's forward (logprobs detached when on-policy).
    reference_logprobs: under the reference, or None. advantages, weights: of the token's row.
    sampler_logprobs: as the sampler reported them (NaN where nothing was sampled). rows: int64, the token's row."""

    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor | None
    advantages: torch.Tensor
    weights: torch.Tensor
    sampler_logprobs: torch.Tensor | None = None
    rows: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class LossOutputs:
    """loss: scalar, a weighted sum over tokens. sums: detached scalars, each a weighted sum too, for metrics."""

    loss: torch.Tensor
    sums: Mapping[str, torch.Tensor]


Loss = Callable[[LossInputs], LossOutputs]


class Policy(Protocol):
    """The policy in its training layout, over all ranks."""

    def update(
        self, rows: Sequence[TrainRow], loss: Loss, *, learning_rate: float, temperature: float, max_grad_norm: float
    ) -> dict[str, float]:
        """One optimiser step on the summed loss of `rows`; the metrics of the step."""

    def logprobs(self, rows: Sequence[TrainRow], *, temperature: float, reference: bool = False) -> list[Handle]:
        """Handles to float32 [tokens] of each row's loss-carrying tokens."""

    def scores(self, rows: Sequence[TrainRow]) -> np.ndarray:
        """A reward model's score of each row: float32 [rows]."""


class Engine(Protocol):
    """The hybrid engine: one policy, a training layout and a rollout layout."""

    precision: str
    """The less precise of training and rollout: "float32" or "bfloat16"."""
    sampler: Sampler
    """The live engines with the newest weights (handed over if they are not in yet)."""

    def rollouts(
        self, batches: Iterable[tuple[int, Sequence[Prompt]]], sampling: Sampling, scorer: RewardPool
    ) -> Iterator[list[Group]]:
        """For each (step, prompts): newest weights in, sampled, scored as they finish; groups in prompt order."""

    def phase(self, name: Phase) -> AbstractContextManager[Policy]:
        """Make resident what the phase needs, and time it."""

    def take_metrics(self) -> dict[str, Any]:
        """Phase times and engine metrics since the last call: `time/*` seconds, `handover/*`."""
