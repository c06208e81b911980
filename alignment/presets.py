"""DeepSeek-V2 configurations, and the tokenizer and chat template of a model from scratch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, PreTrainedTokenizerFast

from alignment.config import InitConfig

PAD, END, START = "<|pad|>", "<|end|>", "<|start|>"
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|start|>' + message['role'] + '\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|end|>' -}}
{%- endif -%}
{{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant\n' -}}{%- endif -%}
"""

PAPER_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
}
PAPER: dict[str, Any] = {
    "vocab_size": 102400,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 163840,
    "rope_parameters": PAPER_YARN,
}
PRESETS: dict[str, dict[str, Any]] = {
    # The latent of 512 + 64 is the paper's because vLLM's MLA kernels accept no other; everything else is small.
    "deepseek-v2-nano": {
        "hidden_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "max_position_embeddings": 8192,
        "initializer_range": 0.05,
    },
    "deepseek-v2-lite": PAPER
    | {
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "q_lora_rank": None,
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
    },
    "deepseek-v2": PAPER
    | {
        "hidden_size": 5120,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "intermediate_size": 12288,
        "moe_intermediate_size": 1536,
        "n_routed_experts": 160,
        "q_lora_rank": 1536,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
    },
}
"""Dimensions of DeepSeek-V2 (arXiv 2405.04434, section 3.1.2 and appendix B), YaRN as in the released checkpoints."""


def preset_config(init: InitConfig, tokenizer: PreTrainedTokenizerFast) -> DeepseekV2Config:
    """The configuration of a preset. The nano model's vocabulary is the tokenizer's, the others' the paper's."""
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in (("eos", END), ("pad", PAD))}
    settings = {"vocab_size": len(tokenizer)} | PRESETS[init.preset]
    return DeepseekV2Config(
        **settings, bos_token_id=None, eos_token_id=tokens["eos"], pad_token_id=tokens["pad"], norm_topk_prob=False
    )


def train_tokenizer(init: InitConfig, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE with at most `init.vocab_size` entries: any text round-trips, every digit is its own token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=init.vocab_size,
        special_tokens=[PAD, END, START],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
