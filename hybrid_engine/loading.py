"""A model in the training layout, read from its directory shard by shard: no rank ever holds the whole."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from alignment.attention import TREE_ATTENTION
from alignment.config import TrainConfig
from hybrid_engine.expert_parallel import check_experts
from hybrid_engine.sharding import Meshes, shard_model
from hybrid_engine.weight_sync import View, checkpoint_views

PLAIN = ("F64", "F32", "F16", "BF16")
"""Stored types that hold a weight as it is; the others (fp8, int8) need scales that lie in other tensors."""


def load_model(path: str | Path, train: TrainConfig, meshes: Meshes, device: torch.device) -> PreTrainedModel:
    """The model of a Transformers directory (or hub name) in float32, laid over the ranks, in `eval` mode.

    Its experts run as `grouped_mm`, or as `eager` where torch lacks it: Transformers' choice.
    Raises ValueError for a layout that does not fit the model, and for weights that are missing, of another shape,
    quantised, or not in safetensors.
    """
    config = AutoConfig.from_pretrained(path)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=TREE_ATTENTION)
    check_experts(train, model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    shard_model(
        model.eval(),
        meshes,
        dtype=torch.bfloat16 if train.dtype == "bfloat16" else torch.float32,
        activation_checkpointing=train.activation_checkpointing,
    )
    model.to_empty(device=device)
    model.tie_weights()
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    if cached_file(path, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None:
        model.generation_config = GenerationConfig.from_pretrained(path)
    fill(model, path)
    return model


@torch.no_grad()
def fill(model: PreTrainedModel, path: str | Path) -> None:
    """Read each rank's part of every weight, in place; `model` may be sharded in any way. Raises ValueError."""
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if name not in tied}
    files = checkpoint_files(path)
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in dict.fromkeys(files.values())}
        for name, views in checkpoint_views(model, tensors).items():
            tensor = tensors[name].detach()
            local, offset = tensor, (0,) * tensor.ndim
            if isinstance(tensor, DTensor):
                local = tensor.to_local()
                _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            for view in views:
                if view.name not in files:
                    raise ValueError(f"{path}: weight {view.name} is missing, and maybe others")
                stored = opened[files[view.name]].get_slice(view.name)
                if tuple(stored.get_shape()) != view.shape:
                    raise ValueError(f"{path}: weight {view.name} is {stored.get_shape()}, the model's {view.shape}")
                if stored.get_dtype() not in PLAIN:
                    raise ValueError(
                        f"{path}: weight {view.name} is stored as {stored.get_dtype()}; only {', '.join(PLAIN)} can be "
                        "trained: convert the checkpoint to bfloat16 first"
                    )
                overlap = intersect(view, tensor.shape, offset, local.shape)
                if overlap is not None:
                    block, part = overlap
                    order = sorted(range(len(view.shape)), key=lambda axis: -view.stride[axis])
                    local[block].copy_(stored[part].permute(order).reshape(local[block].shape))


def checkpoint_files(path: str | Path) -> dict[str, str]:
    """Checkpoint tensor -> safetensors file that holds it. Raises ValueError where there is none."""
    index, single = (
        cached_file(path, name, _raise_exceptions_for_missing_entries=False)
        for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME)
    )
    if index is not None:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
        return {name: str(cached_file(path, file)) for name, file in names.items()}
    if single is None:
        raise ValueError(f"{path}: no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: save it as safetensors")
    with safe_open(single, "pt") as file:
        return dict.fromkeys(file.keys(), single)


def intersect(
    view: View, shape: torch.Size, offset: tuple[int, ...], local: torch.Size
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a checkpoint tensor, a `view` of a contiguous tensor of `shape`, meets the block of size `local` at
    `offset`: slices of the block, and slices of the checkpoint tensor; None where they do not meet."""
    rest, block, part = view.offset, [], [slice(None)] * len(view.shape)
    for dim, stride in enumerate(torch.empty(shape, device="meta").stride()):
        first, rest = divmod(rest, stride)
        axes = [axis for axis, size in enumerate(view.shape) if view.stride[axis] == stride and size > 1 < shape[dim]]
        length = view.shape[axes[0]] if axes else 1
        assert len(axes) < 2 and first + length <= shape[dim], f"{view.name} is no block of its training tensor"
        start, end = max(first, offset[dim]), min(first + length, offset[dim] + local[dim])
        if start >= end:
            return None
        block.append(slice(start - offset[dim], end - offset[dim]))
        if axes:
            part[axes[0]] = slice(start - first, end - first)
    return tuple(block), tuple(part)
