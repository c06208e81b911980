"""SFT rows as trajectories: TRL's formats, tokenised and masked as TRL's SFTTrainer does it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from trl.chat_template_utils import get_training_chat_template, has_generation_markers
from trl.data_utils import common_prefix_length, is_conversational_from_value, maybe_convert_to_chatml

from alignment.config import SFTConfig
from rollout.prompts import encode_chat, encode_strings, encode_text, is_chat
from rollout.types import Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def make_sft_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, config: SFTConfig, source: str
) -> tuple[list[Trajectory], dict[str, int]]:
    """Trajectories to train on, in the rows' order, and counts of what happened to the rows.

    Rows have `prompt` and `completion` (both strings, which get the end token, or both chats), or `messages` (also as
    `conversations` with `from`/`value`); `tools` and `chat_template_kwargs` go to the chat template. With
    `completion_only` the loss is on the completion, or on what the template marks as the assistant's; else on every
    token but the first, which nothing predicts.

    Counts: `rows`, `kept`, `cut` (longer than `max_length`), `dropped` (no token with loss left), `tokens`,
    `loss_tokens`. Raises `ValueError` naming `source` and the row.
    """
    trajectories, cut = [], 0
    strings = encode_strings((text for row in rows for text in _prompt_and_whole(row, tokenizer.eos_token)), tokenizer)
    for index, row in enumerate(rows):
        where = f"{source}, row {index}"
        if _is_pair(row):
            token_ids, loss_mask = _encode_pair(row, strings, where, tokenizer, config.completion_only)
        else:
            token_ids, loss_mask = _encode_messages(row, where, tokenizer, config.completion_only)
        cut += len(token_ids) > config.max_length
        token_ids, loss_mask = np.array(token_ids[: config.max_length], np.int32), loss_mask[: config.max_length]
        loss_mask[:1] = False
        if loss_mask.any():
            trajectories.append(Trajectory(token_ids, loss_mask, np.full(len(token_ids), np.nan, np.float32), "stop"))
    if not trajectories:
        raise ValueError(
            f"{source}: none of its {len(rows)} rows has a token to train on within max_length={config.max_length}"
        )
    return trajectories, {
        "rows": len(rows),
        "kept": len(trajectories),
        "cut": cut,
        "dropped": len(rows) - len(trajectories),
        "tokens": sum(len(row.token_ids) for row in trajectories),
        "loss_tokens": sum(int(row.loss_mask.sum()) for row in trajectories),
    }


def _is_pair(row: Mapping[str, Any]) -> bool:
    return {"prompt", "completion"} <= row.keys()


def _prompt_and_whole(row: Mapping[str, Any], eos_token: str) -> tuple[Any, ...]:
    """Prompt and prompt + completion (a string gets the end token) if both are strings, or both are lists."""
    if not _is_pair(row) or {type(row["prompt"]), type(row["completion"])} not in ({str}, {list}):
        return ()
    prompt, completion = row["prompt"], row["completion"]
    ends = not isinstance(completion, str) or completion.endswith(eos_token)
    return prompt, prompt + (completion if ends else completion + eos_token)


def _encode_pair(
    row: Mapping[str, Any],
    strings: Mapping[str, list[int]],
    where: str,
    tokenizer: PreTrainedTokenizerBase,
    completion_only: bool,
) -> tuple[list[int], np.ndarray]:
    """Prompt and prompt + completion, tokenised apart: the completion starts where the two diverge (TRL's rule)."""
    chats = {is_chat(row[name], f"{where}, column `{name}`") for name in ("prompt", "completion")}
    if len(chats) > 1:
        raise ValueError(f"{where}: `prompt` and `completion` must both be strings or both be chat messages")
    prompt, whole = _prompt_and_whole(row, tokenizer.eos_token)
    template = _template(row)
    before = encode_text(prompt, strings, tokenizer, where, add_generation_prompt=True, **template)
    token_ids = encode_text(whole, strings, tokenizer, where, **template)
    start = common_prefix_length(before, token_ids) if completion_only else 0
    return token_ids, np.arange(len(token_ids)) >= start


def _encode_messages(
    row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, completion_only: bool
) -> tuple[list[int], np.ndarray]:
    """A whole chat; the template's `{% generation %}` blocks are the assistant's words."""
    if row.get("conversations") and is_conversational_from_value(row):
        row = maybe_convert_to_chatml(copy.deepcopy(dict(row)))  # it changes the row in place
    if not is_chat(row.get("messages"), f"{where}, column `messages`"):
        raise ValueError(f"{where}: `messages` must be a list of chat messages, got a string")
    template = _template(row)
    if completion_only:
        template |= {"return_assistant_tokens_mask": True, "chat_template": _marked_template(tokenizer, where)}
    encoded = encode_chat(row["messages"], tokenizer, where, **template)
    token_ids = encoded["input_ids"]
    return token_ids, np.array(encoded["assistant_masks"] if completion_only else [1] * len(token_ids), bool)


def _template(row: Mapping[str, Any]) -> dict[str, Any]:
    tools = row.get("tools")
    return {"tools": json.loads(tools) if isinstance(tools, str) else tools, **(row.get("chat_template_kwargs") or {})}


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
