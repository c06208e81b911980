"""DeepSeek-V2 configurations, and the tokenizer and chat template of a model from scratch."""

from collections.abc import Iterable
from pathlib import Path

import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DeepseekV2Config, PreTrainedTokenizerFast

from alignment.config import InitConfig

PAD, END, START = "<|pad|>", "<|end|>", "<|start|>"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
PRESETS = Path(__file__).with_name("presets.yaml")


def preset_config(init: InitConfig, tokenizer: PreTrainedTokenizerFast) -> DeepseekV2Config:
    """The configuration of a preset. The nano model's vocabulary is the tokenizer's, the others' the paper's."""
    dimensions = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))[init.preset]
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return DeepseekV2Config(**{"vocab_size": len(tokenizer)} | dimensions | tokens, norm_topk_prob=False)


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
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )
