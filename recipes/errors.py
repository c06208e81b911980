"""What is wrong with a recipe, said so that a person can fix it: all of it, on one screen."""

from collections.abc import Sequence

SCREEN = 20


class RecipeError(ValueError):
    """The recipe or the command line is wrong (exit code 2). The text names every problem, at most a screen of them."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = [f"... and {len(problems) - SCREEN} more"] if len(problems) > SCREEN else []
        super().__init__("\n".join([*problems[:SCREEN], *more]))


def shorten(text: str, lines: int = 4, width: int = 300) -> str:
    """The first `lines` lines of `text`, at most `width` characters of each."""
    kept = text.strip().splitlines()
    dots = ["..."] if len(kept) > lines else []
    return "\n".join([line if len(line) <= width else line[:width] + "..." for line in kept[:lines]] + dots)
