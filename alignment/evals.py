"""The lm-eval door: a recipe's benchmarks, asked of any `Sampler`."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval.api.task
import numpy as np
from lm_eval.evaluator import evaluate

from alignment.config import EvalConfig
from alignment.eval_model import SamplerLM
from alignment.eval_tasks import load_tasks
from alignment.tax import TaskResult
from rollout.sampler import Sampler

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

PRIMARY = ("exact_match", "acc_norm", "acc", "f1", "rougeL", "bleu", "bits_per_byte")
"""The first of these that a task's items have a number for is its benchmark; else its first metric that is one."""

# lm-eval's and datasets' progress bars and boilerplate would tear the stage's own display; warnings stay, but for the
# one that lm-eval 0.4.13 gives about every `custom_dataset`.
datasets.disable_progress_bars()
lm_eval.api.task.tqdm = partial(lm_eval.api.task.tqdm, disable=True)
logging.getLogger("lm_eval").setLevel(logging.WARNING)
lm_eval.api.task.eval_logger.addFilter(lambda record: "Custom kwargs can be passed" not in record.getMessage())


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What one task will ask. n: items. max_new_tokens: of an item, 0 where only log-likelihoods are asked.

    longest_prompt: tokens of the longest prompt (log-likelihoods: with its continuation). texts: question and reference
    answer of each item, without few-shot examples.
    """

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
    """Load every task and build its prompts, without a model. `run_evals` says where files are looked for.

    Raises `ValueError` for a task that does not exist (with the nearest name), cannot be loaded, asks for what the
    sampler does not do, or needs more context than the `max_length` tokens there are.
    """
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
            longest = max(len(context) + len(rest) for context, rest, _ in asked)
            texts = tuple(_texts(task, doc) for doc in docs.values())
            infos.append(TaskInfo(name, len(docs), max(new for *_, new in asked), longest, texts, group(task)))
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
    Raises `ValueError` as `check_tasks` does, and for a task none of whose metrics is a number per item.
    """
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
    """The tasks by name; within the block the global random states, which tasks may use, follow the seed."""
    if config.chat_template and tokenizer.chat_template is None:
        raise ValueError("evals.chat_template: the tokenizer has no chat template; set model.chat_template")
    states = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield load_tasks(config, base_dir, data_dir, seed)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def group(task: Task) -> str:
    """The recipe's group of a loaded task."""
    return task.config.metadata["group"]


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
        group=group(task),
    )
