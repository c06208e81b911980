"""A sampler of known probabilities and a tokenizer of one token per character, for the evals' tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np

from rollout.sampler import Request, Sample, TokenScores
from rollout.types import Trajectory

NEXT = {
    "a": {"b": 0.5, "c": 0.25},
    "b": {"a": 0.7, "c": 0.2},
    "c": {"a": 0.6, "b": 0.3},
    "=": {"a": 0.4, " ": 0.5},
    " ": {"a": 0.1, "b": 0.8},
    "\0": {"a": 0.05, "b": 0.9},
}
"""p(next character | character); every other one has the probability 1/1024."""
ELSE = 1 / 1024
END = 0


class Characters:
    """Token ids are code points; 0 is the end token. With `bos`, the character that begins each encoded text."""

    name_or_path = "characters"
    chat_template = None
    eos_token_id = END

    def __init__(self, bos: str | None = None) -> None:
        self.bos_token, self.bos_token_id = bos, None if bos is None else ord(bos)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        prefix = self.bos_token if add_special_tokens and self.bos_token else ""
        return [ord(character) for character in prefix + text]


class BigramSampler:
    """Knows `NEXT`; generates `answer(prompt text, request)`, cut at the stop strings, the last request first."""

    def __init__(
        self, answer: Callable[[str, Request], str] = lambda prompt, request: "", max_length: int = 4096
    ) -> None:
        self.answer, self.max_length = answer, max_length
        self.generated: list[list[Request]] = []
        self.scored: list[list[str]] = []

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        self.generated.append(list(requests))
        for index in reversed(range(len(requests))):
            request = requests[index]
            text = self.answer("".join(map(chr, request.prompt)), request)[: request.max_tokens]
            for stop in request.stop:
                text = text.split(stop)[0]
            tokens = np.array([*request.prompt, *map(ord, text), END], np.int32)
            mask = np.arange(len(tokens)) >= len(request.prompt)
            yield Sample(index, text, Trajectory(tokens, mask, np.where(mask, -1.0, np.nan).astype(np.float32), "stop"))

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        texts = ["".join(map(chr, sequence)) for sequence in sequences]
        self.scored.append(texts)
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> TokenScores:
        assert 0 < len(text) <= self.max_length
        logprobs, greedy = [np.nan], [False]
        for before, after in pairwise(text):
            row = NEXT.get(before, {})
            logprobs.append(np.log(row.get(after, ELSE)))
            greedy.append(bool(row) and after == max(row, key=lambda key: row[key]))
        return TokenScores(np.array(logprobs, np.float32), np.array(greedy))
