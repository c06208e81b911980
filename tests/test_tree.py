"""Token trees: computing shared prefixes once changes no log-probability and no gradient."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, DeepseekV2Config, LlamaConfig, Qwen3MoeConfig

from alignment.logprobs import TREE_ATTENTION, selected_logprobs, token_logprobs
from alignment.tree import pack, plant, silent_batch
from rollout.types import Trajectory

SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48}
MODELS = {
    "deepseek_v2": DeepseekV2Config(
        **SMALL, num_attention_heads=4, num_key_value_heads=4, n_routed_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=None,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **SMALL, num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "llama": LlamaConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4),
}  # fmt: skip


def trajectory(prompt: list[int], completion: list[int]) -> Trajectory:
    tokens = np.array(prompt + completion, np.int32)
    mask = np.arange(len(tokens)) >= len(prompt)
    return Trajectory(tokens, mask, np.full(len(tokens), np.nan, np.float32), "stop")


GROUPS = [
    # shared prompt; repeated completions; one a prefix of another; an early branch
    [([1, 2, 3], [4, 5, 9]), ([1, 2, 3], [4, 5, 9]), ([1, 2, 3], [4, 6, 9]), ([1, 2, 3], [4, 5]), ([1, 2, 3], [7])],
    [([8, 8], [8, 8, 8]), ([8, 8], [9])],
    [([5], [6, 7, 8, 9, 10, 11, 12])],
]


def reference_logprobs(model, item, temperature: float) -> torch.Tensor:
    """One sequence, one plain causal forward with Transformers' eager attention."""
    prompt, completion = item
    logits = model(torch.tensor([prompt + completion])).logits[0] / temperature
    picked = torch.log_softmax(logits, -1)[torch.arange(len(prompt) - 1, len(prompt) + len(completion) - 1)]
    return picked.gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("max_nodes", [1000, 9, 4])
def test_trees_give_every_sequence_its_own_logprobs_and_gradients(name: str, max_nodes: int) -> None:
    torch.manual_seed(0)
    # A model writes its attention into the configuration it is given; grouped_mm has no float64.
    configs = [copy.deepcopy(MODELS[name]) for _ in range(2)]
    for config in configs[: 2 * (name != "llama")]:
        config._experts_implementation = "eager"
    eager = AutoModelForCausalLM.from_config(configs[0], attn_implementation="eager", dtype=torch.float64)
    tree = AutoModelForCausalLM.from_config(configs[1], attn_implementation=TREE_ATTENTION, dtype=torch.float64)
    tree.load_state_dict(eager.state_dict())
    items = [item for group in GROUPS for item in group]
    expected = [reference_logprobs(eager, item, 0.7) for item in items]
    factors = [torch.linspace(-1, 1, len(values), dtype=torch.float64) + i for i, values in enumerate(expected)]
    sum((values * factor).sum() for values, factor in zip(expected, factors, strict=True)).backward()

    trees, start = [], 0
    for group in GROUPS:
        rows = list(range(start, start + len(group)))
        trees += plant([trajectory(*item) for item in group], rows, max_nodes)
        start += len(group)
    found = 0
    for batch in pack(trees, max_nodes):
        logprobs = token_logprobs(tree, batch, 0.7)[0]
        total = torch.zeros((), dtype=torch.float64)
        for row in np.unique(batch.rows):
            values = logprobs[torch.from_numpy(batch.rows == row)]
            # selected_logprobs works in float32
            torch.testing.assert_close(values.double(), expected[row], atol=3e-6, rtol=0)
            total = total + (values * factors[row]).sum()
            found += len(values)
        total.backward()
    assert found == sum(len(completion) for _, completion in items)
    for (key, a), b in zip(eager.named_parameters(), tree.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_shared_prefixes_and_last_tokens_are_not_computed_twice() -> None:
    (batch,) = pack(plant([trajectory(*item) for item in GROUPS[0]], range(5), 1000), 1000)
    # read: 1 2 3 4 5 | (same) | 1 2 3 4 6 | 1 2 3 4 | 1 2 3 -> nodes 1 2 3 4 5 6
    assert batch.token_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 4]
    assert batch.ends.tolist() == [6, 6, 6, 6, 5, 6]
    assert batch.copies.tolist() == [5, 5, 5, 4, 2, 1]
    # 3->4, 3->7, 4->5, 4->6, 5->9, 6->9: seven tokens less than the twelve that carry loss
    assert len(batch.sources) == 6 and len(batch.edges) == 12


def test_packing_respects_the_budget_and_loses_nothing() -> None:
    rng = np.random.default_rng(0)
    trees = []
    for row in range(40):
        tokens = rng.integers(0, 50, rng.integers(2, 30)).tolist()
        trees += plant([trajectory(tokens[:1], tokens[1:])], [row], 64)
    batches = pack(trees, 64)
    assert all(len(batch.token_ids) <= 64 for batch in batches)
    found = np.concatenate([batch.rows for batch in batches]).tolist()
    expected = [branch.row for tree in trees for branch in tree for _ in branch.trajectory.token_ids[1:]]
    assert sorted(found) == sorted(expected)


def test_an_silent_batch_has_gradients_of_zero() -> None:
    model = AutoModelForCausalLM.from_config(MODELS["deepseek_v2"], attn_implementation=TREE_ATTENTION)
    token_logprobs(model, silent_batch(), 1.0)[0].sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.model.embed_tokens.weight.grad is not None


def test_a_sliding_window_shorter_than_a_sequence_is_refused() -> None:
    from transformers import MistralConfig

    config = MistralConfig(**SMALL, num_attention_heads=4, num_key_value_heads=4, sliding_window=4)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=TREE_ATTENTION)
    with pytest.raises(ValueError, match="last 4 tokens only"):
        token_logprobs(model, pack(plant([trajectory(*GROUPS[2][0])], [0], 100), 100)[0], 1.0)


def test_chunked_logprobs_equal_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(17, 11, dtype=torch.float32)
    targets = torch.randint(0, 11, (17,))
    results = []
    for limit in (10**9, 33):
        monkeypatch.setattr("alignment.logprobs.LOGITS_PER_CHUNK", limit)
        leaf = logits.clone().requires_grad_()
        logprobs, entropies = selected_logprobs(leaf, targets, 1.3)
        (logprobs * torch.arange(17.0)).sum().backward()
        results.append((logprobs.detach(), entropies, leaf.grad))
    for whole, chunked in zip(*results, strict=True):
        torch.testing.assert_close(whole, chunked)
