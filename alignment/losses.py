"""Objectives as pure functions of flat tensors [C] (C loss-carrying tokens). Each is a plain weighted sum:
all normalisation is in `LossInputs.weights`, so sums over micro-batches and ranks add up to the batch's loss."""

from __future__ import annotations

import torch

from alignment.protocols import LossInputs, LossOutputs


def sft_loss(inputs: LossInputs) -> LossOutputs:
    """Negative log-likelihood: -sum_c w_c log p_c."""
    return LossOutputs(loss=-(inputs.weights * inputs.logprobs).sum(), sums={})


def grpo_loss(inputs: LossInputs, *, clip_low: float, clip_high: float, kl: float) -> LossOutputs:
    """GRPO's clipped objective, negated (DeepSeek-V2 eq. 32, per token as in DeepSeekMath eq. 3).

    -sum_c w_c [ min(r_c A_c, clip(r_c, 1 - clip_low, 1 + clip_high) A_c) - kl * KL_c ], with r = p / p_old and
    KL the k3 estimator of eq. 33: p_ref / p - log(p_ref / p) - 1. Where old_logprobs is logprobs detached,
    r is 1 and its gradient is that of log p.
    """
    ratio = torch.exp(inputs.logprobs - inputs.old_logprobs)
    unclipped = ratio * inputs.advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * inputs.advantages
    per_token = -torch.minimum(unclipped, clipped)
    sums = {"clip_fraction": (inputs.weights * (clipped < unclipped)).sum().detach()}
    if inputs.reference_logprobs is not None:
        kl_per_token = k3(inputs.reference_logprobs - inputs.logprobs)
        per_token = per_token + kl * kl_per_token
        sums["kl"] = (inputs.weights * kl_per_token).sum().detach()
    return LossOutputs(loss=(inputs.weights * per_token).sum(), sums=sums)


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """Schulman's k3 estimator exp(x) - x - 1 of KL(p || q), x = log q - log p on samples of p (DeepSeek-V2 eq. 33)."""
    return torch.expm1(log_ratio) - log_ratio
