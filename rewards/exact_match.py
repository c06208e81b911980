"""Reward: the completion is the answer, letter by letter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rewards.text import completion_text


def exact_match(
    completions: Sequence[Any], answer: Sequence[Any], ignore_case: bool = False, **kwargs: Any
) -> list[float]:
    """1.0 where the completion equals the row's `answer`, surrounding white space aside; else 0.0.

    An answer that is no string (a number in the dataset) is compared as Python prints it.

    >>> exact_match(completions=[" 42\\n", "41"], answer=["42", "42"])
    [1.0, 0.0]
    """

    def normal(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [
        float(normal(completion_text(completion)) == normal(str(gold)))
        for completion, gold in zip(completions, answer, strict=True)
    ]
