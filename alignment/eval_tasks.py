"""lm-eval tasks by name or from YAML files with local data, checked and ready to build prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets.config
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from alignment.config import EvalConfig
from alignment.eval_model import generation
from rollout.functions import nearest

if TYPE_CHECKING:
    from lm_eval.api.task import Task

# datasets 5.2 reports every load, of local files too, to a server, and waits 3 s for it where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
KNOWN = ("until", "do_sample", "temperature", "max_gen_toks")
NEUTRAL = {"top_p": (1,), "top_k": (0, -1), "num_beams": (1,), "repetition_penalty": (1,)}
"""Values of further `generation_kwargs` that change nothing; any other value is refused, not ignored."""
_manager = cache(TaskManager)  # made only where a task is asked for by name: it reads all of lm-eval's YAML files


def load_tasks(config: EvalConfig, base_dir: Path, data_dir: Path | None, seed: int) -> dict[str, Task]:
    """The recipe's tasks by name and in order, groups and tags resolved; `seed` draws their few-shot examples.

    Raises `ValueError` for a task that does not exist, cannot be loaded, comes twice, or asks for what the sampler does
    not do.
    """
    tasks: dict[str, Task] = {}
    for group, spec in ((group, spec) for group, specs in config.groups.items() for spec in specs):
        if spec.endswith((".yaml", ".yml")):
            found = _file_tasks(base_dir / spec, data_dir)
        elif spec in _manager().task_index:
            found = _load(_manager(), spec, f"evals.tasks: `{spec}`")
        else:
            raise ValueError(f"evals.tasks: lm-eval has no task `{spec}`{nearest(spec, _manager().all_tasks)}")
        if twice := sorted(tasks.keys() & found.keys()):
            raise ValueError(f"evals.tasks: `{spec}` brings the task `{twice[0]}` a second time; name it once")
        for task in found.values():
            task.config.metadata = {**(task.config.metadata or {}), "group": group}
        tasks |= found
    for name, task in tasks.items():
        _prepare(name, task, config, seed)
    return tasks


def _prepare(name: str, task: Task, config: EvalConfig, seed: int) -> None:
    if task.get_config("unsafe_code"):
        raise ValueError(f"evals.tasks: `{name}` runs code that the model writes, outside any sandbox; leave it out")
    if task.OUTPUT_TYPE == "generate_until":
        if config.max_new_tokens is not None:
            task.set_config("generation_kwargs", {"max_gen_toks": config.max_new_tokens}, update=True)
        kwargs = generation(task.get_config("generation_kwargs"))
        for key, value in kwargs.items():
            cuts_only = key in ("top_p", "top_k") and kwargs["temperature"] == 0
            if key not in KNOWN and not cuts_only and value not in NEUTRAL.get(key, ()):
                raise ValueError(
                    f"evals.tasks: `{name}` asks for {key}={value}, which the sampler does not do; leave it out"
                )
    task.set_fewshot_seed(seed)


def _file_tasks(path: Path, data_dir: Path | None) -> dict[str, Task]:
    """The task of a YAML file; its local `data_files` are found first, so that nothing is asked of the hub."""
    if not path.is_file():
        others = [other.name for other in path.parent.glob("*.y*ml")]
        raise ValueError(f"evals.tasks: no such file: {path}{nearest(path.name, others)}")
    try:
        config = load_yaml(path)
    except Exception as error:
        raise ValueError(f"{path}: cannot be read as an lm-eval task: {type(error).__name__}: {error}") from error
    if not isinstance(config.get("task"), str):
        raise ValueError(f"{path}: needs `task: NAME`; of a group, list the tasks' own YAML files in evals.tasks")
    options = dict(config.get("dataset_kwargs") or {})
    if config.get("dataset_path") in LOCAL_FORMATS:
        if "data_files" not in options:
            raise ValueError(f"{path}: `dataset_path: {config['dataset_path']}` needs dataset_kwargs.data_files")
        options["data_files"] = _resolve(options["data_files"], [data_dir or path.parent, path.parent], path)
    return _load(TaskManager(include_defaults=False), config | {"dataset_kwargs": options}, str(path))


def _resolve(files: Any, folders: Sequence[Path], source: Path) -> Any:
    """`data_files` with every path absolute: a name, a list of names, or either per split."""
    if isinstance(files, Mapping):
        return {split: _resolve(names, folders, source) for split, names in files.items()}
    if isinstance(files, list):
        return [_resolve(name, folders, source) for name in files]
    tried = [(folder / files).resolve() for folder in folders]
    found = [str(path) for path in tried if path.is_file()]
    if not found:
        raise ValueError(f"{source}: no data file {tried[0]}; set the recipe's data_dir, or correct data_files")
    return found[0]


def _load(manager: TaskManager, spec: str | dict[str, Any], source: str) -> dict[str, Task]:
    try:
        return manager.load([spec])["tasks"]
    except Exception as error:
        hint = "; offline, use a task YAML with local data_files" if isinstance(error, OSError) else ""
        raise ValueError(f"{source}: lm-eval cannot load it: {type(error).__name__}: {error}{hint}") from error
