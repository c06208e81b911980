"""How many bytes each part of a run takes on one rank, from a model's configuration and the layouts.

Parameters are counted on a model on the `meta` device, so they are what the trainer would hold; the rest is arithmetic:
activations count what Transformers' layers save for the backward pass."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from operator import mul
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from alignment.config import TrainConfig
from alignment.logprobs import LOGITS_PER_CHUNK
from hybrid_engine.layout import expert_layout
from hybrid_engine.offload import spread
from rollout.config import RolloutConfig, routed_experts

SIZE = {"float32": 4, "bfloat16": 2}
WHOLE = re.compile(r"norm|q_a_proj|kv_a_proj|mlp\.gate\.weight|router")


class Weight(NamedTuple):
    """One parameter. rows: its first dimension, which FSDP splits. expert: a layer's routed experts. whole: every rank
    of a tensor-parallel group of vLLM has all of it."""

    numel: int
    rows: int
    expert: bool
    whole: bool


@dataclass(frozen=True)
class Model:
    """What the arithmetic needs of a causal language model. values: its configuration's. groups: the parameters of each
    FSDP group (what is outside the decoder layers, then layers) -> how many are alike. moe_layers: layers with routed
    experts, `experts` each, of which a token gets `chosen`. dense, routed: parameters outside the routed experts and in
    them; active: of these, what a token is multiplied with. heads: query, key-value heads; sizes of a key, a value.
    pieces: in which a run moves them."""

    values: Mapping[str, Any]
    groups: Mapping[tuple[Weight, ...], int]
    layers: int
    moe_layers: int
    experts: int
    chosen: int
    dense: int
    routed: int
    active: tuple[float, float]
    heads: tuple[int, int, int, int]
    pieces: int


def model_of(config: PreTrainedConfig) -> Model:
    """Count the parameters of a model as Transformers builds it (of a reward model, too, whose head is smaller)."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    groups = [list(layer.named_parameters()) for layer in model.base_model.layers]
    inside = {id(parameter) for group in groups for _, parameter in group}
    groups.insert(0, [(name, p) for name, p in model.named_parameters() if id(p) not in inside])
    weights = Counter(
        tuple(Weight(p.numel(), len(p), ".experts." in n and p.ndim == 3, bool(WHOLE.search(n))) for n, p in group)
        for group in groups
    )
    v = model.config.get_text_config().to_dict()
    heads, experts = v["num_attention_heads"], routed_experts(v)
    size = v.get("head_dim") or v["hidden_size"] // heads
    shape = (heads, v.get("num_key_value_heads") or heads, size, size)
    if v.get("kv_lora_rank"):
        shape = (heads, heads, v["qk_nope_head_dim"] + v["qk_rope_head_dim"], v["v_head_dim"])
    routed = sum(w.numel * alike for group, alike in weights.items() for w in group if w.expert)
    dense, chosen = model.num_parameters() - routed, v["num_experts_per_tok"] if experts else 0
    lookup = 0 if model.all_tied_weights_keys else model.get_input_embeddings().weight.numel()
    active = dense - lookup, routed * chosen / max(1, experts)
    moe_layers = sum(alike for group, alike in weights.items() if any(w.expert for w in group))
    pieces = len(spread({name: p.numel() for name, p in model.named_parameters()}))
    return Model(v, weights, len(groups) - 1, moe_layers, experts, chosen, dense, routed, active, shape, pieces)


def sharded(model: Model, train: TrainConfig, most: float = inf) -> int:
    """Parameters that the first rank keeps: FSDP splits rows and pads the shares; expert parallelism splits evenly.
    most: count those alone that have fewer elements here."""
    layout = expert_layout(train)
    ranks = layout.parallel * layout.shard
    own = (
        (alike, w.numel // ranks if w.expert and train.expert > 1 else -(-w.rows // train.shard) * (w.numel // w.rows))
        for group, alike in model.groups.items()
        for w in group
    )
    return sum(alike * numel for alike, numel in own if numel < most)


def gathered(model: Model, train: TrainConfig, micro_batches: int) -> int:
    """Bytes of what FSDP gathers, at most, with the collectives' buffers: all layers at the end of a forward pass, and
    their summed gradients where several micro-batches add up; with activation checkpointing two layers at a time."""
    if train.world == 1 and train.dtype == "float32":
        return 0
    sizes = [sum(w.numel // (train.expert if w.expert else 1) for w in group) for group in model.groups]
    item, largest, whole = SIZE[train.dtype], max(sizes), sum(map(mul, sizes, model.groups.values()))
    buffers = largest * (item + 4)  # what is gathered arrives in one; gradients are reduced from one in float32
    if train.activation_checkpointing:
        return item * (sizes[0] + 2 * max(sizes[1:])) + 4 * sizes[0] + buffers
    return item * whole + buffers + (4 * whole if micro_batches > 1 else item * largest)


def layer_activations(model: Model, train: TrainConfig, length: int, on_cpu: bool) -> tuple[int, int]:
    """Bytes a token that a dense and a routed layer save for their backward pass. length: of the longest sequence."""
    v, b = model.values, SIZE[train.dtype]
    hidden, (heads, kv, qk, value) = v["hidden_size"], model.heads
    norm = 12 if b == 4 else 8  # the input in float32, what it is normalised to, and the output
    common = 2 * norm * hidden + heads * (2 * qk + 3 * value) * b
    if v.get("kv_lora_rank"):
        common += norm * ((v["q_lora_rank"] or 0) + v["kv_lora_rank"])
    elif "qwen3" in v["model_type"]:
        common += norm * (heads + kv) * qk
    # The mask, as numbers; without a fused kernel (the CPU has none where keys and values differ in size) the weights.
    common += length * heads * 4 if on_cpu and qk != value else length * b
    if not model.experts:
        return common + 4 * b * v["intermediate_size"], 0
    width = v.get("moe_intermediate_size") or v["intermediate_size"]
    shared, copy = 4 * b * (v.get("n_shared_experts") or 0) * width, 0 if b == 4 else 4 * hidden
    routed = model.chosen * (2 * hidden + 4 * width) * b + 8 * model.experts
    return common + 4 * b * v["intermediate_size"], common + routed + shared + copy


def activations(model: Model, train: TrainConfig, tokens: int, length: int, on_cpu: bool) -> int:
    """Bytes that a micro-batch of `tokens` tokens takes for its backward pass, logits aside."""
    dense, routed = layer_activations(model, train, length, on_cpu)
    kept = (model.layers - model.moe_layers) * dense + model.moe_layers * routed
    if train.activation_checkpointing:
        kept = model.layers * model.values["hidden_size"] * SIZE[train.dtype]
    return tokens * (kept + max(dense if model.layers > model.moe_layers else 0, routed))  # one is being computed


def logits(model: Model, train: TrainConfig, tokens: int) -> int:
    """Bytes of the logits of `tokens` tokens, their gradient and the softmax in float32, in chunks."""
    count = tokens * model.values["vocab_size"]
    return 2 * SIZE[train.dtype] * count + 16 * min(count, LOGITS_PER_CHUNK)


def engine_weights(model: Model, rollout: RolloutConfig) -> tuple[int, int]:
    """Bytes of vLLM's weights on one rank: of all, and of the largest layer."""
    ranks, dense = rollout.world if rollout.expert else rollout.tensor, rollout.tensor
    sizes = [sum(w.numel // (1 if w.whole else ranks if w.expert else dense) for w in group) for group in model.groups]
    return SIZE[rollout.dtype] * sum(map(mul, sizes, model.groups.values())), SIZE[rollout.dtype] * max(sizes[1:])


def cache_per_token(model: Model, rollout: RolloutConfig, on_cpu: bool) -> int:
    """Bytes of vLLM's KV cache for one token on one rank. With MLA the latent and the rotary key, once for all heads
    and on every rank; else the keys and values of this rank's heads, which vLLM pads to one size."""
    v, item = model.values, SIZE[rollout.dtype] * model.layers
    if v.get("kv_lora_rank") and (rollout.mla or not on_cpu):
        return (v["kv_lora_rank"] + v["qk_rope_head_dim"]) * item
    return 2 * max(1, model.heads[1] // rollout.tensor) * model.heads[2] * item
