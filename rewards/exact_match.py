"""Reward: the completion is the answer, letter by letter."""

from collections.abc import Mapping, Sequence
from typing import Any


def exact_match(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float]:
    """1.0 where the completion equals the row's `answer`, surrounding white space aside; else 0.0. An answer that is no
    string (a number in the dataset) is compared as Python prints it."""
    pairs = zip(completions, answer, strict=True)
    return [float(completion_text(completion).strip() == str(gold).strip()) for completion, gold in pairs]


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a completion in either of TRL's formats; of a conversational one, the content of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
