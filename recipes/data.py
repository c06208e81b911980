"""The rows that the stages of a recipe read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignment.config import GRPOConfig, SFTConfig
from recipes.schema import Recipe
from recipes.source import Key
from rollout.config import DataConfig
from rollout.data import FILE_SUFFIXES, load_rows


@dataclass(frozen=True, slots=True)
class StageData:
    """One dataset of a recipe: its key there, what the stage does with it (its config), and where the rows lie."""

    key: Key
    stage: SFTConfig | GRPOConfig
    config: DataConfig

    @property
    def source(self) -> str:
        """The dataset's name in messages."""
        return str(self.config.path or self.config.function)

    @property
    def source_key(self) -> Key:
        """The key that names the file or function."""
        return (*self.key, "function" if self.config.path is None else "path")

    def file(self, recipe: Recipe) -> Path | None:
        """The local file that holds the rows, or should; None: a function, or a hub dataset."""
        if self.config.path is None:
            return None
        path = (recipe.data_folder or recipe.folder) / Path(self.config.path).expanduser()
        return path if path.is_file() or path.suffix in FILE_SUFFIXES else None

    def load(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The rows. Raises ValueError (`load_rows`), also for a row that lacks the columns its stage needs."""
        rows = load_rows(self.config, recipe.folder, recipe.data_folder)
        for index, row in enumerate(rows):
            if isinstance(self.stage, GRPOConfig) and "prompt" not in row:
                raise ValueError(_lacking(self.source, index, row, "`prompt`", "{prompt: NAME}"))
            if isinstance(self.stage, SFTConfig) and not (
                {"prompt", "completion"} <= row.keys() or "messages" in row or "conversations" in row
            ):
                needed = "`prompt` and `completion`, or `messages`"
                raise ValueError(_lacking(self.source, index, row, needed, "{prompt: NAME, completion: NAME}"))
        return rows


def stage_data(recipe: Recipe) -> list[StageData]:
    """The dataset of every stage, in the stages' order."""
    found = []
    for index, stage in enumerate(recipe.stages):
        config = stage.config
        name, data = ("prompts", config.prompts) if isinstance(config, GRPOConfig) else ("data", config.data)
        found.append(StageData(("stages", index, stage.kind, name), config, data))
    return found


def _lacking(source: str, index: int, row: Mapping[str, Any], needed: str, renames: str) -> str:
    return f"{source}, row {index}: needs {needed}; there are: {', '.join(row)} (`columns: {renames}` renames them)"
