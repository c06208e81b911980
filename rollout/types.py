"""What a policy said, and everything that is known about it. These types cross every boundary.

Shape letters: T tokens of a sequence, G completions of a prompt, L MoE layers, K experts per token.
"""

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

FinishReason = Literal["stop", "length", "abort"]
Text = str | list[dict[str, Any]]
"""A plain string, or chat messages (`role`, `content`): TRL's standard and conversational formats."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a prompt dataset, tokenised.

    index: the row's position in its dataset, for messages and samples.
    text: the prompt as a reward function receives it (a string, or chat messages).
    token_ids: [T] int32, what the policy reads (chat template and generation prompt applied).
    columns: the row's other columns, passed to reward functions by name."""

    index: int
    text: Text
    token_ids: np.ndarray
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens [start, end) of a trajectory were written by the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One sequence: a prompt and all that came after it, by the policy or not.

    token_ids: [T] int32. loss_mask: [T] bool, True where the policy spoke (a tool's or a user's later
    turn is False). logprobs: [T] float32, the sampler's log-probability of each token under the
    distribution it was sampled from; NaN where loss_mask is False (or nothing was sampled, as in SFT).
    version_spans: which weights wrote which tokens. routes: [T-1, L, K] int16 expert ids, or None.

    Example: prompt [5, 7], completion [9, 2] -> token_ids [5, 7, 9, 2], loss_mask [F, F, T, T],
    logprobs [nan, nan, -0.3, -1.2], version_spans (VersionSpan(3, 2, 4),)."""

    token_ids: np.ndarray
    loss_mask: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...] = ()
    routes: np.ndarray | None = None


class Packed(tuple[Any, ...]):
    """Many values, pickled into one: between processes each array costs more than its bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pickle.loads, (pickle.dumps(tuple(self), protocol=5),)


@dataclass(frozen=True, slots=True)
class Handle:
    """Where a large value lies: item `index` of the list behind `ref`. `ref` is opaque outside `hybrid_engine` (there,
    a Ray object reference or what it refers to)."""

    ref: Any
    index: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What the driver holds of one trajectory: the text and its token ids; the rest is behind `handle`.

    text: decoded completion, special tokens left out. token_ids: the completion's tokens alone,
    end token included. handle: resolves to the `Trajectory`."""

    text: str
    token_ids: np.ndarray
    finish_reason: FinishReason
    handle: Handle


@dataclass(frozen=True, slots=True)
class Scores:
    """Rewards of one group. total: [G] float64, NaN where the completion leaves the group (`on_error: mask`).

    parts: each reward function's own values [G] before weighting; NaN where it returned None.
    extra: values that a function logged through `log_extra` (lists of length G) or `log_metric` (floats)."""

    total: np.ndarray
    parts: Mapping[str, np.ndarray]
    extra: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The G completions of one prompt; `scores` is None until they are scored."""

    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: Scores | None = None

    def answer(self, completion: Completion) -> Text:
        """One of the completions in the prompt's form: a string, or the assistant's message."""
        plain = isinstance(self.prompt.text, str)
        return completion.text if plain else [{"role": "assistant", "content": completion.text}]
