"""What is wrong with a recipe, said so that a person can fix it: all of it, on one screen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SCREEN = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake. origin: `file:line` or the `--set` that made it. key: path of the key (`stages.1.grpo.steps`)."""

    origin: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.origin}: {self.key}: {self.message}" if self.key else f"{self.origin}: {self.message}"


class RecipeError(ValueError):
    """The recipe or the command line is wrong (exit code 2). The text names every problem, at most a screen of them."""

    def __init__(self, problems: Iterable[Problem | str]) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:SCREEN]]
        if len(self.problems) > SCREEN:
            lines.append(f"... and {len(self.problems) - SCREEN} more")
        super().__init__("\n".join(lines))


def shorten(text: str, lines: int = 4, width: int = 300) -> str:
    """The first `lines` lines of `text`, at most `width` characters of each."""
    kept = text.strip().splitlines()
    dots = ["..."] if len(kept) > lines else []
    return "\n".join([line if len(line) <= width else line[:width] + "..." for line in kept[:lines]] + dots)
