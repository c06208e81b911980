"""The rows that the stages of a recipe read."""

from __future__ import annotations

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
    """One dataset of a recipe: the key of its stage, the stage's config, and where the rows lie."""

    stage_key: Key
    stage: SFTConfig | GRPOConfig
    config: DataConfig

    @property
    def key(self) -> Key:
        """The key that names the file or function."""
        section = "prompts" if isinstance(self.stage, GRPOConfig) else "data"
        return (*self.stage_key, section, "function" if self.config.path is None else "path")

    @property
    def source(self) -> str:
        """The dataset's name in messages."""
        return str(self.config.path or self.config.function)

    @property
    def is_file(self) -> bool:
        """Whether the rows lie in a local file: not a function's, not on the hub."""
        return self.config.path is not None and Path(self.config.path).suffix in FILE_SUFFIXES

    def load(self, recipe: Recipe) -> list[dict[str, Any]]:
        """The rows. Raises ValueError (`load_rows`), also for a row that lacks the columns its stage needs."""
        prompts = [{"prompt"}]
        pairs_or_chats = [{"prompt", "completion"}, {"messages"}, {"conversations"}]
        needed = prompts if isinstance(self.stage, GRPOConfig) else pairs_or_chats
        rows = load_rows(self.config, recipe.folder, recipe.data_folder)
        for index, row in enumerate(rows):
            if not any(names <= row.keys() for names in needed):
                wanted = ", or ".join(" and ".join(f"`{name}`" for name in sorted(names)[::-1]) for names in needed)
                raise ValueError(
                    f"{self.source}, row {index}: needs {wanted}; there are: {', '.join(row)} "
                    "(`columns: {prompt: NAME}` renames one)"
                )
        return rows


def stage_data(recipe: Recipe) -> list[StageData]:
    """The dataset of every stage, in the stages' order."""
    configs = [stage.config for stage in recipe.stages]
    return [
        StageData(
            ("stages", index, stage.kind), config, config.prompts if isinstance(config, GRPOConfig) else config.data
        )
        for index, (stage, config) in enumerate(zip(recipe.stages, configs, strict=True))
    ]
