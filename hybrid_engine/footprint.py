"""How many bytes each part of a run takes on one device, from a model's configuration and the layouts. No device is used.

Parameters are counted on a model on the `meta` device, so they are what the trainer would hold; the rest is arithmetic:
activations count what Transformers' layers save for the backward pass.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from alignment.config import TrainConfig
from hybrid_engine.cluster import ASSUMED, GIB, Cluster
from hybrid_engine.layout import expert_layout
from rollout.config import RolloutConfig, routed_experts

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SIZE = {"float32": 4, "bfloat16": 2}
WHOLE = re.compile(r"norm|q_a_proj|kv_a_proj|mlp\.gate\.weight|router")
"""Parameters that every rank of a tensor-parallel group of vLLM holds whole."""
CHUNK = 32 * 1024 * 1024
"""Logits of one softmax, as `alignment.logprobs` chunks them (a test compares)."""


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter. rows: its first dimension, which FSDP splits. expert: a layer's routed experts. whole: see
    `WHOLE`. lookup: an embedding table with no other use."""

    numel: int
    rows: int
    expert: bool
    whole: bool
    lookup: bool


@dataclass(frozen=True)
class Model:
    """groups: the parameters of each FSDP group: what is outside the decoder layers, then each layer's. values: of the
    configuration."""

    groups: tuple[tuple[Weight, ...], ...]
    values: Mapping[str, Any]

    def numel(self, *, expert: bool | None = None) -> int:
        """Parameters: all of them, the routed experts', or the others."""
        return sum(w.numel for group in self.groups for w in group if expert in (None, w.expert))

    @cached_property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.groups) - 1

    @cached_property
    def moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(any(w.expert for w in group) for group in self.groups)

    @cached_property
    def experts(self) -> int:
        """Routed experts of a layer."""
        return routed_experts(self.values)

    @cached_property
    def chosen(self) -> int:
        """Of those, the ones that compute a token."""
        return self.values["num_experts_per_tok"] if self.experts else 0

    @cached_property
    def active(self) -> tuple[float, float]:
        """Parameters that a token is multiplied with: outside the routed experts, and in those chosen for it."""
        lookup = sum(w.numel for group in self.groups for w in group if w.lookup)
        return self.numel(expert=False) - lookup, self.numel(expert=True) * self.chosen / max(1, self.experts)

    @cached_property
    def heads(self) -> tuple[int, int, int, int]:
        """Attention: query heads, key-value heads, and the sizes of a head's key and value."""
        v = self.values
        heads = v["num_attention_heads"]
        if v.get("kv_lora_rank"):
            return heads, heads, v["qk_nope_head_dim"] + v["qk_rope_head_dim"], v["v_head_dim"]
        size = v.get("head_dim") or v["hidden_size"] // heads
        return heads, v.get("num_key_value_heads") or heads, size, size


def model_of(config: PreTrainedConfig) -> Model:
    """Count the parameters of a causal language model as Transformers builds it; a reward model has a head of one row
    less its logits, which is left out of account."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tied = bool(model.all_tied_weights_keys)
    layers = {f"{name}.": index for index, layer in enumerate(model.base_model.layers, 1)
              for name, module in model.named_modules() if module is layer}  # fmt: skip
    groups: list[list[Weight]] = [[] for _ in range(len(layers) + 1)]
    for name, tensor in model.named_parameters():
        index = next((number for prefix, number in layers.items() if name.startswith(prefix)), 0)
        kinds = ".experts." in name and tensor.ndim == 3, bool(WHOLE.search(name)), "embed" in name and not tied
        groups[index].append(Weight(tensor.numel(), tensor.shape[0], *kinds))
    return Model(tuple(map(tuple, groups)), model.config.get_text_config().to_dict())


# -- training ---------------------------------------------------------------------------------------------------------


def sharded(model: Model, train: TrainConfig) -> int:
    """Parameters that the first rank keeps: FSDP splits rows and pads the shares; expert parallelism splits evenly."""
    layout, total = expert_layout(train), 0
    for weight in (w for group in model.groups for w in group):
        if weight.expert and train.expert > 1:
            total += weight.numel // (layout.parallel * layout.shard)
        else:
            total += -(-weight.rows // train.shard) * (weight.numel // weight.rows)
    return total


def gathered(model: Model, train: TrainConfig, micro_batches: int) -> int:
    """Bytes of what FSDP gathers for computing, at most, with a layer's buffers for the collectives: all layers at the
    end of a forward pass, and their summed gradients where several micro-batches add up; with checkpointing two layers."""
    if train.world == 1 and train.dtype == "float32":
        return 0
    sizes = [sum(w.numel // (train.expert if w.expert else 1) for w in group) for group in model.groups]
    item, (root, *layers) = SIZE[train.dtype], sizes
    # Of the largest: what is gathered arrives in a buffer; gradients are reduced from one in float32.
    buffers = max(sizes) * (item + 4)
    if train.activation_checkpointing:
        return item * (root + 2 * max(layers)) + 4 * root + buffers
    held = item * sum(sizes) + buffers
    return held + 4 * sum(sizes) if micro_batches > 1 else held + item * max(sizes)


def layer_activations(model: Model, train: TrainConfig, length: int, device: str) -> tuple[int, int]:
    """Bytes a token that a dense and a routed layer save for their backward pass. length: of the longest sequence."""
    v, b = model.values, SIZE[train.dtype]
    hidden, (heads, kv, qk, value) = v["hidden_size"], model.heads
    norm = 12 if b == 4 else 8  # the input in float32, what it is normalised to, and the output
    attention = heads * (2 * qk + 3 * value) * b
    if v.get("kv_lora_rank"):
        attention += norm * ((v["q_lora_rank"] or 0) + v["kv_lora_rank"])
    elif "qwen3" in v["model_type"]:
        attention += norm * (heads + kv) * qk
    # The mask, as numbers; without a fused kernel (the CPU has none where keys and values differ in size) the weights.
    attention += length * heads * 4 if device == "cpu" and qk != value else length * b
    common = 2 * norm * hidden + attention
    dense = common + 4 * b * (v.get("intermediate_size") or 0)
    if not model.experts:
        return dense, 0
    width = v.get("moe_intermediate_size") or v["intermediate_size"]
    shared = (v.get("n_shared_experts") or 0) * width
    routed = model.chosen * (2 * hidden + 4 * width) * b + 4 * shared * b + 8 * model.experts
    return dense, common + routed + (0 if b == 4 else 4 * hidden)


def activations(model: Model, train: TrainConfig, tokens: int, length: int, device: str) -> int:
    """Bytes that a micro-batch of `tokens` tokens takes for its backward pass, logits aside."""
    dense, routed = layer_activations(model, train, length, device)
    if train.activation_checkpointing:
        each = model.layers * model.values["hidden_size"] * SIZE[train.dtype]
    else:
        each = (model.layers - model.moe_layers) * dense + model.moe_layers * routed
    return tokens * (each + max(dense if model.layers > model.moe_layers else 0, routed))  # one is being computed


def logits(model: Model, train: TrainConfig, tokens: int) -> int:
    """Bytes of the logits of `tokens` tokens, their gradient and the softmax in float32, in chunks."""
    count = tokens * model.values["vocab_size"]
    return 2 * SIZE[train.dtype] * count + 16 * min(count, CHUNK)


# -- rollout ----------------------------------------------------------------------------------------------------------


def engine_weights(model: Model, rollout: RolloutConfig) -> int:
    """Bytes of vLLM's weights on one rank."""
    return sum(map(_engine_group(rollout), model.groups))


def _engine_group(rollout: RolloutConfig) -> Any:
    def size(group: tuple[Weight, ...]) -> int:
        split = {True: rollout.world if rollout.expert else rollout.tensor, False: rollout.tensor}
        return sum(w.numel // (1 if w.whole else split[w.expert]) for w in group) * SIZE[rollout.dtype]

    return size


def cache_per_token(model: Model, rollout: RolloutConfig, device: str) -> int:
    """Bytes of vLLM's KV cache for one token on one rank. With MLA the latent and the rotary key, once for all heads
    and on every rank; else the keys and values of this rank's heads, which vLLM pads to one size."""
    v, item = model.values, SIZE[rollout.dtype]
    if v.get("kv_lora_rank") and (device == "cuda" or rollout.mla):
        return model.layers * (v["kv_lora_rank"] + v["qk_rope_head_dim"]) * item
    _, kv, qk, _ = model.heads
    return model.layers * 2 * max(1, kv // rollout.tensor) * qk * item


def cache(model: Model, rollout: RolloutConfig, cluster: Cluster) -> int:
    """Bytes that vLLM gives its KV cache on one rank: what its share of the device leaves beside weights and work."""
    if cluster.on_cpu:
        return int(rollout.memory * GIB)
    taken = engine_weights(model, rollout) + int(ASSUMED["engine_workspace"] * GIB)
    return max(0, int(rollout.memory * cluster.memory) - taken)


def buckets(model: Model, rollout: RolloutConfig) -> int:
    """Bytes of a hand-over on one device: two buckets that leave, one that arrives, and a layer that is incomplete."""
    return 3 * rollout.bucket_mb * 2**20 + max(map(_engine_group(rollout), model.groups[1:]))


def unused(model: Model) -> Iterator[str]:
    """What the arithmetic does not know of a model."""
    if model.values.get("sliding_window") and model.values.get("use_sliding_window", True):
        yield "sliding windows: the KV cache is counted as if there were none"
