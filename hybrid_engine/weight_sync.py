"""The hand-over's plan: which piece of which training shard goes to which rollout rank, in buckets, and its packing."""

import re
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from more_itertools import constrained_batches
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from hybrid_engine.views import View, checkpoint_views, intersect, local_block
from rollout.config import RolloutConfig, routed_experts
from rollout.weights import ALIGNMENT, TORCH_DTYPES, Parcel, Piece, WeightManifest, device_digests, digest, piece_view

MEBIBYTE = 2**20
EXPERT = re.compile(r"\.experts\.(\d+)\.")
Receiver = int | None  # the rank of every rollout engine that takes a parcel; None: all of them do


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
    training tensor (then the model's layout differs from its checkpoint's by more than splitting and transposing).
    """

    def __init__(self, model: PreTrainedModel, rollout: RolloutConfig) -> None:
        tied = model.all_tied_weights_keys
        # FSDP exchanges a module's parameters around its forward. A state dict made now holds the sharded ones, which
        # stay the same objects for good.
        self._sources = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in tied}
        plan: list[tuple[str, View, str]] = []
        for name, views in checkpoint_views(model, self._sources).items():
            source = self._sources[name]
            dtype = rollout.dtype if isinstance(source, torch.nn.Parameter) else str(source.dtype)[6:]
            plan += [(name, view, dtype) for view in views]
        experts = routed_experts(model.config.get_text_config().to_dict())
        self._buckets: list[dict[Receiver, list[Move]]] = []
        for tensors in constrained_batches(plan, rollout.bucket_mb * MEBIBYTE, get_len=_nbytes, strict=False):
            bucket: dict[Receiver, list[Move]] = {}
            for name, view, dtype in tensors:
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


def _nbytes(planned: tuple[str, View, str]) -> int:
    return prod(planned[1].shape) * TORCH_DTYPES[planned[2]].itemsize


def _end(moves: list[Move]) -> int:
    """Where the next piece begins."""
    return -(-(moves[-1].piece.offset + moves[-1].piece.nbytes) // ALIGNMENT) * ALIGNMENT if moves else 0


def _sends(tensor: Any) -> bool:
    """Whether this rank is the first of those that hold the same part of a tensor."""
    if not isinstance(tensor, DTensor):
        return not dist.is_initialized() or dist.get_rank() == 0
    coordinates = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(place == 0 for place, placement in coordinates if placement.is_replicate())
