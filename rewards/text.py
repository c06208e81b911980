"""The text of a completion, whichever of TRL's two formats it comes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def completion_text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    """A plain completion as it is; of a conversational one, the content of the last message."""
    return completion if isinstance(completion, str) else completion[-1]["content"]
