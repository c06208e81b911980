"""SFT rows as trajectories: TRL's formats, tokenised and masked as TRL's SFTTrainer does it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from alignment.config import SFTConfig
from rollout.prompts import check_text, encode_chats, encode_texts
from rollout.types import Text, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Masked = tuple[list[int], np.ndarray]
"""Token ids and the bool mask [T] of those that the loss is on."""


@dataclass(frozen=True, slots=True)
class _Item:
    """A row to tokenise: `prompt` is None in a `messages` row; `template`: what its chat template is given."""

    where: str
    prompt: Text | None
    full: Text
    template: Mapping[str, Any]


def make_sft_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, config: SFTConfig, source: str
) -> tuple[list[Trajectory], dict[str, int]]:
    """Trajectories to train on, in the rows' order, and counts of what happened to the rows.

    Rows have `prompt` and `completion` (both strings, which get the end token, or both chats), or `messages` (also as
    `conversations` with `from`/`value`); `tools` and `chat_template_kwargs` go to the chat template. With
    `completion_only` the loss is on the completion, or on what the template marks as the assistant's; else on every
    token but the first, which nothing predicts.

    Counts: `rows`, `kept`, `cut` (longer than `max_length`), `dropped` (no token with loss left), `merged` (a token
    spans the end of the prompt and counts as completion), `tokens`, `loss_tokens`.
    Raises `ValueError` naming `source` and the row.
    """
    items = [_read(row, f"{source}, row {index}", tokenizer) for index, row in enumerate(rows)]
    encoded: list[Masked | None] = [None] * len(items)
    counts = dict.fromkeys(("rows", "kept", "cut", "dropped", "merged", "tokens", "loss_tokens"), 0)
    for indices in _alike(items):
        batch = [items[index] for index in indices]
        if batch[0].prompt is None:
            masked = _encode_messages(batch, tokenizer, config.completion_only)
        else:
            masked, merged = _encode_completions(batch, tokenizer, config.completion_only)
            counts["merged"] += merged
        for index, entry in zip(indices, masked, strict=True):
            encoded[index] = entry

    trajectories = []
    for entry in encoded:
        assert entry is not None
        counts["cut"] += len(entry[0]) > config.max_length
        token_ids = np.array(entry[0][: config.max_length], np.int32)
        loss_mask = entry[1][: config.max_length]
        loss_mask[:1] = False
        if loss_mask.any():
            counts["tokens"] += len(token_ids)
            counts["loss_tokens"] += int(loss_mask.sum())
            nothing = np.full(len(token_ids), np.nan, np.float32)
            trajectories.append(Trajectory(token_ids, loss_mask, nothing, "stop"))
    counts |= {"rows": len(rows), "kept": len(trajectories), "dropped": len(rows) - len(trajectories)}
    if not trajectories:
        raise ValueError(
            f"{source}: none of its {len(rows)} rows has a token to train on within max_length={config.max_length}"
        )
    return trajectories, counts


def _read(row: Mapping[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> _Item:
    """Sort a row into its format and append the end token where TRL does: to string completions that lack it."""
    from trl.data_utils import is_conversational_from_value, maybe_convert_to_chatml

    if row.get("conversations") and is_conversational_from_value(row):
        row = maybe_convert_to_chatml(copy.deepcopy(dict(row)))  # it changes the row in place
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    template = {"tools": tools, **(row.get("chat_template_kwargs") or {})}
    if "prompt" in row and "completion" in row:
        prompt, completion = row["prompt"], row["completion"]
        kinds = [check_text(row[name], f"{where}, column `{name}`") for name in ("prompt", "completion")]
        if kinds[0] != kinds[1]:
            raise ValueError(f"{where}: `prompt` and `completion` must both be strings or both be chat messages")
        if not kinds[0]:
            end = tokenizer.eos_token
            return _Item(where, prompt, prompt + completion + ("" if completion.endswith(end) else end), {})
        return _Item(where, prompt, prompt + completion, template)
    if "messages" in row:
        if not check_text(row["messages"], f"{where}, column `messages`"):
            raise ValueError(f"{where}: `messages` must be a list of chat messages, got a string")
        return _Item(where, None, row["messages"], template)
    raise ValueError(
        f"{where}: needs `prompt` and `completion`, or `messages`; there are: {', '.join(row)} "
        "(`columns: {prompt: NAME, completion: NAME}` renames them)"
    )


def _alike(items: Sequence[_Item]) -> list[list[int]]:
    """Indices of items that can be tokenised in one call: same format, same arguments of the template."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(f"{item.prompt is None} {item.template}", []).append(index)
    return list(groups.values())


def _encode_completions(
    items: Sequence[_Item], tokenizer: PreTrainedTokenizerBase, completion_only: bool
) -> tuple[list[Masked], int]:
    """Prompt and prompt + completion, tokenised apart: the completion starts where the two diverge (TRL's rule)."""
    from trl.data_utils import common_prefix_length

    where = [item.where for item in items]
    template = items[0].template
    prompts = [item.prompt for item in items if item.prompt is not None]
    prompt_ids = encode_texts(prompts, tokenizer, where, add_generation_prompt=True, **template)
    full_ids = encode_texts([item.full for item in items], tokenizer, where, **template)
    masked, merged = [], 0
    for before, ids in zip(prompt_ids, full_ids, strict=True):
        start = common_prefix_length(before, ids)
        merged += start < len(before)
        masked.append((ids, np.arange(len(ids)) >= (start if completion_only else 0)))
    return masked, merged


def _encode_messages(items: Sequence[_Item], tokenizer: PreTrainedTokenizerBase, completion_only: bool) -> list[Masked]:
    """Whole chats; the template's `{% generation %}` blocks are the assistant's words."""
    where = [item.where for item in items]
    template = dict(items[0].template)
    if completion_only:
        template |= {"return_assistant_tokens_mask": True, "chat_template": _marked_template(tokenizer, where[0])}
    encoded = encode_chats([item.full for item in items], tokenizer, where, **template)
    if completion_only:
        masks = [np.array(mask, bool) for mask in encoded["assistant_masks"]]
    else:
        masks = [np.ones(len(ids), bool) for ids in encoded["input_ids"]]
    return list(zip(encoded["input_ids"], masks, strict=True))


def _marked_template(tokenizer: PreTrainedTokenizerBase, where: str) -> str | None:
    """A chat template with `{% generation %}` markers: None (the tokenizer's own), or TRL's copy of a known one."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if tokenizer.chat_template is None or has_generation_markers(tokenizer.chat_template):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except ValueError as error:
        raise ValueError(
            f"{where}: the chat template does not mark the assistant's words; put them between {{% generation %}} and "
            "{% endgeneration %} in `model.chat_template`, or set `completion_only: false`"
        ) from error
