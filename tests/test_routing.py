"""Replayed experts against routers whose choice is forced another way; trees that keep apart what was routed apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import numpy as np
import pytest
import torch
from ranks import CONFIGS
from transformers import AutoModelForCausalLM, OlmoeConfig, PreTrainedModel

from alignment.config import TrainConfig
from alignment.logprobs import TREE_ATTENTION, token_logprobs
from alignment.routing import Routing
from alignment.tree import MicroBatch, pack, plant
from rollout.types import Trajectory

FAMILIES = {
    **{name: CONFIGS[name] for name in ("deepseek-v2", "deepseek-v3", "qwen3-moe", "mixtral")},
    "qwen3-moe-normalised": type(CONFIGS["qwen3-moe"])(**CONFIGS["qwen3-moe"].to_dict() | {"norm_topk_prob": True}),
    "deepseek-v2-scaled": type(CONFIGS["deepseek-v2"])(
        **CONFIGS["deepseek-v2"].to_dict() | {"routed_scaling_factor": 2.5}
    ),
    "olmoe": OlmoeConfig(
        vocab_size=101, hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2, pad_token_id=0, eos_token_id=1,
    ),
}  # fmt: skip


def build(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = type(FAMILIES[family])(**FAMILIES[family].to_dict())
    model = AutoModelForCausalLM.from_config(config, attn_implementation=TREE_ATTENTION)
    with torch.no_grad():  # affinities that differ enough for scale and norm to matter
        for module in model.modules():
            if type(module).__name__.lower().endswith("topkrouter"):
                module.weight.normal_(std=0.5)
    return model.eval()


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    return [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]


def sequences(model: PreTrainedModel, seed: int = 0) -> list[Trajectory]:
    """Four completions of one prompt; the experts of each token are drawn at random."""
    rng, layers, config = np.random.default_rng(seed), len(routers(model)), model.config
    experts, chosen = routers(model)[0].weight.shape[0], config.num_experts_per_tok
    prompt, found = rng.integers(2, 101, 5), []
    for length in (3, 6, 2, 4):
        tokens = np.concatenate([prompt, rng.integers(2, 101, length)]).astype(np.int32)
        mask = np.arange(len(tokens)) >= len(prompt)
        ranks = rng.random((len(tokens) - 1, layers, experts)).argsort(-1)
        found.append(
            Trajectory(
                tokens, mask, np.zeros(len(tokens), np.float32), "stop", (), ranks[..., :chosen].astype(np.int16)
            )
        )
    return found


def batch_of(trajectories: list[Trajectory], by_routes: bool = True) -> MicroBatch:
    (batch,) = pack(plant(trajectories, range(len(trajectories)), 10_000, by_routes=by_routes), 10_000)
    return batch


@contextmanager
def forced(model: PreTrainedModel, routes: torch.Tensor) -> Iterator[None]:
    """Each router's own forward, with the scores of all but the recorded experts pushed out of its choice."""
    originals = [router.forward for router in routers(model)]
    for layer, router in enumerate(routers(model)):

        def forward(self, hidden, layer=layer, original=originals[layer]):
            logits, gates, _ = original(hidden)
            ids = routes[:, layer]
            if hasattr(self, "e_score_correction_bias"):
                chosen = logits.float().sigmoid().gather(1, ids)
            else:
                chosen = (logits.float().exp() / logits.float().exp().sum(-1, keepdim=True)).gather(1, ids)
            config = model.config
            if config.model_type in ("mixtral", "deepseek_v3") or (
                config.model_type == "qwen3_moe" and config.norm_topk_prob
            ):
                chosen = chosen / chosen.sum(-1, keepdim=True)
            if config.model_type.startswith("deepseek"):
                chosen = chosen * config.routed_scaling_factor
            return logits, chosen.to(gates.dtype), ids

        router.forward = MethodType(forward, router)
    try:
        yield
    finally:
        for router in routers(model):
            del router.forward


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_replay_computes_with_the_recorded_experts_and_gradients_flow(family: str, recompute: bool) -> None:
    model = build(family)
    batch = batch_of(sequences(model))
    routes = torch.from_numpy(batch.routes).long()
    with forced(model, routes):
        expected = token_logprobs(model, batch, 1.0)[0]
        expected.sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    natural = token_logprobs(model, batch, 1.0)[0]
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            layer.training = True
    routing = Routing(model, TrainConfig(routing_replay=True))
    routing.start(batch, model.device)
    found = token_logprobs(model, batch, 1.0)[0]
    found.sum().backward()
    assert routing.differing() == 0
    routing.start(dataclasses.replace(batch, routes=None), model.device)  # what was not sampled routes for itself
    assert torch.equal(token_logprobs(model, batch, 1.0)[0], natural)
    assert (natural - expected).abs().max() > 1e-3, "the recorded experts are the model's own"
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-4)
    assert any(router.weight.grad.abs().max() > 0 for router in routers(model))


def test_without_replay_differing_tokens_are_counted_and_nothing_changes() -> None:
    model = build("deepseek-v2")
    batch = batch_of(sequences(model))
    own = {}
    for layer, router in enumerate(routers(model)):
        router.register_forward_hook(lambda module, args, out, layer=layer: own.update({layer: out[2]}))
    expected = token_logprobs(model, batch, 1.0)[0]
    routes = torch.stack([own[layer] for layer in range(2)], 1)
    routes = routes.flip(-1)  # the order of a token's experts means nothing
    routes[3, 1, 0] = (routes[3, 1] + 1).max() % 8 if (routes[3, 1] + 1).max() % 8 not in routes[3, 1] else 7
    routes[5] = -1  # no record
    batch = dataclasses.replace(batch, routes=routes.numpy().astype(np.int16))
    routing = Routing(model, TrainConfig())
    routing.start(batch, model.device)
    assert torch.equal(token_logprobs(model, batch, 1.0)[0], expected)
    assert routing.differing() == 2


def test_unknown_experts_are_the_routers_own() -> None:
    model = build("qwen3-moe")
    batch = batch_of(sequences(model))
    expected = token_logprobs(model, batch, 1.0)[0]
    routing = Routing(model, TrainConfig(routing_replay=True))
    routing.start(dataclasses.replace(batch, routes=np.full_like(batch.routes, -1)), model.device)
    assert torch.equal(token_logprobs(model, batch, 1.0)[0], expected)


def test_a_record_of_another_model_and_an_unknown_router_are_refused() -> None:
    model = build("deepseek-v2")
    batch = batch_of(sequences(model))
    routing = Routing(model, TrainConfig(routing_replay=True))
    with pytest.raises(ValueError, match="recorded 1 layers of experts, the trainer has 2"):
        routing.start(dataclasses.replace(batch, routes=batch.routes[:, :1]), model.device)
    routers(model)[0].register_forward_hook(lambda module, args, out: (out[0], out[1] * out[1], out[2]), prepend=True)
    routing.start(batch, model.device)
    with pytest.raises(ValueError, match="DeepseekV2TopkRouter computes gate weights in a way"):
        token_logprobs(model, batch, 1.0)


def test_tokens_are_shared_where_their_experts_agree() -> None:
    """Five read tokens of prompt; one sequence's third token went to other experts."""
    tokens = [np.array([1, 2, 3, 4, 5, *tail], np.int32) for tail in ([6, 7], [6, 8], [9], [6, 7])]
    routes = [np.zeros((len(t) - 1, 2, 2), np.int16) + np.arange(2, dtype=np.int16) for t in tokens]
    routes[1][2, 1] = [3, 4]
    mask = [np.arange(len(t)) >= 5 for t in tokens]
    given = [
        Trajectory(t, m, np.zeros(len(t), np.float32), "stop", (), r)
        for t, m, r in zip(tokens, mask, routes, strict=True)
    ]
    together, apart = batch_of(given, by_routes=False), batch_of(given)
    assert len(together.token_ids) == 6  # 1 2 3 4 5 6; what is predicted last is never read
    assert len(apart.token_ids) == 6 + 4  # and once more 3 4 5 6, by other experts
    for batch in (together, apart):
        assert batch.routes.shape == (len(batch.token_ids), 2, 2)
        assert sorted(batch.targets[batch.edges].tolist()) == sorted([6, 7, 6, 8, 9, 6, 7])
    (node,) = np.flatnonzero((apart.routes[:, 1] == [3, 4]).all(-1))
    assert apart.token_ids[node] == 3 and apart.positions[node] == 2
