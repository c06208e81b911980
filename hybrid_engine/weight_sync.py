"""Training tensors as a checkpoint's: the views that they are of each other, the blocks that a rank holds of them, and
the hand-over's plan: which piece of which shard goes to which rollout rank, in buckets, and its packing."""

import re
from dataclasses import dataclass
from math import prod
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from more_itertools import constrained_batches
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rollout.config import RolloutConfig, routed_experts
from rollout.weights import ALIGNMENT, TORCH_DTYPES, Parcel, Piece, WeightManifest, device_digests, digest, piece_view

MEBIBYTE = 2**20
EXPERT = re.compile(r"\.experts\.(\d+)\.")
Receiver = int | None  # the rank of every rollout engine that takes a parcel; None: all of them do


@dataclass(frozen=True, slots=True)
class View:
    """A checkpoint tensor as a strided view of one training tensor; offset and stride in elements."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def order(self) -> list[int]:
        """The checkpoint tensor's dimensions in the order that they have in the training tensor."""
        return sorted(range(len(self.shape)), key=lambda axis: -self.stride[axis])


def checkpoint_views(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[View, ...]]:
    """For each training tensor, the tensors that `save_pretrained` makes of it, as views; no data is touched.

    Transformers' own conversion runs over tensors without data, and where it would copy one it goes on with the
    original: offset and strides of what comes out then say which elements each checkpoint tensor consists of.
    Raises ValueError when a checkpoint tensor is made in another way (two tensors joined, say)."""
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
    lost = [name for name, parts in views.items() if sum(prod(v.shape) for v in parts) != tensors[name].numel()]
    assert not lost, f"the conversion to checkpoint names lost parts of {lost}"
    return {name: tuple(sorted(parts, key=lambda view: view.offset)) for name, parts in views.items()}


def local_block(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where in the whole it begins."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.detach().to_local(), offset


def intersect(view: View, tensor: torch.Tensor) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a checkpoint tensor, a `view` of a contiguous `tensor`, meets what this rank holds of that: slices of the
    local block, and slices of the checkpoint tensor; None where they do not meet."""
    shape, (local, offset) = tensor.shape, local_block(tensor)
    rest, block, part = view.offset, [], [slice(None)] * len(view.shape)
    for dim, stride in enumerate(torch.empty(shape, device="meta").stride()):
        first, rest = divmod(rest, stride)
        axes = [axis for axis, size in enumerate(view.shape) if view.stride[axis] == stride and size > 1 < shape[dim]]
        length = view.shape[axes[0]] if axes else 1
        assert len(axes) < 2 and first + length <= shape[dim], f"{view.name} is no block of its training tensor"
        start, end = max(first, offset[dim]), min(first + length, offset[dim] + local.shape[dim])
        if start >= end:
            return None
        block.append(slice(start - offset[dim], end - offset[dim]))
        if axes:
            part[axes[0]] = slice(start - first, end - first)
    return tuple(block), tuple(part)


class _NoCopies(TorchDispatchMode):
    """`clone` returns the tensor itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Move:
    """What this rank copies for a piece: the `block` of its part of training tensor `source`, its dimensions in
    `order`."""

    source: str
    block: tuple[slice, ...]
    order: list[int]
    piece: Piece


class WeightPacker:
    """Packs this rank's part of a model's weights, bucket by bucket, again and again; made once per model, after
    `shard_model`. No rank needs another for it.

    Names and bytes are those of `save_pretrained` (a layer's fused experts [E, 2I, H] become one tensor per expert
    and projection, tied weights appear once). Floating-point parameters are converted to the rollout's dtype; buffers
    (a router's correction bias) keep theirs, because models that have such buffers compute with them in float32.
    Of ranks that hold the same, the first sends it. With expert parallelism in the rollout an expert goes only to the
    rank that holds it.
    `buckets`: their number, the same on every rank; `nbytes`: what the largest takes. Every pack overwrites the buffers
    of the one before, unless it gets a `room` of its own. Raises ValueError when a checkpoint tensor is no view of one
    training tensor (then the model's layout differs from its checkpoint's by more than splitting and transposing)."""

    def __init__(self, model: PreTrainedModel, rollout: RolloutConfig) -> None:
        tied = model.all_tied_weights_keys
        # FSDP exchanges a module's parameters around its forward. A state dict made now holds the sharded ones, which
        # stay the same objects for good.
        self._sources = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in tied}
        plan: list[tuple[int, str, View, str]] = []
        for name, views in checkpoint_views(model, self._sources).items():
            source = self._sources[name]
            dtype = rollout.dtype if isinstance(source, torch.nn.Parameter) else str(source.dtype)[6:]
            plan += [(prod(view.shape) * TORCH_DTYPES[dtype].itemsize, name, view, dtype) for view in views]
        experts = routed_experts(model.config.get_text_config().to_dict())
        self._buckets: list[dict[Receiver, list[Move]]] = []
        for tensors in constrained_batches(plan, rollout.bucket_mb * MEBIBYTE, get_len=itemgetter(0), strict=False):
            bucket: dict[Receiver, list[Move]] = {}
            for _, name, view, dtype in tensors:
                expert = EXPERT.search(view.name) if rollout.expert else None
                receiver = int(expert[1]) * rollout.world // experts if expert else None  # as vLLM lays them
                move = self._move(name, view, dtype, _end(bucket.get(receiver, [])))
                if move is not None:
                    bucket.setdefault(receiver, []).append(move)
            self._buckets.append(bucket)
        self.buckets = len(self._buckets)
        self.nbytes = max(sum(map(_end, bucket.values())) for bucket in self._buckets)
        self._buffer = np.zeros(self.nbytes, np.uint8)  # where nothing is written, it takes no memory

    @torch.no_grad()
    def pack(self, version: int, bucket: int = 0, room: torch.Tensor | None = None) -> dict[Receiver, Parcel]:
        """This rank's parcels of a bucket, with the weights as they are now. room: device memory, uint8 [nbytes]."""
        buffer = self._buffer if room is None else room
        blocks = {name: local_block(tensor)[0] for name, tensor in self._sources.items()}
        parcels, start = {}, 0
        for receiver, moves in self._buckets[bucket].items():
            parcels[receiver] = _fill(buffer[start : start + _end(moves)], version, moves, blocks)
            start += _end(moves)
        return parcels

    def _move(self, name: str, view: View, dtype: str, end: int) -> Move | None:
        """How this rank's part of a checkpoint tensor goes to `end` of a buffer; None where it has none to send."""
        overlap = intersect(view, self._sources[name])
        if overlap is None or not _sends(self._sources[name]):
            return None
        block, part = overlap
        bounds = [axis.indices(length) for axis, length in zip(part, view.shape, strict=True)]
        start, size = tuple(b[0] for b in bounds), tuple(b[1] - b[0] for b in bounds)
        nbytes = prod(size) * TORCH_DTYPES[dtype].itemsize
        return Move(name, block, view.order, Piece(view.name, dtype, view.shape, start, size, end, nbytes))


def _fill(room: np.ndarray | torch.Tensor, version: int, moves: list[Move], blocks: dict[str, torch.Tensor]) -> Parcel:
    on_host, digests = isinstance(room, np.ndarray), {}
    for move in moves:
        target = piece_view(room, move.piece).permute(move.order)
        target.copy_(blocks[move.source][move.block].reshape(target.shape))
        if on_host:  # here and not afterwards: the bytes are still in the cache
            digests[move.piece.name] = digest(room[move.piece.offset : move.piece.offset + move.piece.nbytes])
    pieces = tuple(move.piece for move in moves)
    manifest = WeightManifest(version, pieces, digests if on_host else device_digests(room, pieces))
    return Parcel(manifest, room[: manifest.nbytes] if on_host else room)


def _end(moves: list[Move]) -> int:
    """Where the next piece begins."""
    return -(-(moves[-1].piece.offset + moves[-1].piece.nbytes) // ALIGNMENT) * ALIGNMENT if moves else 0


def _sends(tensor: Any) -> bool:
    """Whether this rank is the first of those that hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    coordinates = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(place == 0 for place, placement in coordinates if placement.is_replicate())
