"""Reward: the completion has a given form."""

import re
from collections.abc import Sequence
from typing import Any

from rewards.exact_match import completion_text


def matches(completions: Sequence[Any], pattern: str, search: bool = False, **kwargs: Any) -> list[float]:
    """1.0 where the regular expression `pattern` matches the whole completion (`search`: any part of it), else 0.0.

    Flags stand in the pattern: `(?s)` lets a dot match line ends, `(?i)` ignores case. Raises re.error for a
    malformed pattern.

    >>> matches(completions=["<think>2+2</think>4", "4"], pattern=r"(?s)<think>.*</think>.+")
    [1.0, 0.0]
    """
    test = re.compile(pattern).search if search else re.compile(pattern).fullmatch
    return [float(test(completion_text(completion)) is not None) for completion in completions]
