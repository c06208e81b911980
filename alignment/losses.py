"""Objectives as pure functions of flat tensors [C] (C loss-carrying tokens). Each is a plain weighted sum:
all normalisation is in `LossInputs.weights`, so sums over micro-batches and ranks add up to the batch's loss."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from alignment.protocols import LossInputs, LossOutputs


def sft_loss(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood: -sum_c w_c log p_c."""
    return LossOutputs(loss=-(inputs.weights * inputs.logprobs).sum(), sums={})


@dataclass(frozen=True, slots=True)
class Correction:
    """Importance correction for what sampler and trainer differ by: a factor p_trainer / p_sampler of each token (of a
    completion's tokens together with `sequence`). Outside [low, high] it is clamped (TIS; Yao et al. 2025), or 0 with
    `mask` (MIS; with low > 0 IcePop). It is a constant for the gradient."""

    low: float
    high: float
    sequence: bool
    mask: bool

    def factors(self, log_ratio: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The factor of each token [C] and whether its ratio lay outside, from log(p_trainer / p_sampler) [C]."""
        if self.sequence:
            sums = log_ratio.new_zeros(int(rows.max()) + 1 if len(rows) else 0).index_add(0, rows, log_ratio)
            log_ratio = sums[rows]
        ratio = log_ratio.exp()
        outside = (ratio < self.low) | (ratio > self.high)
        return ratio.masked_fill(outside, 0.0) if self.mask else ratio.clamp(self.low, self.high), outside


def grpo_loss(
    inputs: LossInputs, *, clip: tuple[float, float], kl: float, correction: Correction | None = None
) -> LossOutputs:
    """GRPO's clipped objective, negated (DeepSeek-V2 eq. 32, per token as in DeepSeekMath eq. 3).

    -sum_c w_c [ f_c min(r_c A_c, clip(r_c, 1 - clip[0], 1 + clip[1]) A_c) - kl * KL_c ], with r = p / p_old and
    KL the k3 estimator of eq. 33: p_ref / p - log(p_ref / p) - 1; f the correction's factor, or 1. Where old_logprobs
    is logprobs detached, r is 1 and its gradient is that of log p.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    unclipped = ratio * inputs.advantages
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1]) * inputs.advantages
    per_token = -torch.minimum(unclipped, clipped)
    sums = {"clip_fraction": (inputs.weights * (clipped < unclipped)).sum().detach()}
    if correction is not None:
        assert inputs.sampler_logprobs is not None and inputs.rows is not None
        factors, outside = correction.factors(inputs.old_logprobs - inputs.sampler_logprobs, inputs.rows)
        per_token = per_token * factors
        sums["mismatch/corrected"] = (inputs.weights * outside).sum()
    if inputs.reference_logprobs is not None:
        kl_per_token = k3(inputs.reference_logprobs - inputs.logprobs)
        per_token = per_token + kl * kl_per_token
        sums["kl"] = (inputs.weights * kl_per_token).sum().detach()
    return LossOutputs(loss=(inputs.weights * per_token).sum(), sums=sums)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator exp(x) - x - 1 of KL(p || q), x = log q - log p on samples of p (DeepSeek-V2 eq. 33)."""
    return torch.expm1(log_ratio) - log_ratio
