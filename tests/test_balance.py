"""DeepSeek-V2's balance losses against a count by loops, the same for any number of micro-batches, and what they do."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_routing import FAMILIES, build, routers, sequences

from alignment.config import TrainConfig
from alignment.losses import sft_loss
from alignment.policy import RankPolicy, merge_stats
from alignment.protocols import TrainRow
from alignment.routing import Load, Routing, balance_weights, count

STEPS = 100
ALPHAS = {"expert": 0.3, "device": 0.5, "communication": 0.2, "devices": 4, "limit": 2}


def brute_force(scores: torch.Tensor, ids: np.ndarray, balance: dict[str, float]) -> torch.Tensor:
    """Equations 23-31 for one layer, by loops over tokens. scores [T, E] affinities; ids [T, K]."""
    tokens, experts = scores.shape
    devices, limit, size = int(balance["devices"]), balance["limit"], experts // int(balance["devices"])
    f = [experts / (ids.shape[1] * tokens) * sum(i in row for row in ids) for i in range(experts)]
    p = [scores[:, i].mean() for i in range(experts)]
    loss = balance["expert"] * sum(f[i] * p[i] for i in range(experts))
    for device in range(devices):
        mine = range(device * size, (device + 1) * size)
        there = sum(any(i in mine for i in row) for row in ids)
        share = sum(p[i] for i in mine)
        loss = loss + balance["device"] * sum(f[i] for i in mine) / size * share
        loss = loss + balance["communication"] * devices / (limit * tokens) * there * share
    return loss


def test_the_three_losses_are_those_of_the_paper() -> None:
    torch.manual_seed(0)
    scores = torch.rand(30, 8, dtype=torch.float64).softmax(-1).requires_grad_()
    ids = np.stack([np.random.default_rng(t).permutation(8)[:3] for t in range(30)])
    expected = brute_force(scores, ids, ALPHAS)
    (gradient,) = torch.autograd.grad(expected, scores)
    chosen, sent = count(torch.from_numpy(ids), torch.ones(30, dtype=torch.float64), 8, 4)
    load = Load(chosen[None], sent[None], torch.tensor(30.0, dtype=torch.float64))
    weights = balance_weights(load, devices=4, limit=2, expert=0.3, device=0.5, communication=0.2)
    found = (weights[0] * scores.mean(0)).sum()
    found.backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(scores.grad, gradient, rtol=1e-10, atol=1e-15)


class Kept:
    """A `RankPolicy` whose gradients are kept instead of applied."""

    def __init__(self, family: str, tokens: int, recompute: bool = False, **balance: float) -> None:
        self.model = build(family)
        if recompute:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in self.model.model.layers:
                layer.training = True
        self.gradients: dict[str, torch.Tensor] = {}
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        routing = Routing(self.model, TrainConfig(balance=balance))
        self.policy = RankPolicy(self.model, optimizer, tokens, self._clip, lambda last: None, lambda: None, routing)

    def _clip(self, max_norm: float) -> float:
        self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
        return 0.0

    def update(self, share: slice = slice(None)) -> dict[str, float]:
        given = [dataclasses.replace(trajectory, routes=None) for trajectory in sequences(self.model)[share]]
        rows = [TrainRow(trajectory, 0, len(trajectory.token_ids), 1.0, 0.1) for trajectory in given]
        stats = self.policy.update(rows, sft_loss, learning_rate=0.0, temperature=1.0, max_grad_norm=1.0)
        return merge_stats([stats])


@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ("mixtral", "olmoe")])
def test_a_batchs_balance_is_that_of_its_sequences_one_by_one(family: str) -> None:
    """Tokens that sequences share are computed once and count for each."""
    kept = Kept(family, 10_000, **ALPHAS)
    metrics = kept.update()
    model, chosen, scores = build(family), [], []

    def record(module: torch.nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        chosen.append(output[2])
        scores.append(output[0].float())

    for router in routers(model):
        router.register_forward_hook(record)
    model.set_attn_implementation("eager")
    for trajectory in sequences(model):
        model(input_ids=torch.from_numpy(trajectory.token_ids[None, :-1]).long())
    total, layers = 0.0, len(routers(model))
    for layer in range(layers):
        logits = torch.cat(scores[layer::layers])
        affinity = logits.sigmoid() if family == "deepseek-v3" else logits.softmax(-1)
        affinity = affinity / affinity.sum(-1, keepdim=True)
        total = total + brute_force(affinity.double(), torch.cat(chosen[layer::layers]).numpy(), ALPHAS)
    assert metrics["balance"] == pytest.approx(float(total), rel=1e-5)
    total.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if name.endswith("gate.weight")}
    plain = Kept(family, 10_000)
    plain.update()
    for name, gradient in expected.items():
        difference = kept.gradients[name] - plain.gradients[name]
        torch.testing.assert_close(
            difference, gradient.float(), rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-7
        )


@pytest.mark.parametrize("recompute", [False, True])
def test_micro_batches_add_up_to_the_batch(recompute: bool) -> None:
    whole = Kept("deepseek-v2", 10_000, **ALPHAS)
    expected = whole.update()
    for tokens in (12, 9):  # two and four trees, that share less
        parts = Kept("deepseek-v2", tokens, recompute, **ALPHAS)
        found = parts.update()
        assert found["tokens/computed"] > expected["tokens/computed"]
        assert found["balance"] == pytest.approx(expected["balance"], rel=1e-6)
        assert found["experts/entropy"] == pytest.approx(expected["experts/entropy"], rel=1e-9)
        for name, gradient in whole.gradients.items():
            torch.testing.assert_close(parts.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def _on_ranks(folder: Path) -> None:
    """Each rank takes its share of the sequences; losses and gradients add up over ranks."""
    kept = Kept("deepseek-v2", 10_000, **ALPHAS)
    balance = torch.tensor(kept.update(slice(dist.get_rank(), None, dist.get_world_size()))["balance"]).double()
    for tensor in (balance, *kept.gradients.values()):
        dist.all_reduce(tensor)
    if dist.get_rank() == 0:
        torch.save((balance, kept.gradients), folder / "found.pt")


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_add_up_to_the_batch(ranks: int, tmp_path: Path) -> None:
    whole = Kept("deepseek-v2", 10_000, **ALPHAS)
    expected = whole.update()
    run_ranks(_on_ranks, ranks, tmp_path)
    balance, gradients = torch.load(tmp_path / "found.pt")
    assert float(balance) == pytest.approx(expected["balance"], rel=1e-6)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)


def test_a_collapsed_router_is_balanced_by_the_losses_alone() -> None:
    """Nearly all tokens start at the same two of eight experts; only the balance loss, where there is one, trains."""
    after = {}
    for alpha in (0.0, 1.0):
        kept = Kept("deepseek-v2", 10_000, **({"expert": alpha} if alpha else {}))
        with torch.no_grad():
            kept.model.model.embed_tokens.weight.add_(0.01)  # a direction that all tokens share
            for router in routers(kept.model):
                router.weight.mul_(0.3)
                router.weight[:2].add_(0.2)
        kept.policy.optimizer = torch.optim.AdamW(
            [router.weight for router in routers(kept.model)], lr=1e-2, weight_decay=0.0
        )
        given = [trajectory for seed in range(8) for trajectory in sequences(kept.model, seed)]
        rows = [
            TrainRow(dataclasses.replace(t, routes=None), i, len(t.token_ids), 1.0, 0.0) for i, t in enumerate(given)
        ]
        loads = []
        for _ in range(STEPS):
            stats = kept.policy.update(rows, sft_loss, learning_rate=1e-2, temperature=1.0, max_grad_norm=1.0)
            kept.model.zero_grad()
            loads.append(merge_stats([stats])["experts/max_load"])
        after[alpha] = max(loads[-STEPS // 10 :])
    assert after[0.0] > 3.5 and after[1.0] < 1.5


def test_load_by_hand() -> None:
    load = Load(torch.tensor([[2.0, 2.0, 0.0, 0.0]]), torch.tensor([[4.0]]), torch.tensor(4.0))
    metrics = load.metrics()
    assert metrics.pop("experts/load") == [[200, 200, 0, 0]]
    assert metrics == pytest.approx({"experts/max_load": 2.0, "experts/entropy": 0.5, "experts/dead": 0.5})


def test_balances_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="needs `devices`"):
        TrainConfig(balance={"device": 0.05})
    with pytest.raises(ValueError, match="3 devices do not divide 8 experts"):
        Routing(build("deepseek-v2"), TrainConfig(balance={"device": 0.05, "devices": 3, "limit": 1}))
    with pytest.raises(ValueError, match="no routed experts to balance"):
        Routing(torch.nn.Linear(2, 2), TrainConfig(balance={"expert": 0.1}))
