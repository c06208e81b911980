"""Losses, advantages and schedules against arithmetic written out by hand, values and gradients."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import numpy as np
import pytest
import torch

from alignment.batch import group_advantages
from alignment.config import StageConfig
from alignment.losses import correction, grpo_loss, k3, sft_loss
from alignment.protocols import LossInputs


def inputs(logprobs, old, advantages, weights, reference=None) -> LossInputs:
    def tensor(values):
        return None if values is None else torch.tensor(values, dtype=torch.float64)

    return LossInputs(
        tensor(logprobs).requires_grad_(), tensor(old), tensor(reference), tensor(advantages), tensor(weights)
    )


def test_sft_loss_is_the_weighted_negative_log_likelihood() -> None:
    given = inputs([-1.0, -0.5], [0, 0], [1, 1], [0.25, 0.75])
    loss = sft_loss(given).loss
    loss.backward()
    assert loss.item() == pytest.approx(0.25 * 1.0 + 0.75 * 0.5)
    assert given.logprobs.grad.tolist() == pytest.approx([-0.25, -0.75])


def test_grpo_clips_only_where_clipping_is_pessimistic() -> None:
    # ratio 1.5: clipped at 1.2 where A > 0, not where A < 0; ratio 0.5: at 0.8 where A < 0, not where A > 0.
    up, down = math.log(1.5), math.log(0.5)
    given = inputs([up, up, down, down], [0, 0, 0, 0], [2.0, -2.0, 2.0, -2.0], [0.1, 0.2, 0.3, 0.4])
    outputs = grpo_loss(given, clip=(0.2, 0.2), kl=0.0)
    outputs.loss.backward()
    expected = -(0.1 * 1.2 * 2 + 0.2 * 1.5 * -2 + 0.3 * 0.5 * 2 + 0.4 * 0.8 * -2)
    assert outputs.loss.item() == pytest.approx(expected)
    # d ratio / d logprob = ratio; clipped tokens have no gradient
    assert given.logprobs.grad.tolist() == pytest.approx([0.0, -0.2 * 1.5 * -2, -0.3 * 0.5 * 2, 0.0])
    assert outputs.sums["clip_fraction"].item() == pytest.approx(0.1 + 0.4)


def test_grpo_clip_high_moves_the_upper_bound_alone() -> None:
    given = inputs([math.log(1.25), math.log(0.75)], [0, 0], [1.0, -1.0], [1.0, 1.0])
    assert grpo_loss(given, clip=(0.2, 0.28), kl=0.0).loss.item() == pytest.approx(-1.25 + 0.8)


def test_on_policy_the_ratio_is_one_and_its_gradient_is_the_policy_gradient() -> None:
    given = inputs([-1.0, -2.0], [-1.0, -2.0], [0.7, -1.3], [0.5, 0.5])
    loss = grpo_loss(given, clip=(0.2, 0.2), kl=0.0).loss
    loss.backward()
    assert loss.item() == pytest.approx(-0.5 * (0.7 - 1.3))
    assert given.logprobs.grad.tolist() == pytest.approx([-0.5 * 0.7, 0.5 * 1.3])


def test_the_kl_term_is_k3_towards_the_reference() -> None:
    # log p = -1, log p_ref = -1.5: x = -0.5, k3 = exp(-0.5) + 0.5 - 1
    given = inputs([-1.0], [-1.0], [0.0], [2.0], reference=[-1.5])
    outputs = grpo_loss(given, clip=(0.2, 0.2), kl=0.1)
    outputs.loss.backward()
    value = math.exp(-0.5) + 0.5 - 1
    assert outputs.sums["kl"].item() == pytest.approx(2 * value)
    assert outputs.loss.item() == pytest.approx(2 * 0.1 * value)
    # d k3 / d log p = -(exp(x) - 1)
    assert given.logprobs.grad.item() == pytest.approx(2 * 0.1 * (1 - math.exp(-0.5)))


@pytest.mark.parametrize(
    ("options", "factors", "outside"),
    [
        ({"low": 0, "high": 1.5, "sequence": False, "mask": False}, [1.2, 1.5, 0.5], [0, 1, 0]),  # TIS
        ({"low": 0, "high": 1.5, "sequence": False, "mask": True}, [1.2, 0.0, 0.5], [0, 1, 0]),  # MIS
        ({"low": 0.8, "high": 1.5, "sequence": False, "mask": True}, [1.2, 0.0, 0.0], [0, 1, 1]),  # IcePop
        ({"low": 0, "high": 3.0, "sequence": True, "mask": False}, [2.4, 2.4, 0.5], [0, 0, 0]),
        ({"low": 0, "high": 2.0, "sequence": True, "mask": True}, [0.0, 0.0, 0.5], [1, 1, 0]),
    ],
)
def test_importance_correction_weighs_the_policy_term_alone(options, factors, outside) -> None:
    # p_trainer / p_sampler 1.2 and 2 in row 0, 0.5 in row 1
    given = inputs([-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0], [1.0, -2.0, 0.5], [0.1, 0.2, 0.3], reference=[-1.5, -2, -3])
    ratios = torch.tensor([1.2, 2.0, 0.5], dtype=torch.float64)
    given = dataclasses.replace(given, sampler_logprobs=given.old_logprobs - ratios.log(), rows=torch.tensor([0, 0, 1]))
    outputs = grpo_loss(given, clip=(0.2, 0.2), kl=0.1, correct=partial(correction, **options))
    outputs.loss.backward()
    kl = math.exp(-0.5) + 0.5 - 1
    expected = -(0.1 * factors[0] * 1.0 + 0.2 * factors[1] * -2.0 + 0.3 * factors[2] * 0.5) + 0.1 * 0.1 * kl
    assert outputs.loss.item() == pytest.approx(expected)
    gradient = [-0.1 * factors[0] + 0.1 * 0.1 * (1 - math.exp(-0.5)), 0.2 * factors[1] * 2.0, -0.3 * factors[2] * 0.5]
    assert given.logprobs.grad.tolist() == pytest.approx(gradient)
    share = 0.1 * outside[0] + 0.2 * outside[1] + 0.3 * outside[2]
    assert outputs.sums["mismatch/corrected"].item() == pytest.approx(share)


def test_k3_is_zero_only_at_zero_and_never_negative() -> None:
    x = torch.linspace(-3, 3, 101, dtype=torch.float64)
    assert k3(x).min() >= -1e-15 and k3(torch.zeros(())).item() == 0


def test_advantages_by_hand() -> None:
    rewards = np.array([[1.0, 0.0, 0.0, 1.0], [1.0, 2.0, 3.0, 6.0]])
    found = group_advantages(rewards)
    std0 = math.sqrt(4 * 0.25 / 3)
    assert found[0].tolist() == pytest.approx([v / (std0 + 1e-4) for v in (0.5, -0.5, -0.5, 0.5)])
    std1 = math.sqrt((4 + 1 + 0 + 9) / 3)
    assert found[1].tolist() == pytest.approx([v / (std1 + 1e-4) for v in (-2, -1, 0, 3)])
    assert group_advantages(rewards, scale=False)[1].tolist() == pytest.approx([-2, -1, 0, 3])


def test_equal_rewards_give_exactly_no_advantage() -> None:
    assert not group_advantages(np.full((1, 8), 0.1)).any()


def test_masked_completions_leave_their_group() -> None:
    found = group_advantages(np.array([[np.nan, 1.0, 3.0], [np.nan, np.nan, 5.0]]))
    std = math.sqrt(2.0)
    assert found[0].tolist() == pytest.approx([0.0, -1 / (std + 1e-4), 1 / (std + 1e-4)])
    assert not found[1].any()


def test_schedules_by_hand() -> None:
    linear = StageConfig(learning_rate=1.0, schedule="linear", warmup_steps=2, decay_steps=4)
    assert [linear.rate(step, 10) for step in range(10)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])
    cosine = StageConfig(learning_rate=2.0, schedule="cosine")
    assert cosine.rate(0, 4) == pytest.approx(2.0)
    assert cosine.rate(2, 4) == pytest.approx(1.0)
    assert StageConfig(learning_rate=3.0).rate(99, 100) == 3.0
