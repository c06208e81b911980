"""Flat buffers of checkpoint-named tensors and parts of them: what leaves the trainer, what the engine must receive."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
import xxhash
from more_itertools import map_reduce
from torch import Tensor

ALIGNMENT = 64  # bytes: a cache line, enough for every vector load, and a line of `device_digests`
LINES = 2**17  # that it works on at a time: what it needs meanwhile stays in a device's cache


class HandoverError(RuntimeError):
    """Weights did not arrive as they left; the message begins with the name of the check that failed."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A block of a checkpoint tensor inside a buffer.

    name, dtype ("float32"), shape: of the whole tensor. start, size: of the block in it, per dimension. offset, nbytes:
    of the block in the buffer, contiguous."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What one buffer of hand-over `version` holds (a tensor at most once), and each piece's digest as it left."""

    version: int
    pieces: tuple[Piece, ...]
    digests: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes, with what aligning the pieces adds."""
        return max((piece.offset + piece.nbytes for piece in self.pieces), default=0)


@dataclass(frozen=True, slots=True)
class Parcel:
    """A manifest and its buffer (uint8 [bytes]); where a device packed it a tensor, of whole lines of ALIGNMENT."""

    manifest: WeightManifest
    buffer: np.ndarray | Tensor


def digest(data: np.ndarray) -> str:
    """Digest of an array's bytes (xxh3, 128 bit): it finds accidents, not forgeries."""
    return xxhash.xxh3_128_hexdigest(data)


def device_digests(buffer: Tensor, pieces: Sequence[Piece]) -> dict[str, str]:
    """Digest of each piece's lines, computed where they lie: every 4 bytes times an odd number of their own, summed mod
    2^64 (multilinear hashing, arXiv:1202.4961), in a line and then over lines; so the place in the buffer counts."""
    words = buffer.view(torch.int32).view(-1, ALIGNMENT // 4)
    sums = torch.zeros(len(words) + 1, dtype=torch.int64, device=buffer.device)
    for first in range(0, len(words), LINES):
        part = words[first : first + LINES]
        in_lines = (part * _odd(-words.shape[1], words.shape[1], buffer.device)).sum(1)
        sums[first + 1 : first + 1 + len(part)] = in_lines * _odd(first, len(part), buffer.device)
    sums.cumsum_(0)
    lines = [(piece.offset // ALIGNMENT, -(-(piece.offset + piece.nbytes) // ALIGNMENT)) for piece in pieces]
    found = sums[torch.tensor(lines, device=buffer.device)].diff()[:, 0].tolist()
    return {piece.name: str(value) for piece, value in zip(pieces, found, strict=True)}


def _odd(first: int, count: int, device: torch.device) -> Tensor:
    """Odd 64-bit numbers that look random, the same on every device: int64 [count]."""
    mixed = torch.arange(first, first + count, device=device) * -7046029254386353131
    return (mixed ^ (mixed >> 29)) * -4658895280553007687 | 1


def piece_view(buffer: np.ndarray | Tensor, piece: Piece) -> Tensor:
    """A piece as a tensor of its own size: nothing is copied."""
    flat = torch.as_tensor(buffer[piece.offset : piece.offset + piece.nbytes])
    return flat.view(TORCH_DTYPES[piece.dtype]).view(piece.size)


def whole_tensors(parcels: Sequence[Parcel]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of which the parcels hold a piece, joined from all its pieces; one of a single piece is not copied.
    Raises HandoverError with the name of the check that failed: duplicate, digest, shards."""
    every = ((piece, parcel) for parcel in parcels for piece in parcel.manifest.pieces)
    arrived = {id(p): device_digests(p.buffer, p.manifest.pieces) for p in parcels if isinstance(p.buffer, Tensor)}
    for name, found in map_reduce(every, lambda pair: pair[0].name).items():
        if len({piece.start for piece, _ in found}) < len(found):
            raise HandoverError(f"duplicate: a piece of tensor {name} arrived twice")
        for piece, parcel in found:
            known, span = arrived.get(id(parcel)), slice(piece.offset, piece.offset + piece.nbytes)
            if (known[name] if known else digest(parcel.buffer[span])) != parcel.manifest.digests[name]:
                raise HandoverError(f"digest: tensor {name} differs from what left the trainer")
        first = found[0][0]
        count, needed = sum(prod(piece.size) for piece, _ in found), prod(first.shape)
        if count != needed:
            raise HandoverError(f"shards: of tensor {name} only {count:,} of {needed:,} elements arrived")
        whole = piece_view(found[0][1].buffer, first)
        if len(found) > 1:
            whole = torch.empty(first.shape, dtype=whole.dtype, device=whole.device)
            for piece, parcel in found:
                block = tuple(slice(start, start + size) for start, size in zip(piece.start, piece.size, strict=True))
                whole[block] = piece_view(parcel.buffer, piece)
        yield name, whole


TORCH_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def canary_error(engine: Sequence[Mapping[int, float]], trainer: np.ndarray, *, median: bool = False) -> float:
    """Largest difference between the engine's log-probabilities of each prompt's next token and the trainer's [N, V].

    median: of the prompts, and not the largest of them: low precision sends a token of some prompt to other experts,
    which is 2 nats off and no fault (seen in bfloat16), while wrong weights show in every prompt.
    Infinite where either is NaN: a difference that is no number must not pass as a small one."""
    pairs = zip(engine, trainer, strict=True)
    largest = [np.max([abs(value - row[token]) for token, value in top.items()]) for top, row in pairs]
    found = [np.nan_to_num(value, nan=np.inf) for value in largest]
    return float(np.median(found) if median else max(found))
