"""Reward models (DeepSeek-V2 section 4.2): the same engine and rows, a pair-wise or a point-wise loss on one score."""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from scipy.stats import spearmanr

from alignment.config import RewardModelConfig
from alignment.losses import pairwise_loss, pointwise_loss
from alignment.protocols import Engine, Step, TrainRow
from alignment.reward_data import Judged
from alignment.sft import supervised_step
from rollout.prompts import Stream
from rollout.types import Handle

BINS = 10


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
    differences; `longer_chosen`: share of the pairs of unequal length in which the longer side was chosen.
    """
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
