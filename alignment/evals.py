"""The lm-eval door: a recipe's benchmarks, by name or from YAML files with local data, asked of any `Sampler`."""

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import datasets
import lm_eval.api.task
import numpy as np
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import PreTrainedTokenizerBase

from alignment.config import EvalConfig
from alignment.eval_model import SamplerLM, generation
from alignment.tax import TaskResult
from rollout.functions import nearest
from rollout.sampler import Sampler

PRIMARY = ("exact_match", "acc_norm", "acc", "f1", "rougeL", "bleu", "bits_per_byte")
"""The first of these that a task's items have a number for is its benchmark; else its first metric that is one."""
LOCAL_FORMATS = ("json", "csv", "parquet", "text", "arrow")
KNOWN = ("until", "do_sample", "temperature", "max_gen_toks")
NEUTRAL = {"top_p": (1,), "top_k": (0, -1), "num_beams": (1,), "repetition_penalty": (1,)}
"""Values of further `generation_kwargs` that change nothing; any other value is refused, not ignored."""
_manager = cache(TaskManager)  # made only where a task is asked for by name: it reads all of lm-eval's YAML files

# lm-eval's and datasets' progress bars and boilerplate would tear the stage's own display; warnings stay, but for the
# one that lm-eval 0.4.13 gives about every `custom_dataset`.
datasets.disable_progress_bars()
lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)
logging.getLogger("lm_eval").setLevel(logging.WARNING)
lm_eval.api.task.eval_logger.addFilter(lambda record: "Custom kwargs can be passed" not in record.getMessage())
# datasets 5.2 reports every load, of local files too, to a server, and waits 3 s for it where there is no network.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What one task will ask. n: items. max_new_tokens: of an item, 0 where only log-likelihoods are asked.

    longest_prompt: tokens of the longest prompt (log-likelihoods: with its continuation). texts: question and reference
    answer of each item, without few-shot examples."""

    name: str
    n: int
    max_new_tokens: int
    longest_prompt: int
    texts: tuple[tuple[str, str], ...]
    group: str = ""


def check_tasks(
    config: EvalConfig,
    base_dir: Path,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int = 0,
    data_dir: Path | None = None,
) -> list[TaskInfo]:
    """Load every task and build its prompts, without a model. `run_evals` says where files are looked for. Raises
    `ValueError` for a task that does not exist (with the nearest name), cannot be loaded, asks for what the sampler
    does not do, or needs more context than the `max_length` tokens there are."""
    infos, model = [], SamplerLM(None, tokenizer, seed)
    with _tasks(config, tokenizer, base_dir, data_dir, seed) as tasks:
        for name, task in tasks.items():
            task.build_all_requests(
                limit=config.limit,
                apply_chat_template=config.chat_template,
                fewshot_as_multiturn=config.chat_template,
                chat_template=model.apply_chat_template if config.chat_template else None,
            )
            asked = model.tokens(task.instances, max_length)
            docs = {instance.doc_id: instance.doc for instance in task.instances}
            new, longest = max(new for *_, new in asked), max(len(context) + len(rest) for context, rest, _ in asked)
            texts = tuple(_texts(task, doc) for doc in docs.values())
            infos.append(TaskInfo(name, len(docs), new, longest, texts, task.config.metadata["group"]))
    return infos


def _texts(task: Task, doc: dict[str, Any]) -> tuple[str, str]:
    """Question and reference answer of an item. Where one is a number, it counts the choices, which are texts."""
    question, answer = task.doc_to_text(doc), task.doc_to_target(doc)
    if isinstance(answer, int) and task.OUTPUT_TYPE == "multiple_choice":
        answer = task.doc_to_choice(doc)[answer]
    if isinstance(question, int):
        question = " ".join(task.doc_to_choice(doc))
    return str(question), " ".join(map(str, answer)) if isinstance(answer, list) else str(answer)


def run_evals(
    config: EvalConfig,
    sampler: Sampler,
    tokenizer: PreTrainedTokenizerBase,
    base_dir: Path,
    seed: int,
    data_dir: Path | None = None,
) -> tuple[list[TaskResult], list[dict[str, Any]]]:
    """Ask every task of the sampler: one result per task (a group or tag counts as its tasks), and every sample.

    Task YAMLs are read from `base_dir`; the local `data_files` that they name from `data_dir`, else from the YAML's
    folder. Items, prompts, few-shot examples and seeds are the same each time; the global random states stay as they
    were. A result holds the task's primary metric (`PRIMARY`), after the task's first filter. A sample is lm-eval's own
    (as `lm_eval --log_samples` writes it, one per item and filter), and the name of its `task`.
    Raises `ValueError` as `check_tasks` does, and for a task none of whose metrics is a number per item."""
    with _tasks(config, tokenizer, base_dir, data_dir, seed) as tasks:
        samples = evaluate(
            SamplerLM(sampler, tokenizer, seed),
            {"tasks": tasks, "groups": {}},
            limit=config.limit,
            bootstrap_iters=0,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.chat_template,
        )["samples"]
        results = [_result(name, task, samples[name]) for name, task in tasks.items()]
    return results, [{"task": name, **sample} for name in tasks for sample in samples[name]]


@contextmanager
def _tasks(
    config: EvalConfig, tokenizer: PreTrainedTokenizerBase, base_dir: Path, data_dir: Path | None, seed: int
) -> Iterator[dict[str, Task]]:
    """The recipe's tasks by name and in order, groups and tags resolved; `seed` draws their few-shot examples. Within
    the block the global random states, which tasks may use, follow it too."""
    if config.chat_template and tokenizer.chat_template is None:
        raise ValueError("evals.chat_template: the tokenizer has no chat template; set model.chat_template")
    states, tasks = (random.getstate(), np.random.get_state()), dict[str, Task]()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        for group, spec in ((group, spec) for group, specs in config.groups.items() for spec in specs):
            if spec.endswith((".yaml", ".yml")):
                found = _file_tasks(base_dir / spec, data_dir)
            elif spec in _manager().task_index:
                found = _load(_manager(), spec, f"evals.tasks: `{spec}`")
            else:
                raise ValueError(f"evals.tasks: lm-eval has no task `{spec}`{nearest(spec, _manager().all_tasks)}")
            if twice := sorted(tasks.keys() & found.keys()):
                raise ValueError(f"evals.tasks: `{spec}` brings the task `{twice[0]}` a second time; name it once")
            for name, task in found.items():
                task.config.metadata = {**(task.config.metadata or {}), "group": group}
                task.set_fewshot_seed(seed)
                _check_request(name, task, config)
            tasks |= found
        yield tasks
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _check_request(name: str, task: Task, config: EvalConfig) -> None:
    """Give the task the recipe's `max_new_tokens`; refuse what the sampler does not do."""
    if task.get_config("unsafe_code"):
        raise ValueError(f"evals.tasks: `{name}` runs code that the model writes, outside any sandbox; leave it out")
    if task.OUTPUT_TYPE != "generate_until":
        return
    if config.max_new_tokens is not None:
        task.set_config("generation_kwargs", {"max_gen_toks": config.max_new_tokens}, update=True)
    kwargs = generation(task.get_config("generation_kwargs"))
    for key, value in kwargs.items():
        cuts_only = key in ("top_p", "top_k") and kwargs["temperature"] == 0
        if key not in KNOWN and not cuts_only and value not in NEUTRAL.get(key, ()):
            raise ValueError(
                f"evals.tasks: `{name}` asks for {key}={value}, which the sampler does not do; leave it out"
            )


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


def _number(metric: str, value: Any) -> float | None:
    """The value that one item has by itself; None where only a whole task has one (a corpus's F1 or perplexity)."""
    if metric == "bits_per_byte":
        logprob, num_bytes = value
        return -logprob / (num_bytes * math.log(2))
    if metric == "perplexity":  # lm-eval's item value is a log-likelihood, which runs the other way
        return None
    return float(value) if isinstance(value, int | float | np.number | np.bool_) else None


def _result(name: str, task: Task, samples: Sequence[Mapping[str, Any]]) -> TaskResult:
    chosen = samples[0]["filter"]
    rows = [sample for sample in samples if sample["filter"] == chosen]
    numbers = [metric for metric in rows[0]["metrics"] if _number(metric, rows[0][metric]) is not None]
    if not numbers:
        raise ValueError(f"evals.tasks: `{name}` has no metric that is a number per item; leave it out")
    metric = min(numbers, key=lambda metric: PRIMARY.index(metric) if metric in PRIMARY else len(PRIMARY))
    return TaskResult(
        task=name,
        metric=metric if chosen == "none" else f"{metric},{chosen}",
        higher_is_better=task.higher_is_better().get(metric, True),
        items=tuple(f"{name}:{row['doc_id']}:{row['doc_hash'][:12]}" for row in rows),
        values=np.array([_number(metric, row[metric]) for row in rows], np.float64),
        group=task.config.metadata["group"],
    )
