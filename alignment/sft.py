"""Supervised fine-tuning on the same engine and losses' form as every other objective; its rows in TRL's formats,
tokenised and masked as TRL's SFTTrainer does it."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length, is_conversational_from_value, maybe_convert_to_chatml

from alignment.config import DatasetStageConfig, SFTConfig
from alignment.losses import sft_loss
from alignment.protocols import Engine, Loss, Step, TrainRow
from rollout.prompts import Stream, encode_chat, encode_strings, encode_text, is_chat
from rollout.types import Handle, Text, Trajectory


def sft(engine: Engine, rows: Stream[Trajectory], config: SFTConfig, steps: int, first: int) -> Iterator[Step]:
    """Run steps first..steps (from 1), one a `next()`; a checkpoint between two steps resumes exactly."""
    for step in range(first, steps + 1):
        yield Step(step, sft_step(engine, next(rows), config, step, steps))


def sft_step(engine: Engine, batch: Sequence[Trajectory], config: SFTConfig, step: int, steps: int) -> dict[str, float]:
    """One update on the mean negative log-likelihood over the batch's loss-carrying tokens."""
    total = sum(int(row.loss_mask[1:].sum()) for row in batch)
    rows = [TrainRow(Handle(batch, i), i, len(row.token_ids), 1.0, 1 / max(1, total)) for i, row in enumerate(batch)]
    return supervised_step(engine, rows, sft_loss, config, step, steps)


def supervised_step(
    engine: Engine, rows: Sequence[TrainRow], loss: Loss, config: DatasetStageConfig, step: int, steps: int
) -> dict[str, float]:
    """The update of step `step` (from 1) of a stage on a dataset."""
    rate = config.rate(step - 1, steps)
    with engine.phase("train") as policy:
        metrics = policy.update(rows, loss, learning_rate=rate, temperature=1.0, max_grad_norm=config.max_grad_norm)
    return metrics | {"learning_rate": rate, "tokens/total": float(sum(row.length for row in rows))}


def make_sft_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, config: SFTConfig, source: str
) -> tuple[list[Trajectory], dict[str, int]]:
    """Trajectories to train on, in the rows' order, and counts of what happened to the rows.

    Rows have `prompt` and `completion` (both strings, which get the end token, or both chats), or `messages` (also as
    `conversations` with `from`/`value`); `tools` and `chat_template_kwargs` go to the chat template. With
    `completion_only` the loss is on the completion, or on what the template marks as the assistant's; else on every
    token but the first, which nothing predicts.

    Counts: `rows`, `kept`, `cut` (longer than `max_length`), `dropped` (no token with loss left), `tokens`,
    `loss_tokens`. Raises `ValueError` naming `source` and the row."""
    texts = [_prompt_and_whole(row, f"{source}, row {index}", tokenizer.eos_token) for index, row in enumerate(rows)]
    strings = encode_strings(chain.from_iterable(texts), tokenizer)
    trajectories, cut = [], 0
    for index, (row, (prompt, whole)) in enumerate(zip(rows, texts, strict=True)):
        where = f"{source}, row {index}"
        tools = row.get("tools")
        template = {"tools": json.loads(tools) if isinstance(tools, str) else tools}
        template |= row.get("chat_template_kwargs") or {}
        if config.completion_only and prompt is None:  # a chat whose template marks the assistant's words
            template |= {"return_assistant_tokens_mask": True, "chat_template": _marked_template(tokenizer, where)}
            encoded = encode_chat(whole, tokenizer, where, **template)
            token_ids, loss_mask = encoded["input_ids"], np.array(encoded["assistant_masks"], bool)
        else:  # tokenised apart, prompt and whole: the completion starts where the two diverge (TRL's rule)
            token_ids, before = encode_text(whole, strings, tokenizer, where, **template), []
            if config.completion_only:
                before = encode_text(prompt, strings, tokenizer, where, add_generation_prompt=True, **template)
            loss_mask = np.arange(len(token_ids)) >= common_prefix_length(before, token_ids)
        cut += len(token_ids) > config.max_length
        token_ids, loss_mask = np.array(token_ids[: config.max_length], np.int32), loss_mask[: config.max_length]
        loss_mask[:1] = False
        if loss_mask.any():
            trajectories.append(Trajectory(token_ids, loss_mask, np.full(len(token_ids), np.nan, np.float32), "stop"))
    if not trajectories:
        raise ValueError(
            f"{source}: none of its {len(rows)} rows has a token to train on within max_length={config.max_length}"
        )
    kept = len(trajectories)
    counts = {"rows": len(rows), "kept": kept, "cut": cut, "dropped": len(rows) - kept}
    counts["tokens"] = sum(len(row.token_ids) for row in trajectories)
    counts["loss_tokens"] = sum(int(row.loss_mask.sum()) for row in trajectories)
    return trajectories, counts


def _prompt_and_whole(row: Mapping[str, Any], where: str, eos_token: str) -> tuple[Text | None, Text]:
    """Prompt and prompt + completion (a string gets the end token), or None and the messages of a whole chat."""
    if {"prompt", "completion"} <= row.keys():
        prompt, completion = row["prompt"], row["completion"]
        if is_chat(prompt, f"{where}, column `prompt`") != is_chat(completion, f"{where}, column `completion`"):
            raise ValueError(f"{where}: `prompt` and `completion` must both be strings or both be chat messages")
        ends = not isinstance(completion, str) or completion.endswith(eos_token)
        return prompt, prompt + (completion if ends else completion + eos_token)
    if row.get("conversations") and is_conversational_from_value(row):
        row = maybe_convert_to_chatml(copy.deepcopy(dict(row)))  # it changes the row in place
    if not is_chat(row.get("messages"), f"{where}, column `messages`"):
        raise ValueError(f"{where}: `messages` must be a list of chat messages, got a string")
    return None, row["messages"]


def _marked_template(tokenizer: PreTrainedTokenizerBase, where: str) -> str | None:
    """A chat template with `{% generation %}` markers: None (the tokenizer's own), or TRL's copy of a known one."""
    if tokenizer.chat_template is None or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{where}: the chat template does not mark the assistant's words; put them between {{% generation %}} and "
            "{% endgeneration %} in `model.chat_template`, or set `completion_only: false`"
        ) from error
