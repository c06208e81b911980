"""Tiny model directories for tests: a DeepSeek-V2 with the true latent (512 + 64) and a Qwen3-MoE without MLA."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)

from rollout.weights import Parcel, Piece, WeightManifest, digest

VOCAB_SIZE = 330
"""More than the tokenizer's, and no multiple of 64: entries that no text uses, and padding inside vLLM."""


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 300 entries with an end and a padding token, trained on a few lines of arithmetic."""
    bpe = ByteLevelBPETokenizer()
    lines = [f"What is {a} plus {b}? The answer is {a + b}.\n" for a in range(40) for b in range(40)]
    bpe.train_from_iterator(lines, vocab_size=300, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>")


def deepseek_config() -> DeepseekV2Config:
    """1.2M parameters: three layers, the first dense, eight routed experts and a shared one."""
    return DeepseekV2Config(
        vocab_size=VOCAB_SIZE, hidden_size=128, intermediate_size=256, moe_intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=8, num_experts_per_tok=2,
        first_k_dense_replace=1, kv_lora_rank=512, q_lora_rank=None, qk_rope_head_dim=64, qk_nope_head_dim=32,
        v_head_dim=32, topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=False,
        max_position_embeddings=512, eos_token_id=1, bos_token_id=None, pad_token_id=0, initializer_range=0.1,
        tie_word_embeddings=False,
    )  # fmt: skip


def qwen3_moe_config() -> Qwen3MoeConfig:
    """A model without MLA: grouped-query attention, two layers, eight experts, output tied to the embedding."""
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE, hidden_size=64, intermediate_size=128, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=512, eos_token_id=1, bos_token_id=None, pad_token_id=0,
        initializer_range=0.1, tie_word_embeddings=True,
    )  # fmt: skip


CONFIGS = {"deepseek": deepseek_config, "qwen3_moe": qwen3_moe_config}


@functools.cache
def model_dir(family: str) -> Path:
    """A Transformers directory (float32 weights, tokenizer) of `deepseek` or `qwen3_moe`, made once per process."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{family}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    random_model(CONFIGS[family](), seed=0).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A float32 model with every parameter random, norms and biases included."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def pack(model: PreTrainedModel, version: int) -> list[Parcel]:
    """The tensors that `save_pretrained` writes, under their names, whole, in one flat buffer (uint8) with manifest."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name).contiguous() for name in file.keys()}  # noqa: SIM118
    pieces, parts, offset = [], [], 0
    for name, tensor in tensors.items():
        data = tensor.reshape(-1).view(torch.uint8).numpy()
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        pieces.append(Piece(name, dtype, shape, (0,) * len(shape), shape, offset, data.nbytes))
        parts.append(data)
        offset += data.nbytes
    digests = {piece.name: digest(part) for piece, part in zip(pieces, parts, strict=True)}
    return [Parcel(WeightManifest(version, tuple(pieces), digests), np.concatenate(parts))]
