"""Tiny models, and real gloo process groups to try them on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

HEAVY = [
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "transformers.models.deepseek_v2.modeling_deepseek_v2",
]
# An odd vocabulary: its rows do not divide by two ranks.
COMMON = {
    "vocab_size": 101,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
LATENT = {
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "deepseek-v2": DeepseekV2Config(**COMMON, **LATENT, q_lora_rank=None),
    "deepseek-v3": DeepseekV3Config(**COMMON, **LATENT, q_lora_rank=16, n_group=2, topk_group=1),
    "qwen3-moe": Qwen3MoeConfig(**COMMON, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2, head_dim=16),
    "mixtral": MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    "llama-tied": LlamaConfig(**COMMON, tie_word_embeddings=True),
    "llama": LlamaConfig(**COMMON, tie_word_embeddings=False),
}


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32)


def run_ranks(function: Callable[..., None], ranks: int, folder: Path, *args: Any) -> None:
    """Call `function(folder, *args)` in `ranks` fresh processes that form a gloo group; re-raises what they raise."""
    # One server imports the libraries (7 s of CPU time), once for all ranks of all tests, and forks them.
    mp.get_context("forkserver").set_forkserver_preload(HEAVY)
    arguments = (function, ranks, folder, args)
    mp.start_processes(_in_group, args=arguments, nprocs=ranks, start_method="forkserver")


def _in_group(rank: int, function: Callable[..., None], ranks: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks)
    function(folder, *args)
    dist.barrier()
    dist.destroy_process_group()
