"""One flat buffer of checkpoint-named tensors: what leaves the trainer and what the engine must receive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import xxhash


class HandoverError(RuntimeError):
    """Weights did not arrive as they left; the message begins with the name of the check that failed."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor inside the buffer: checkpoint name, dtype ("float32"), shape, offset and size in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class WeightManifest:
    """What the buffer of one hand-over holds, and the digest of every tensor's bytes as they left."""

    version: int
    tensors: tuple[TensorSpec, ...]
    digests: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Size of the buffer in bytes, with what aligning the tensors adds."""
        return max((spec.offset + spec.nbytes for spec in self.tensors), default=0)


def digest(data: np.ndarray) -> str:
    """Digest of an array's bytes (xxh3, 128 bit): it finds accidents, not forgeries."""
    return xxhash.xxh3_128_hexdigest(data)


def tensor_views(buffer: np.ndarray, tensors: tuple[TensorSpec, ...]) -> Iterator[tuple[TensorSpec, torch.Tensor]]:
    """Each tensor of the buffer (uint8 [bytes]) as a view: nothing is copied."""
    flat = torch.from_numpy(buffer)
    for spec in tensors:
        view = flat[spec.offset : spec.offset + spec.nbytes].view(TORCH_DTYPES[spec.dtype]).view(spec.shape)
        yield spec, view


TORCH_DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def canary_error(engine: Sequence[Mapping[int, float]], trainer: np.ndarray, *, median: bool = False) -> float:
    """Largest difference between the engine's log-probabilities of each prompt's next token and the trainer's [N, V].

    median: of the prompts, and not the largest of them: low precision sends a token of some prompt to other experts,
    which is 2 nats off and no fault (seen in bfloat16), while wrong weights show in every prompt.
    Infinite where either is NaN: a difference that is no number must not pass as a small one.
    """
    pairs = zip(engine, trainer, strict=True)
    largest = [np.max([abs(value - row[token]) for token, value in top.items()]) for top, row in pairs]
    found = [np.nan_to_num(value, nan=np.inf) for value in largest]
    return float(np.median(found) if median else max(found))
