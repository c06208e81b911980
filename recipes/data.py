"""The rows that the stages of a recipe read."""

from __future__ import annotations

from typing import Any

from recipes.schema import Recipe, Stage
from rollout.data import load_rows


def stage_rows(recipe: Recipe, stage: Stage) -> list[dict[str, Any]]:
    """A stage's dataset. Raises ValueError (`load_rows`), also for a row that lacks the columns its stage needs."""
    needed = [("prompt",)] if stage.grpo else [("prompt", "completion"), ("messages",), ("conversations",)]
    rows = load_rows(stage.data, recipe.folder, recipe.data_folder)
    for index, row in enumerate(rows):
        if not any(row.keys() >= set(names) for names in needed):
            wanted = ", or ".join(" and ".join(f"`{name}`" for name in names) for names in needed)
            raise ValueError(
                f"{stage.source}, row {index}: needs {wanted}; there are: {', '.join(row)} "
                "(`columns: {prompt: NAME}` renames one)"
            )
    return rows
