"""The digest that a device computes of what it packed, here on the host's tensors: every accident shows in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from ranks import tiny_model

from hybrid_engine.weight_sync import WeightPacker
from rollout.config import RolloutConfig
from rollout.weights import ALIGNMENT, HandoverError, Parcel, Piece, WeightManifest, device_digests, whole_tensors


def odd(number: int) -> int:
    mixed = number * 0x9E3779B97F4A7C15 % 2**64
    mixed ^= (mixed - 2**64 * (mixed >> 63)) >> 29  # as a signed number's
    return mixed % 2**64 * 0xBF58476D1CE4E5B9 % 2**64 | 1


def by_hand(buffer: torch.Tensor, piece: Piece) -> str:
    words, total = np.frombuffer(buffer.numpy().tobytes(), np.int32), 0
    for place in range(piece.offset // 4, -(-(piece.offset + piece.nbytes) // ALIGNMENT) * ALIGNMENT // 4):
        line, column = divmod(place, 16)
        total += int(words[place]) * odd(column - 16) * odd(line)
    return str((total + 2**63) % 2**64 - 2**63)


@pytest.fixture
def packed() -> Iterator[tuple[torch.Tensor, tuple[Piece, ...], dict[str, str]]]:
    """A buffer of a DeepSeek's weights in bfloat16, its pieces, their digests."""
    packer = WeightPacker(tiny_model("deepseek-v2"), RolloutConfig(dtype="bfloat16"))
    manifest = (parcel := packer.pack(1, 0, torch.zeros(packer.nbytes, dtype=torch.uint8))[None]).manifest
    yield parcel.buffer, manifest.pieces, dict(manifest.digests)


def test_a_device_packs_the_bytes_that_the_host_packs(packed) -> None:
    host = WeightPacker(tiny_model("deepseek-v2"), RolloutConfig(dtype="bfloat16")).pack(1)[None]
    assert (
        host.manifest.pieces == packed[1] and host.buffer.tobytes() == packed[0].numpy().tobytes()[: len(host.buffer)]
    )


def test_device_digest_is_the_sum_by_hand(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    buffer, pieces, digests = packed
    assert all(digests[piece.name] == by_hand(buffer, piece) for piece in pieces[:: len(pieces) // 8])
    monkeypatch.setattr("rollout.weights.LINES", 7)
    assert device_digests(buffer, pieces) == digests, "however many lines are taken at a time"


def test_device_digest_finds_every_flipped_bit() -> None:
    buffer = torch.randint(256, (4 * ALIGNMENT,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pieces = [Piece(name, "bfloat16", (50,), (0,), (50,), offset, 100) for name, offset in (("a", 0), ("b", 128))]
    digests = device_digests(buffer, pieces)
    for name, bit in product("ab", range(800)):
        changed = buffer.clone()
        changed[(128 if name == "b" else 0) + bit // 8] ^= 1 << bit % 8
        assert {n for n, found in device_digests(changed, pieces).items() if found != digests[n]} == {name}


def test_device_digest_finds_swapped_parts_and_exchanged_experts(packed) -> None:
    buffer, pieces, digests = packed
    named = {piece.name: piece for piece in pieces}
    expert = named["model.layers.1.mlp.experts.0.down_proj.weight"]
    one, other = (slice(p.offset, p.offset + p.nbytes) for p in (expert, named[expert.name.replace("ts.0", "ts.1")]))
    for size in (4, 16, 32, 64, 1024, expert.nbytes // 2):  # a word of a line, lines, halves
        changed, start = buffer.clone(), one.start
        changed[start : start + 2 * size] = torch.cat(
            [buffer[start + size : start + 2 * size], buffer[start : start + size]]
        )
        assert device_digests(changed, pieces)[expert.name] != digests[expert.name], size
    changed = buffer.clone()
    changed[one], changed[other] = buffer[other], buffer[one]
    assert sum(found != digests[name] for name, found in device_digests(changed, pieces).items()) == 2
    square = torch.arange(256, dtype=torch.int32).view(16, 16)  # lines and words of a line exchanged
    whole = [Piece("square", "float32", (16, 16), (0, 0), (16, 16), 0, 1024)]
    assert device_digests(square.flatten().view(torch.uint8), whole) != device_digests(
        square.T.flatten().view(torch.uint8), whole
    )


def test_a_stale_bucket_on_a_device_is_refused_by_name(packed) -> None:
    buffer, pieces, digests = packed
    old = buffer.clone()
    old[pieces[3].offset : pieces[3].offset + pieces[3].nbytes] = 0
    with pytest.raises(HandoverError, match=f"^digest: tensor {pieces[3].name} differs"):
        list(whole_tensors([Parcel(WeightManifest(1, pieces, digests), old)]))


def test_shards_on_a_device_make_a_whole() -> None:
    whole, parcels = torch.randn(6, 8), []
    for rows in (slice(0, 2), slice(2, 6)):
        part = whole[rows].contiguous()
        buffer = torch.zeros(-(-part.nbytes // ALIGNMENT) * ALIGNMENT, dtype=torch.uint8)
        buffer[: part.nbytes] = part.flatten().view(torch.uint8)
        piece = Piece("w", "float32", (6, 8), (rows.start, 0), tuple(part.shape), 0, part.nbytes)
        parcels.append(Parcel(WeightManifest(1, (piece,), device_digests(buffer, [piece])), buffer))
    ((name, found),) = whole_tensors(parcels)
    assert name == "w" and torch.equal(found, whole)
    with pytest.raises(HandoverError, match=r"^duplicate: a piece of tensor w arrived twice"):
        list(whole_tensors([parcels[0], dataclasses.replace(parcels[0])]))
