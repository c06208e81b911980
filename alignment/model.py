"""Load or initialise a model (DeepSeek-V2's presets) and its tokenizer, and write them as a Transformers directory."""

import copy
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from more_itertools import always_iterable
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from alignment.config import InitConfig, ModelConfig
from alignment.metrics import atomic_directory

PAD, END, START = "<|pad|>", "<|end|>", "<|start|>"
CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja")
PRESETS = Path(__file__).with_name("presets.yaml")
disable_progress_bar()  # its bars for every load and save would tear the stage's own display


def model_source(config: ModelConfig, base_dir: Path) -> str | None:
    """The directory (made absolute) or hub name to load from; None for a model from scratch. Raises `ValueError` when a
    directory does not exist."""
    if config.path is None:
        return None
    path = base_dir / Path(config.path).expanduser()
    if path.is_dir():
        return str(path.resolve())
    if path.is_file() or config.path.startswith((".", "~", "/")) or config.path.count("/") > 1:
        raise ValueError(f"model.path: {path} is not a directory")
    return config.path


def _read(kind: Any, source: str, problem: str) -> Any:
    try:
        return kind.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ValueError(f"{problem} in {source}: {error}") from error


def preset_config(init: InitConfig, tokenizer: transformers.PreTrainedTokenizerFast) -> transformers.DeepseekV2Config:
    """The configuration of a preset. The nano model's vocabulary is the tokenizer's, the others' the paper's."""
    dimensions = yaml.safe_load(PRESETS.read_text(encoding="utf-8"))[init.preset]
    tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return transformers.DeepseekV2Config(**{"vocab_size": len(tokenizer)} | dimensions | tokens, norm_topk_prob=False)


def train_tokenizer(init: InitConfig, texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
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
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )


def load_tokenizer(config: ModelConfig, base_dir: Path, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer of `model.path`, or one trained on `texts` (`model.init`), always with an end and a pad token.
    Raises `ValueError` naming the path when it cannot be loaded or has no end token."""
    source = model_source(config, base_dir)
    if source is None:
        tokenizer = train_tokenizer(config.init, texts)
    else:
        tokenizer = _read(AutoTokenizer, source, "model.path: no tokenizer")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: the tokenizer in {source} has no end token (`eos_token`); set one")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        template = base_dir / Path(config.chat_template).expanduser()
        if not template.is_file():
            raise ValueError(f"model.chat_template: no such file: {template}")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def model_config(config: ModelConfig, tokenizer: PreTrainedTokenizerBase, base_dir: Path) -> PreTrainedConfig:
    """The Transformers configuration of `model.path` or of the preset. Raises `ValueError` for a path without a causal
    language model, for a tokenizer with more entries than the model, and for `norm_topk_prob` on DeepSeek-V2, which
    Transformers ignores and vLLM honours."""
    source, where = model_source(config, base_dir), "model.init"
    if source is None:
        result = preset_config(config.init, tokenizer)
    else:
        result, where = _read(AutoConfig, source, "model.path: no model"), source
    if result.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"{where}: `{result.model_type}` is not a causal language model that Transformers knows")
    if result.model_type == "deepseek_v2" and result.norm_topk_prob:
        raise ValueError(
            f"{where}: norm_topk_prob=True is ignored by Transformers' DeepSeek-V2 and honoured by vLLM, so that "
            "trainer and rollouts would disagree; set it to false in config.json if the weights were trained without it"
        )
    vocab_size = result.get_text_config().vocab_size
    if len(tokenizer) > vocab_size:
        raise ValueError(f"{where}: the tokenizer has {len(tokenizer)} entries, the model only {vocab_size}")
    return result


def build_model(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """The float32 model with weights initialised from `seed` (the same seed, the same weights), in `eval` mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_reward_model(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Give a causal LM one score in place of its next-token logits, on the device that it is on (`meta` included).
    Returns the new weight [1, H] by its name, with spread 1 / sqrt(H + 1) (Stiennon et al. 2020, appendix C). The
    configuration must say `tie_word_embeddings=False` from the start."""
    name, width = _head(model), model.config.get_text_config().hidden_size
    model.set_output_embeddings(torch.nn.Linear(width, 1, bias=False, device=model.device, dtype=torch.float32))
    weight = torch.empty(1, width).normal_(0, (width + 1) ** -0.5, generator=torch.Generator().manual_seed(seed))
    return {name: weight}


def as_classifier(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Tensor]
) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The empty `AutoModelForSequenceClassification`, and its tensors, that a reward model is saved as."""
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    with torch.device("meta"):
        shell = transformers.AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return shell, {"score.weight" if key == _head(model) else key: tensor for key, tensor in state.items()}


def check_classifier(path: str, base_dir: Path) -> str:
    """Where the sequence classifier in `path` (read from `base_dir`) or on the hub lies, if it gives one score. Raises
    ValueError where there is none, or it has several outputs."""
    source = model_source(ModelConfig(path=path), base_dir)
    config = _read(AutoConfig, source, "no model")
    kinds = config.architectures or ["of an unknown kind"]
    if config.num_labels != 1 or "SequenceClassification" not in kinds[0]:
        raise ValueError(
            f"{source} is {kinds[0]}, {config.num_labels} outputs; a reward is a sequence classifier with one "
            "(`num_labels: 1`)"
        )
    return source


def _head(model: PreTrainedModel) -> str:
    """Name of the output layer's weight."""
    head = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def save_model_dir(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out_dir: Path, state: Mapping[str, Tensor] | None = None
) -> None:
    """Write a directory that `AutoModelForCausalLM.from_pretrained` and `vllm.LLM` load as it is.

    state: full tensors under the names of `model.state_dict()`, where `model` itself is sharded or empty; default: the
    model's own. On disk every expert has its own tensors, as in DeepSeek's checkpoints. The directory appears whole or
    not at all."""
    if model.can_generate():  # not a reward model
        ends = list(always_iterable(model.generation_config.eos_token_id))
        if tokenizer.eos_token_id not in ends:
            model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    with atomic_directory(out_dir) as folder:
        model.save_pretrained(folder, state_dict=None if state is None else dict(state))
        tokenizer.save_pretrained(folder)
