"""Preference data and judged completions as what a reward model scores: TRL's formats, and transcripts."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from alignment.config import RewardModelConfig
from rollout.prompts import encode_strings, encode_text, fingerprint, is_chat, is_held_out
from rollout.types import Text, Trajectory

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
Read = tuple[Any, tuple[Text, ...], tuple[float, ...]]
"""Of a row: what is shared by all rows of its prompt, the texts to score, their targets."""

ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Judged:
    """One row. trajectories: of the chosen and of the rejected side, or of the only one; each ends one token after the
    one whose score counts, which alone has loss. targets: of each; (margin, 0) of a pair, else the label or score."""

    trajectories: tuple[Trajectory, ...]
    targets: tuple[float, ...]

    @property
    def token_ids(self) -> np.ndarray:
        """All that is read, one side after the other."""
        return np.concatenate([one.token_ids for one in self.trajectories])


def make_judged_rows(
    rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, config: RewardModelConfig, source: str
) -> tuple[list[Judged], list[Judged], dict[str, int]]:
    """Rows to train on, held-out rows, and counts of what happened to them.

    Pairwise: `chosen` and `rejected`, with a `prompt` or with it inside both, optionally a `margin`. Pointwise:
    `prompt`, `completion` and `label` (0 or 1) or `score`. Texts are strings (which get the end token) or chats; where
    the tokenizer has a chat template, transcripts of `Human:` and `Assistant:` turns, each after an empty line, are
    read as chats. Rows of one prompt are held out together.

    Counts: `rows`, `kept`, `held out`, `too long` (for `max_length`), `unfit`. Raises ValueError naming `source` and
    the row: for an unfit row (an empty answer, two equal sides, a label out of its range) unless `on_error: drop`, and
    where nothing is left.
    """
    judge = _pair if config.loss == "pairwise" else _point
    kept, held, counts = [], [], {"rows": len(rows), "kept": 0, "held out": 0, "too long": 0, "unfit": 0}
    for index, row in enumerate(rows):
        try:
            prompt, texts, targets = judge(row, tokenizer)
            strings = encode_strings(texts, tokenizer)
            ids = [encode_text(text, strings, tokenizer, "the text") for text in texts]
            if len(ids) == 2 and ids[0] == ids[1]:
                raise ValueError("`chosen` and `rejected` are equal")
        except ValueError as error:
            counts["unfit"] += 1
            if config.on_error == "stop":
                hint = "mend the row, or set `on_error: drop` to leave such rows out"
                raise ValueError(f"{source}, row {index}: {error}; {hint}") from error
            continue
        if max(map(len, ids)) > config.max_length:
            counts["too long"] += 1
            continue
        judged = Judged(tuple(_scored(one, tokenizer) for one in ids), targets)
        (held if is_held_out(prompt, config.held_out) else kept).append(judged)
    counts |= {"kept": len(kept), "held out": len(held)}
    if not kept or not held:
        raise ValueError(f"{source}: needs rows to train on and held-out rows (`held_out`), found {counts}")
    return kept, held, counts


def judged_fingerprint(rows: Sequence[Judged], seed: int) -> str:
    """As `fingerprint`, of all sides and targets."""
    targets = xxhash.xxh3_64_intdigest(repr([row.targets for row in rows]).encode())
    return fingerprint([side for row in rows for side in row.trajectories], seed ^ targets)


def _scored(token_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Trajectory:
    """The score is that of the last token that is no padding, as Transformers' classifiers have it."""
    ids = np.array([*token_ids, tokenizer.pad_token_id], np.int32)
    ids = ids[: np.flatnonzero(ids != tokenizer.pad_token_id)[-1] + 2]
    return Trajectory(ids, np.arange(len(ids)) == len(ids) - 1, np.full(len(ids), np.nan, np.float32), "stop")


def judged_text(prompt: Text, completion: Text, tokenizer: PreTrainedTokenizerBase) -> Text:
    """What is scored of a prompt and its completion: a chat, or a string with the end token, where there is one. A
    transcript is a chat where the tokenizer has a template for it."""
    if not isinstance(prompt, str) or not isinstance(completion, str):
        return [*prompt, *completion]
    text, end = prompt + completion, tokenizer.eos_token or ""
    if tokenizer.chat_template is not None and TURN.match(text):
        _, *turns = TURN.split(text.removesuffix(end))
        pairs = zip(turns[::2], turns[1::2], strict=True)
        return [{"role": ROLES[who], "content": said.strip()} for who, said in pairs]
    return text if text.endswith(end) else text + end


def _pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Read:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    prompt = _text(row, "prompt") if row.get("prompt") is not None else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("`chosen` and `rejected` must both be strings or both be chats")
    if isinstance(chosen, str) and isinstance(prompt, list):
        raise ValueError("`prompt` is a chat, and `chosen` and `rejected` are strings")
    shared = prompt
    if prompt is None or isinstance(prompt, str) != isinstance(chosen, str):  # the prompt is inside both sides
        same = [left == right for left, right in zip(chosen, rejected, strict=False)]
        shared, prompt = chosen[: [*same, False].index(False)], chosen[:0]
        if isinstance(shared, str):  # without words of the answers that happen to be the same
            turn = shared.rfind("Assistant:")
            shared = shared[: turn if turn >= 0 else shared.rfind(" ") + 1]
        elif not shared:
            raise ValueError("`chosen` and `rejected` share no message: give the `prompt` as a chat")
    texts = tuple(judged_text(prompt, side, tokenizer) for side in (chosen, rejected))
    return shared, texts, (_number(row, "margin") if row.get("margin") is not None else 0.0, 0.0)


def _point(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> Read:
    prompt, completion = _text(row, "prompt"), _text(row, "completion")
    if isinstance(prompt, str) != isinstance(completion, str):
        raise ValueError("`prompt` and `completion` must both be strings or both be chats")
    if "label" in row and row["label"] not in (0, 1):
        raise ValueError(f"`label` must be 0 or 1, got {row['label']!r}")
    target = _number(row, "label" if "label" in row else "score")
    return prompt, (judged_text(prompt, completion, tokenizer),), (target,)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row[name]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"`{name}` must be a finite number, got {value!r}")
    return float(value)


def _text(row: Mapping[str, Any], name: str) -> Text:
    """A column: a string or a chat. Raises ValueError where it is neither, or its last turn is empty."""
    text = row[name]
    said = text[-1].get("content") if text and is_chat(text, f"`{name}`") else text
    if name != "prompt" and isinstance(said, str) and TURN.match(said):
        said = TURN.split(said)[-1]
    if name != "prompt" and not (said.strip() if isinstance(said, str) else said):
        raise ValueError(f"`{name}` is empty")
    return text
