"""The sampler's protocol: what the rest of the house may ask of an inference engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import xxhash

from rollout.types import Prompt, Trajectory


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to sample.

    prompt: [T] int32 token ids. max_tokens: most new tokens. temperature: 0 is greedy.
    seed: the request's own; the same seed, prompt and weights give the same completion.
    stop: strings that end the completion (cut from the text); the model's end token always does.
    ignore_eos: for benchmarks. logprobs: ask for the sampled tokens' log-probabilities; routes: and for the experts
    of all tokens, where the engine can tell them."""

    prompt: np.ndarray
    max_tokens: int
    temperature: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: bool = True
    routes: bool = False


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a batch of prompts is sampled: `completions` per prompt from the full distribution at `temperature`."""

    completions: int
    max_tokens: int
    temperature: float
    seed: int


def group_requests(prompts: Sequence[Prompt], places: Sequence[int], sampling: Sampling, step: int) -> list[Request]:
    """The requests of prompts at `places` of a batch, prompt by prompt; a seed is made of what its request is for. The
    place, and not the prompt's row, is in the seed: a batch that reaches into the next epoch may hold a row twice."""
    return [
        Request(
            prompt=prompt.token_ids,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=xxhash.xxh64_intdigest(np.array([sampling.seed, step, place, g], np.int64)) >> 1,
            routes=True,
        )
        for prompt, place in zip(prompts, places, strict=True)
        for g in range(sampling.completions)
    ]


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished request: `index` into the requests given, the trajectory, its completion's text."""

    index: int
    text: str
    trajectory: Trajectory


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-probabilities of a given sequence: both arrays [T], entry 0 is NaN / False. logprobs[t] = log p(token t |
    tokens before t) at temperature 1; greedy[t]: token t was the argmax."""

    logprobs: np.ndarray
    greedy: np.ndarray


class Sampler(Protocol):
    """One engine or many replicas of it, with the newest weights."""

    max_length: int
    """Most tokens of a sequence, prompt and completion together."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Yield samples as they finish, in any order; every request yields exactly once."""

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        """Log-probabilities of given token sequences, in their order."""
