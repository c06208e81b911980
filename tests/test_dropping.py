"""Token dropping against loops over slots; what it leaves alone; and frozen routers."""

from __future__ import annotations

import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from test_balance import Kept
from test_routing import build, routers, sequences

from alignment import routing
from alignment.config import GRPOConfig, SFTConfig, TrainConfig
from alignment.losses import grpo_loss, sft_loss
from alignment.policy import merge_stats
from alignment.protocols import TrainRow
from alignment.routing import Routing, dropped, exempt_nodes

DEVICES = 4


def test_the_slots_of_lowest_affinity_above_a_devices_capacity_are_dropped_and_none_of_an_exempt_sequence() -> None:
    rng = np.random.default_rng(0)
    scores = torch.from_numpy(rng.dirichlet(np.full(8, 0.3), 40)).float()
    ids = scores.topk(3, dim=-1).indices
    exempt = torch.from_numpy(rng.random(40) < 0.2)
    for capacity in (0.5, 0.8, 1.0):
        lost = dropped(scores, ids, exempt, capacity, DEVICES)
        expected = np.zeros((40, 3), bool)
        for device in range(DEVICES):
            here = [(n, k) for n in range(40) for k in range(3) if int(ids[n, k]) // 2 == device]
            may_go = sorted((float(scores[n, ids[n, k]]), n, k) for n, k in here if not exempt[n])
            for _, n, k in may_go[: max(0, len(here) - int(capacity * 120 / DEVICES))]:
                expected[n, k] = True
        assert expected.any() and not expected[exempt].any()
        np.testing.assert_array_equal(lost.numpy(), expected)
    assert not dropped(scores, ids, exempt, 4.0, DEVICES).any()


def test_a_tenth_of_the_sequences_is_exempt_and_always_the_same() -> None:
    lengths = np.full(3000, 7)
    tokens = np.random.default_rng(0).integers(0, 500, lengths.sum())
    exempt = exempt_nodes(tokens, lengths)
    assert 0.08 < exempt.mean() < 0.12 and len(exempt) == len(tokens)
    order = np.random.default_rng(1).permutation(3000)
    shuffled = exempt_nodes(tokens.reshape(3000, 7)[order].reshape(-1).astype(np.int32), lengths)
    np.testing.assert_array_equal(shuffled.reshape(3000, 7), exempt.reshape(3000, 7)[order])


def dropping_policy(capacity: float | None) -> Kept:
    kept = Kept("deepseek-v2", 10_000)
    # Another model: on the first the hooks of `Kept` would come before these.
    kept.policy.model = kept.model = build("deepseek-v2")
    kept.policy.routing = Routing(kept.model, TrainConfig(balance={"devices": DEVICES}), capacity)
    return kept


def rows(kept: Kept, sampled: bool) -> list[TrainRow]:
    """One sequence a group, so that each stands alone."""
    found = []
    for index, trajectory in enumerate(sequences(kept.model)):
        logprobs = np.where(trajectory.loss_mask, -1.0 if sampled else np.nan, np.nan).astype(np.float32)
        given = dataclasses.replace(trajectory, routes=None, logprobs=logprobs)
        found.append(TrainRow(given, index, len(logprobs), 0.7, 0.1))
    return found


def run(kept: Kept, sampled: bool):
    """The update's statistics, and the rows' log-probabilities of an evaluation after it."""
    loss = partial(grpo_loss, clip=(0.2, 0.2), kl=0.0) if sampled else sft_loss
    given = rows(kept, sampled)
    stats = kept.policy.update(given, loss, learning_rate=0.0, temperature=1.0, max_grad_norm=1.0)
    return stats, kept.policy.logprobs(given, temperature=1.0)


def test_dropping_changes_training_and_not_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, evaluated = run(dropping_policy(None), sampled=False)
    found, again = run(dropping_policy(0.5), sampled=False)
    assert merge_stats([found])["tokens/dropped"] > 0 and "tokens/dropped" not in merge_stats([plain])
    assert abs(merge_stats([found])["loss"] - merge_stats([plain])["loss"]) > 1e-4
    for one, other in zip(evaluated, again, strict=True):
        np.testing.assert_array_equal(one, other)
    monkeypatch.setattr(routing, "EXEMPT", 1.0)
    spared, _ = run(dropping_policy(0.5), sampled=False)
    assert merge_stats([spared])["loss"] == merge_stats([plain])["loss"]
    assert merge_stats([spared])["tokens/dropped"] == 0


def test_in_rl_tokens_computed_without_an_expert_leave_loss_and_mismatch_and_are_counted() -> None:
    stats, _ = run(dropping_policy(1.0), sampled=True)
    plain, _ = run(dropping_policy(None), sampled=True)
    lost = int(merge_stats([stats])["tokens/dropped"])
    tokens = stats.sums["tokens/loss"]
    assert 0 < lost < tokens
    assert [sum(map(len, each.mismatch)) for each in (stats, plain)] == [tokens - lost, tokens]
    # On-policy the ratio is 1, so each token that stays adds -weight x advantage.
    assert merge_stats([stats])["loss"] == pytest.approx(-0.1 * 0.7 * (tokens - lost), rel=1e-5)


@pytest.mark.parametrize("router", ["train", "freeze"])
def test_frozen_routers_stay_as_they_are(router: str) -> None:
    kept = Kept("deepseek-v2", 10_000)
    kept.policy.routing = Routing(kept.model, TrainConfig(router=router))
    kept.policy.optimizer = torch.optim.AdamW(kept.model.parameters(), lr=1e-2, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in kept.model.named_parameters()}
    kept.policy.update(rows(kept, False), sft_loss, learning_rate=1e-2, temperature=1.0, max_grad_norm=1.0)
    own = {id(module.weight) for module in routers(kept.model)}
    for name, parameter in kept.model.named_parameters():
        assert torch.equal(parameter, before[name]) == (router == "freeze" and id(parameter) in own), name


def test_a_stage_drops_nothing_unless_asked() -> None:
    assert GRPOConfig.model_fields["capacity"].default is None is SFTConfig.model_fields["capacity"].default
