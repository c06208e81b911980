"""Reward models (DeepSeek-V2 section 4.2): the same engine and rows, a pair-wise or a point-wise loss on one score, of
preference data and judged completions in TRL's formats, and of transcripts."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from transformers import PreTrainedTokenizerBase

from alignment.config import RewardModelConfig
from alignment.losses import pairwise_loss, pointwise_loss
from alignment.protocols import Engine, Step, TrainRow
from alignment.sft import supervised_step
from rollout.prompts import Stream, encode_strings, encode_text, is_chat, is_held_out
from rollout.types import Handle, Text, Trajectory

BINS = 10
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


def reward_model(
    engine: Engine, rows: Stream[Judged], held_out: Sequence[Judged], config: RewardModelConfig, steps: int, first: int
) -> Iterator[Step]:
    """Run steps first..steps (from 1), one a `next()`; the last one's metrics have those of the held-out rows."""
    binary = {target for row in rows.items for target in row.targets} <= {0.0, 1.0}
    loss = pairwise_loss if config.loss == "pairwise" else partial(pointwise_loss, binary=binary)
    for step in range(first, steps + 1):
        metrics = supervised_step(engine, _train_rows(next(rows)), loss, config, step, steps)
        del metrics["entropy"]
        yield Step(step, metrics | (held_out_metrics(engine, held_out, binary) if step == steps else {}))


def held_out_metrics(engine: Engine, rows: Sequence[Judged], binary: bool = False) -> dict[str, float]:
    """What the model makes of rows that it was not trained on: `held_out/*`.

    `accuracy`: pairs whose chosen side scores higher, or labels on the score's side of 0; `margin`: of a pair's scores,
    mean; `calibration_error`: of the probability that the score gives (expected, over 10 bins); `score`, `score_std`:
    mean and spread; `length_correlation`: rank correlation (Spearman) of score and length, of pairs between their
    differences; `longer_chosen`: share of the pairs of unequal length in which the longer side was chosen."""
    with engine.phase("train") as policy:
        scores = np.asarray(policy.scores(_train_rows(rows)), np.float64)
    lengths = np.array([len(side.token_ids) for row in rows for side in row.trajectories], float)
    targets = np.array([target for row in rows for target in row.targets])
    found = {"score": scores.mean(), "score_std": scores.std()}
    if len(rows[0].trajectories) == 2:
        difference, longer = scores[::2] - scores[1::2], lengths[::2] - lengths[1::2]
        found |= {"accuracy": (difference > 0).mean(), "margin": difference.mean()}
        found["calibration_error"] = calibration_error(np.abs(difference), difference > 0)
        # Both orders of each pair: which side comes first must not matter.
        found["length_correlation"] = _correlation(np.r_[difference, -difference], np.r_[longer, -longer])
        found["longer_chosen"] = (longer[longer != 0] > 0).mean() if longer.any() else 0.5
    else:
        found["length_correlation"] = _correlation(scores, lengths)
        if binary:
            found["accuracy"] = ((scores > 0) == (targets > 0.5)).mean()
            found["calibration_error"] = calibration_error(np.abs(scores), (scores > 0) == (targets > 0.5))
        else:
            found["correlation"] = _correlation(scores, targets)
    return {f"held_out/{name}": float(value) for name, value in found.items()}


def calibration_error(logits: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3) of the confidences sigmoid(`logits`) [n], all at least 1/2:
    mean over bins, by their size, of |share right - mean confidence|."""
    confidence = 1 / (1 + np.exp(-logits))
    bins = np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)
    gaps = np.bincount(bins, right - confidence, minlength=BINS)
    return float(np.abs(gaps).sum() / len(logits))


def length_warning(metrics: dict[str, float]) -> str | None:
    """What to tell a person whose held-out preferences could be explained by length."""
    share, correlation = metrics.get("held_out/longer_chosen", 0.5), metrics["held_out/length_correlation"]
    if abs(share - 0.5) < 0.2 and abs(correlation) < 0.5:
        return None
    return (
        f"length may be what this reward model scores: the longer answer is the chosen one in {share:.0%} of the "
        f"held-out pairs, and score and length have a rank correlation of {correlation:+.2f}"
    )


def _train_rows(batch: Sequence[Judged]) -> list[TrainRow]:
    """Rows whose summed losses are the mean over the batch's pairs or points."""
    sides = [side for row in batch for side in row.trajectories]
    groups = [(i, target) for i, row in enumerate(batch) for target in row.targets]
    return [
        TrainRow(Handle(sides, i), group, len(side.token_ids), target, 1 / len(batch))
        for i, (side, (group, target)) in enumerate(zip(sides, groups, strict=True))
    ]


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of the two does not vary."""
    return float(spearmanr(a, b).statistic) if np.ptp(a) > 0 < np.ptp(b) else 0.0


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
    where nothing is left."""
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
