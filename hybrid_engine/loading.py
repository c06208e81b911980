"""A model in the training layout, read from its directory shard by shard: no rank ever holds the whole."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from alignment.config import TrainConfig
from alignment.logprobs import TREE_ATTENTION
from alignment.model import make_reward_model
from hybrid_engine.sharding import Meshes, shard_model
from hybrid_engine.weight_sync import View, checkpoint_views, intersect, local_block

PLAIN = ("F64", "F32", "F16", "BF16")
"""Stored types that hold a weight as it is; the others (fp8, int8) need scales that lie in other tensors."""


def load_model(
    path: str | Path, train: TrainConfig, meshes: Meshes, device: torch.device, score_seed: int | None = None
) -> PreTrainedModel:
    """The model of a Transformers directory (or hub name) in float32, laid over the ranks, in `eval` mode. Its experts
    run as `grouped_mm`, or as `eager` where torch lacks it: Transformers' choice.

    score_seed: makes it a reward model, with a new head from this seed. `layout.misfits` comes first. Raises ValueError
    for weights that are missing, of another shape, quantised, or not in safetensors."""
    config, fresh = AutoConfig.from_pretrained(path), {}
    if score_seed is not None:
        config.tie_word_embeddings = False
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=TREE_ATTENTION)
        if score_seed is not None:
            fresh = make_reward_model(model, score_seed)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shard_model(model.eval(), meshes, train)
    model.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path)
    fill(model, path, fresh)
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, path: str | Path, fresh: Mapping[str, torch.Tensor] = {}) -> None:
    """Read each rank's part of every weight, in place; `model` may be sharded in any way. fresh: whole weights that are
    not in the files, by name. Raises ValueError as `load_model`."""
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    with ExitStack() as stack:
        files = {name: file for file in _files(path, stack) for name in file.keys()}  # noqa: SIM118
        for name, views in checkpoint_views(model, tensors).items():
            local, _ = local_block(tensors[name])
            for view in views:
                stored = fresh[view.name] if view.name in fresh else _stored(files, view, path)
                if (overlap := intersect(view, tensors[name])) is not None:
                    block, part = overlap
                    local[block].copy_(stored[part].permute(view.order).reshape(local[block].shape))


def _stored(files: Mapping[str, Any], view: View, path: str | Path) -> Any:
    """The checkpoint tensor of a view, still in its file; ValueError where it is not what the view needs."""
    if view.name not in files:
        raise ValueError(f"{path}: weight {view.name} is missing, and maybe others")
    stored = files[view.name].get_slice(view.name)
    if tuple(stored.get_shape()) != view.shape:
        raise ValueError(f"{path}: weight {view.name} is {stored.get_shape()}, the model's {view.shape}")
    if stored.get_dtype() not in PLAIN:
        raise ValueError(
            f"{path}: weight {view.name} is stored as {stored.get_dtype()}; only {', '.join(PLAIN)} can be "
            "trained: convert the checkpoint to bfloat16 first"
        )
    return stored


def _files(path: str | Path, stack: ExitStack) -> Iterator[Any]:
    """The safetensors files of a directory or hub model, opened. Raises ValueError where there is none."""
    index = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if index is not None:
        names = dict.fromkeys(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    elif cached_file(path, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False) is not None:
        names = {SAFE_WEIGHTS_NAME}
    else:
        raise ValueError(f"{path}: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: save it as safetensors")
    return (stack.enter_context(safe_open(cached_file(path, name), "pt")) for name in names)
