"""The rows that the stages of a recipe read."""

from pathlib import Path
from typing import Any

from recipes.schema import Recipe, Stage
from rollout.config import DataConfig
from rollout.data import load_rows


def stage_rows(recipe: Recipe, stage: Stage, sampled: Path | None = None) -> list[dict[str, Any]]:
    """A stage's dataset. Raises ValueError (`load_rows`), also for a row that lacks the columns its stage needs.

    sampled: the folder that the stage wrote whose completions it reads, for one with `from`.
    """
    data = stage.data
    if data.from_ is not None:
        kind = "best" if stage.reward_model is None else "pairs" if stage.reward_model.loss == "pairwise" else "rows"
        data = DataConfig(path=str(sampled / f"{kind}.jsonl"), columns=data.columns, limit=data.limit)
    rows = load_rows(data, recipe.folder, recipe.data_folder)
    for index, row in enumerate(rows):
        if not any(row.keys() >= set(names) for names in stage.columns):
            wanted = ", or ".join(" and ".join(f"`{name}`" for name in names) for names in stage.columns)
            raise ValueError(
                f"{stage.source}, row {index}: needs {wanted}; there are: {', '.join(row)} "
                "(`columns: {prompt: NAME}` renames one)"
            )
    return rows
