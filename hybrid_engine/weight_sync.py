"""From sharded training parameters to one flat buffer under checkpoint names: what a hand-over sends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rollout.weights import TORCH_DTYPES, TensorSpec, WeightManifest, digest, tensor_views

ALIGNMENT = 64  # bytes: a cache line, and enough for every vector load


@dataclass(frozen=True, slots=True)
class View:
    """A checkpoint tensor as a strided view of one training tensor; offset and stride in elements."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class WeightPacker:
    """Packs a model's weights into one buffer, again and again; made once per model, after `shard_model`.

    Names and bytes are those of `save_pretrained` (a layer's fused experts [E, 2I, H] become one tensor per expert
    and projection, tied weights appear once). Floating-point parameters are converted to `dtype`; buffers (a
    router's correction bias) keep theirs, because models that have such buffers compute with them in float32.

    Every pack overwrites the buffer of the one before. Raises ValueError when a checkpoint tensor is no view of one
    training tensor (then the model's layout differs from its checkpoint's by more than splitting and transposing).
    """

    def __init__(self, model: PreTrainedModel, dtype: Literal["float32", "bfloat16"]) -> None:
        tied = model.all_tied_weights_keys
        # FSDP exchanges a module's parameters around its forward. A state dict made now holds the sharded ones, which
        # stay the same objects for good.
        self._sources = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in tied}
        self._dtypes = {
            n: TORCH_DTYPES[dtype] if isinstance(t, torch.nn.Parameter) else t.dtype for n, t in self._sources.items()
        }
        self._views = checkpoint_views(model, self._sources)
        self._tensors = tuple(self._layout())
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        nbytes = max((s.offset + s.nbytes for s in self._tensors), default=0) if self._rank == 0 else 0
        self._buffer = np.zeros(nbytes, np.uint8)
        self._targets = tuple(tensor_views(self._buffer, self._tensors)) if self._rank == 0 else ()

    @torch.no_grad()
    def pack(self, version: int) -> tuple[WeightManifest, np.ndarray] | None:
        """The weights as they are now: the manifest (`version`, digests) and the uint8 buffer; None but on rank 0.

        A collective: with sharded parameters every rank calls it, and gathers one parameter after the other.
        """
        if self._rank != 0:
            for _ in self._full_tensors():
                pass
            return None
        targets = iter(self._targets)
        digests: dict[str, str] = {}
        for name, full in self._full_tensors():
            for view in self._views[name]:
                spec, target = next(targets)
                target.copy_(full.as_strided(view.shape, view.stride, full.storage_offset() + view.offset))
                # Here and not afterwards: the bytes are still in the cache.
                digests[spec.name] = digest(self._buffer[spec.offset : spec.offset + spec.nbytes])
        return WeightManifest(version, self._tensors, digests), self._buffer

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, source in self._sources.items():
            tensor = source.detach()
            if isinstance(tensor, DTensor):
                tensor = tensor.to(self._dtypes[name]).full_tensor()
            yield name, tensor.contiguous()

    def _layout(self) -> Iterator[TensorSpec]:
        names = {torch_dtype: name for name, torch_dtype in TORCH_DTYPES.items()}
        offset = 0
        for source in self._sources:
            dtype = self._dtypes[source]
            if dtype not in names:
                raise ValueError(f"{source} is {dtype}: only {', '.join(TORCH_DTYPES)} can be handed over")
            for view in self._views[source]:
                nbytes = prod(view.shape) * dtype.itemsize
                yield TensorSpec(view.name, names[dtype], view.shape, offset, nbytes)
                offset += -(-nbytes // ALIGNMENT) * ALIGNMENT


def checkpoint_views(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[View, ...]]:
    """For each training tensor, the tensors that `save_pretrained` makes of it, as views; no data is touched.

    Transformers' own conversion runs over tensors without data, and where it would copy one it goes on with the
    original: offset and strides of what comes out then say which elements each checkpoint tensor consists of.
    Raises ValueError when a checkpoint tensor is made in another way (two tensors joined, say).
    """
    with torch.no_grad(), _NoCopies():
        stand_ins = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
        owners = {tensor.untyped_storage()._cdata: name for name, tensor in stand_ins.items()}
        converted = revert_weight_conversion(model, stand_ins)
        views: dict[str, list[View]] = {name: [] for name in tensors}
        for name, tensor in converted.items():
            owner = owners.get(tensor.untyped_storage()._cdata)
            if owner is None:
                raise ValueError(
                    f"{type(model).__name__}: checkpoint tensor {name} is not a view of a single training tensor, "
                    "so this model's weights cannot be handed over; choose another model family"
                )
            views[owner].append(View(name, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()))
    covered = {name: sum(prod(view.shape) for view in parts) for name, parts in views.items()}
    missing = [name for name, tensor in tensors.items() if covered[name] != tensor.numel()]
    assert not missing, f"the conversion to checkpoint names lost parts of {missing}"
    return {name: tuple(sorted(parts, key=lambda view: view.offset)) for name, parts in views.items()}


class _NoCopies(TorchDispatchMode):
    """`clone` returns the tensor itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))
