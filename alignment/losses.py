"""Objectives as pure functions of flat tensors [C] (C loss-carrying tokens). Each is a plain weighted sum:
all normalisation is in `LossInputs.weights`, so sums over micro-batches and ranks add up to the batch's loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from alignment.protocols import LossInputs, LossOutputs

Correct = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sft_loss(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood: -sum_c w_c log p_c."""
    return LossOutputs(loss=-(inputs.weights * inputs.logprobs).sum(), sums={})


CENTERING = 0.01
"""Coefficient of a pair's squared sum of scores, TRL's recommendation; it keeps their mean at 0."""


def pairwise_loss(inputs: LossInputs, centering: float = CENTERING) -> LossOutputs:
    """Bradley-Terry: -log sigmoid(s_chosen - s_rejected - margin), and `centering` times (s_chosen + s_rejected)^2
    (Eisenstein et al. 2023). The rows come in pairs, the chosen one first; its advantage is the margin."""
    order = inputs.rows.argsort()
    scores_P2, margins_P = inputs.logprobs[order].view(-1, 2), inputs.advantages[order].view(-1, 2)[:, 0]
    weights_P, difference_P = inputs.weights[order].view(-1, 2)[:, 0], scores_P2[:, 0] - scores_P2[:, 1]
    losses_P = centering * scores_P2.sum(1).square() - F.logsigmoid(difference_P - margins_P)
    found = {"accuracy": difference_P > 0, "margin": difference_P, "score": scores_P2.mean(1)}
    return LossOutputs((weights_P * losses_P).sum(), {k: (weights_P * v).sum().detach() for k, v in found.items()})


def pointwise_loss(inputs: LossInputs, binary: bool) -> LossOutputs:
    """Binary cross-entropy of the score as a logit, or its squared error; the advantage is the label or the target."""
    loss = F.binary_cross_entropy_with_logits if binary else F.mse_loss
    losses_C = loss(inputs.logprobs, inputs.advantages, reduction="none")
    score = (inputs.weights * inputs.logprobs).sum().detach()
    return LossOutputs((inputs.weights * losses_C).sum(), {"score": score})


def correction(
    log_ratio: Tensor, rows: Tensor, *, low: float, high: float, sequence: bool, mask: bool
) -> tuple[Tensor, Tensor]:
    """Importance correction for what sampler and trainer differ by: a factor p_trainer / p_sampler of each token (of a
    completion's tokens together with `sequence`), constant for the gradient: [C], from its logarithm [C]; and whether
    it lay outside [low, high], where it is clamped (TIS; Yao et al. 2025), or 0 with `mask` (MIS; low > 0: IcePop)."""
    if sequence:
        sums = log_ratio.new_zeros(int(rows.max()) + 1 if len(rows) else 0).index_add(0, rows, log_ratio)
        log_ratio = sums[rows]
    ratio = log_ratio.exp()
    outside = (ratio < low) | (ratio > high)
    return ratio.masked_fill(outside, 0.0) if mask else ratio.clamp(low, high), outside


def grpo_loss(
    inputs: LossInputs, *, clip: tuple[float, float], kl: float, correct: Correct | None = None
) -> LossOutputs:
    """GRPO's clipped objective, negated (DeepSeek-V2 eq. 32, per token as in DeepSeekMath eq. 3).

    -sum_c w_c [ f_c min(r_c A_c, clip(r_c, 1 - clip[0], 1 + clip[1]) A_c) - kl * KL_c ], with r = p / p_old and
    KL the k3 estimator of eq. 33: p_ref / p - log(p_ref / p) - 1; f the factors of `correct` (`correction`, bound), or
    1. Where old_logprobs is logprobs detached, r is 1 and its gradient is that of log p."""
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    unclipped = ratio * inputs.advantages
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1]) * inputs.advantages
    per_token = -torch.minimum(unclipped, clipped)
    sums = {"clip_fraction": (inputs.weights * (clipped < unclipped)).sum().detach()}
    if correct is not None:
        factors, outside = correct(inputs.old_logprobs - inputs.sampler_logprobs, inputs.rows)
        per_token = per_token * factors
        sums["mismatch/corrected"] = (inputs.weights * outside).sum()
    if inputs.reference_logprobs is not None:
        kl_per_token = k3(inputs.reference_logprobs - inputs.logprobs)
        per_token = per_token + kl * kl_per_token
        sums["kl"] = (inputs.weights * kl_per_token).sum().detach()
    return LossOutputs(loss=(inputs.weights * per_token).sum(), sums=sums)


def k3(log_ratio: Tensor) -> Tensor:
    """Schulman's k3 estimator exp(x) - x - 1 of KL(p || q), x = log q - log p on samples of p (DeepSeek-V2 eq. 33)."""
    return torch.expm1(log_ratio) - log_ratio
