"""Reward: the completion's mathematical answer equals the row's (math-verify)."""

import functools
import logging
from collections.abc import Sequence
from typing import Any

from math_verify import parse, verify

from rewards.exact_match import completion_text

LIMIT = 3
"""Seconds for reading an answer (milliseconds, as a rule), and for comparing it: `9^{9^9}` would take hours."""
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns, with the whole text, of every answer it gives up


def correct(completions: Sequence[Any], answer: Sequence[Any], **kwargs: Any) -> list[float | None]:
    r"""1.0 where the completion's answer equals the row's `answer` as mathematics, else 0.0.

    A row without `answer` gets None.

    Of a text with GSM8K's mark, what follows the last `####` counts, in gold answers and completions alike; of
    others, what math-verify finds: `\boxed{...}`, LaTeX, "the answer is ...", the last number. A completion without a
    readable answer, or with one that takes over three seconds to read or compare, scores 0.0.

    Call it from the main thread, as a reward's worker does: math-verify's time limits are signals.
    Raises ValueError for a gold answer that cannot be read: that is the dataset's fault, not the model's.

    >>> correct(completions=[r"So it is \boxed{\frac{1}{2}}.", "#### 3"], answer=["0.5", "1 + 1 = 2\n#### 2"])
    [1.0, 0.0]
    """
    pairs = zip(completions, answer, strict=True)
    return [None if gold is None else float(_equal(str(gold), completion_text(text))) for text, gold in pairs]


@functools.lru_cache(maxsize=4096)  # a group's completions repeat each other, and share the gold answer
def _equal(gold: str, completion: str) -> bool:
    expected = _read(gold)
    if not expected:
        raise ValueError(f"math-verify reads no answer in the gold answer {gold!r:.200}")
    return verify(expected, _read(completion), timeout_seconds=LIMIT)


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> list[Any]:
    """math-verify's readings of the answer in `text`; empty when there is none."""
    _, mark, answer = text.rpartition("####")
    return parse(answer.strip().partition("\n")[0] if mark else text, parsing_timeout=LIMIT)
