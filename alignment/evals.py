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
from alignment.eval_model import SamplerLM, chat_prompt, check_fits, request_lengths
from alignment.eval_tasks import load_tasks
from alignment.tax import TaskResult
from rollout.sampler import Sampler

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from transformers import PreTrainedTokenizerBase

PRIMARY = ("exact_match", "acc_norm", "acc", "f1", "rougeL", "bleu", "bits_per_byte")
"""The first of these that a task's items have a number for is its benchmark; else its first metric that is one."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What one task will ask. n: items. max_new_tokens: of an item, 0 where only log-likelihoods are asked.

    longest_prompt: tokens of the longest prompt (log-likelihoods: with its continuation); None without a tokenizer.
    """

    name: str
    n: int
    max_new_tokens: int
    longest_prompt: int | None


def check_tasks(
    config: EvalConfig,
    base_dir: Path,
    max_length: int,
    tokenizer: PreTrainedTokenizerBase | None = None,
    data_dir: Path | None = None,
) -> list[TaskInfo]:
    """Load every task and build its prompts, without a model. `run_evals` says where files are looked for.

    Without a tokenizer only the new tokens are held against the context of `max_length` tokens.
    Raises `ValueError` for a task that does not exist (with the nearest name), cannot be loaded, asks for what the
    sampler does not do, or needs more context than there is.
    """
    _check_template(config, tokenizer)
    with _contained(seed=0):
        tasks = load_tasks(config, base_dir, data_dir, seed=0)
        return [_check_task(name, task, config, max_length, tokenizer) for name, task in tasks.items()]


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
    were. A result holds the task's primary metric (`PRIMARY`), after the task's first filter.
    A sample: `task`, `item`, `prompt`, `target`, `completion` (of log-likelihoods a list of `continuation`, `logprob`,
    `greedy`), `extracted` (per filter), `metrics` (by `name` or `name,filter`).
    Raises `ValueError` as `check_tasks` does, and for a task none of whose metrics is a number per item.
    """
    _check_template(config, tokenizer)
    with _contained(seed):
        tasks = load_tasks(config, base_dir, data_dir, seed)
        output = evaluate(
            SamplerLM(sampler, tokenizer, seed),
            {"tasks": tasks, "groups": {}},
            limit=config.limit,
            bootstrap_iters=0,
            apply_chat_template=config.chat_template,
            fewshot_as_multiturn=config.chat_template,
        )
        samples = {name: _samples(name, task, output["samples"][name]) for name, task in tasks.items()}
        results = [_result(name, task, samples[name]) for name, task in tasks.items()]
    return results, [sample for rows in samples.values() for sample in rows]


@contextmanager
def _contained(seed: int) -> Iterator[None]:
    """lm-eval's progress bars and boilerplate off (warnings stay); the global random states seeded, then put back."""
    logger, bars, bars_off = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm, datasets.are_progress_bars_disabled()
    level, states = logger.level, (random.getstate(), np.random.get_state())
    logger.setLevel(logging.WARNING)
    lm_eval.api.task.eval_logger.addFilter(_is_news)
    lm_eval.api.task.tqdm = lambda items, **_: items
    datasets.disable_progress_bars()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        lm_eval.api.task.tqdm = bars
        lm_eval.api.task.eval_logger.removeFilter(_is_news)
        logger.setLevel(level)
        if not bars_off:
            datasets.enable_progress_bars()


def _is_news(record: logging.LogRecord) -> bool:
    """False for the warning that lm-eval 0.4.13 gives about every `custom_dataset`."""
    return "Custom kwargs can be passed" not in record.getMessage()


def _check_template(config: EvalConfig, tokenizer: PreTrainedTokenizerBase | None) -> None:
    if config.chat_template and tokenizer is not None and tokenizer.chat_template is None:
        raise ValueError("evals.chat_template: the tokenizer has no chat template; set model.chat_template")


def _check_task(
    name: str, task: Task, config: EvalConfig, max_length: int, tokenizer: PreTrainedTokenizerBase | None
) -> TaskInfo:
    chat = config.chat_template and tokenizer is not None
    task.build_all_requests(
        limit=config.limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        chat_template=partial(chat_prompt, tokenizer) if chat else None,
    )
    lengths = [request_lengths(instance, tokenizer) for instance in task.instances]
    check_fits(task.instances, lengths, max_length)
    longest = None if tokenizer is None else max(prompt for prompt, _ in lengths)
    return TaskInfo(
        name, len({instance.doc_id for instance in task.instances}), max(new for _, new in lengths), longest
    )


def _samples(name: str, task: Task, logged: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per item from lm-eval's log, which has one per item and filter."""
    rows: dict[int, dict[str, Any]] = {}
    for entry in logged:
        target, chosen = entry["target"], entry["filter"]
        row = rows.setdefault(
            entry["doc_id"],
            {
                "task": name,
                "item": f"{name}:{entry['doc_id']}:{entry['doc_hash'][:12]}",
                "prompt": entry["arguments"][0][0],
                "target": target if isinstance(target, str | int | list) else str(target),
                "completion": _completion(task, entry),
                "extracted": {},
                "metrics": {},
            },
        )
        if task.OUTPUT_TYPE == "generate_until":
            row["extracted"][chosen] = entry["filtered_resps"][0]
        for metric in entry["metrics"]:
            if (value := _number(metric, entry[metric])) is not None:
                row["metrics"][metric if chosen == "none" else f"{metric},{chosen}"] = value
    return list(rows.values())


def _completion(task: Task, entry: Mapping[str, Any]) -> Any:
    first = [responses[0] for responses in entry["resps"]]
    if task.OUTPUT_TYPE == "generate_until":
        return first[0] if len(entry["resps"][0]) == 1 else entry["resps"][0]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return [{"continuation": entry["arguments"][0][0], "logprob": first[0]}]
    return [
        {"continuation": arguments[1], "logprob": logprob, "greedy": greedy}
        for arguments, (logprob, greedy) in zip(entry["arguments"], first, strict=True)
    ]


def _number(metric: str, value: Any) -> float | None:
    """The value that one item has by itself; None where only a whole task has one (a corpus's F1 or perplexity)."""
    if metric == "bits_per_byte":
        logprob, num_bytes = value
        return -logprob / (num_bytes * math.log(2))
    if metric == "perplexity":  # lm-eval's item value is a log-likelihood, which runs the other way
        return None
    return float(value) if isinstance(value, int | float | np.number | np.bool_) else None


def _result(name: str, task: Task, rows: Sequence[Mapping[str, Any]]) -> TaskResult:
    keys = list(rows[0]["metrics"])
    ranked = [key for name in PRIMARY for key in keys if key.split(",")[0] == name] + keys
    if not ranked:
        raise ValueError(f"evals.tasks: `{name}` has no metric that is a number per item; leave it out")
    return TaskResult(
        task=name,
        metric=ranked[0],
        higher_is_better=task.higher_is_better().get(ranked[0].split(",")[0], True),
        items=tuple(row["item"] for row in rows),
        values=np.array([row["metrics"][ranked[0]] for row in rows], np.float64),
    )
