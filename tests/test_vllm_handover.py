"""Weights into the live engine: right after every hand-over, and wrong ones are refused by the name of a check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch
from engine_host import CAPABLE, EngineHost, needs_capable_vllm, shared
from transformers import PreTrainedModel

from hybrid_engine.hand_over import canary_prompts
from hybrid_engine.rollout_worker import CANARY_TOP
from rollout.sampler import Request, Sample
from rollout.types import VersionSpan
from rollout.weights import HandoverError, Parcel, Piece, WeightManifest, canary_error, digest

TOLERANCE = 1e-4
TEMPERATURE = 0.7
PROMPTS = [np.random.default_rng(seed).integers(2, tiny.VOCAB_SIZE, 70).astype(np.int32) for seed in range(6)]
"""Longer than two blocks of the prefix cache (32), so that its blocks count."""
MODELS = [("deepseek", False), pytest.param(("deepseek", True), marks=needs_capable_vllm), ("qwen3_moe", False)]


@pytest.fixture(params=MODELS, ids=["deepseek", "deepseek-mla", "qwen3_moe"])
def model(request: pytest.FixtureRequest) -> tuple[str, EngineHost]:
    family, mla = request.param
    return family, shared(family, mla)


def update(engine, parcels, first=True, last=True):
    engine.update_weights(parcels, first=first, last=last)


def generate(engine, requests):
    return [sample for finished in engine.generate(requests) for sample in finished]


def canary(engine, prompts, top):
    return engine.canary(prompts, top)


def canary_of(host: EngineHost, family: str, reference: PreTrainedModel) -> float:
    """The error that the hybrid engine would find, with its prompts, against Transformers' forward."""
    prompts = canary_prompts(tiny.VOCAB_SIZE, 96, 2)
    with torch.no_grad():
        logits = reference(torch.tensor(np.stack(prompts), dtype=torch.long)).logits[:, -1]
    return canary_error(host.call(canary, prompts, CANARY_TOP), logits.log_softmax(-1).numpy())


def token_logprobs(reference: PreTrainedModel, sequences: list[np.ndarray], temperature: float) -> list[np.ndarray]:
    """[T] of each sequence with NaN first, by Transformers' forward; padding stands to the right and is not read."""
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(s, dtype=torch.long) for s in sequences], batch_first=True)
    with torch.no_grad():
        table = (reference(ids).logits[:, :-1] / temperature).log_softmax(-1)
    chosen = table.gather(2, ids[:, 1:, None])[..., 0].numpy()
    return [np.concatenate([[np.nan], row[: len(s) - 1]]) for row, s in zip(chosen, sequences, strict=True)]


def test_logprobs_equal_transformers_after_three_handovers(model: tuple[str, EngineHost]) -> None:
    family, host = model
    requests = [Request(prompt, 12, temperature=TEMPERATURE, seed=seed) for seed, prompt in enumerate(PROMPTS)]
    for version in (1, 2, 3):
        reference = tiny.random_model(tiny.CONFIGS[family](), seed=version)
        host.call(update, tiny.pack(reference, version))
        samples: list[Sample] = host.call(generate, requests)
        assert sorted(sample.index for sample in samples) == list(range(len(requests)))
        sequences = [sample.trajectory.token_ids for sample in samples]
        scores = host.call(lambda engine, given: engine.score(given), sequences)
        for score, given in zip(scores, token_logprobs(reference, sequences, 1.0), strict=True):
            np.testing.assert_allclose(score.logprobs, given, atol=TOLERANCE, rtol=0)
        for sample, sampled in zip(samples, token_logprobs(reference, sequences, TEMPERATURE), strict=True):
            trajectory = sample.trajectory
            expected = np.where(trajectory.loss_mask, sampled, np.nan)
            np.testing.assert_allclose(trajectory.logprobs, expected, atol=TOLERANCE, rtol=0)
            assert trajectory.version_spans == (VersionSpan(version, 70, len(trajectory.token_ids)),)
        assert canary_of(host, family, reference) < TOLERANCE


@pytest.fixture
def planted(model: tuple[str, EngineHost]) -> Iterator[tuple[str, EngineHost]]:
    """The engine, whose workarounds may be taken away; they are back, and its weights right, afterwards."""
    yield model
    family, host = model
    host.call(_restore)
    reference = tiny.random_model(tiny.CONFIGS[family](), seed=9)
    host.call(update, tiny.pack(reference, 9))
    assert canary_of(host, family, reference) < TOLERANCE


def _take_away(engine, name):
    from rollout.vllm import faults

    setattr(faults, name, lambda *args: None)


def _restore(engine):
    import importlib

    from rollout.vllm import faults

    importlib.reload(faults)


def hand_over_twice(host: EngineHost, family: str, fault: str) -> float:
    """Canary's error after a second hand-over that was made with `fault` planted."""
    first, second = (tiny.random_model(tiny.CONFIGS[family](), seed=seed) for seed in (4, 5))
    host.call(update, tiny.pack(first, 4))
    assert canary_of(host, family, first) < TOLERANCE
    host.call(_take_away, fault)
    host.call(update, tiny.pack(second, 5))
    return canary_of(host, family, second)


@needs_capable_vllm
def test_experts_that_are_not_packed_again_show_in_the_canary(planted: tuple[str, EngineHost]) -> None:
    assert hand_over_twice(planted[1], planted[0], "repack_experts") > 100 * TOLERANCE


def test_a_tied_output_that_is_not_packed_again_shows_in_the_canary() -> None:
    host = shared("qwen3_moe", False)
    try:
        assert hand_over_twice(host, "qwen3_moe", "repack_tied_head") > 100 * TOLERANCE
    finally:
        host.call(_restore)


def test_stale_prefixes_show_in_the_canary(planted: tuple[str, EngineHost]) -> None:
    family, host = planted
    error = hand_over_twice(host, family, "forget_prefixes")
    if CAPABLE and host is shared("deepseek", True):
        assert error < TOLERANCE  # MLA on the CPU has no prefix cache: nothing to go stale.
    else:
        assert error > 100 * TOLERANCE


def without(parcel: Parcel, name: str) -> Parcel:
    pieces = tuple(piece for piece in parcel.manifest.pieces if piece.name != name)
    return Parcel(dataclasses.replace(parcel.manifest, pieces=pieces), parcel.buffer)


def _complaints(engine, parcels):
    """What the engine says of each incomplete parcel."""
    said = []
    for parcel in parcels:
        try:
            engine.update_weights([parcel])
            said.append(None)
        except HandoverError as error:
            said.append(str(error))
    return said


def test_every_missing_tensor_is_found_by_the_coverage_check(planted: tuple[str, EngineHost]) -> None:
    family, host = planted
    (parcel,) = tiny.pack(tiny.random_model(tiny.CONFIGS[family](), seed=6), 6)
    names = [piece.name for piece in parcel.manifest.pieces]
    said = host.call(_complaints, [without(parcel, name) for name in names])
    for name, complaint in zip(names, said, strict=True):
        assert complaint is not None, f"nobody missed {name}"
        assert complaint.startswith("coverage: parameter "), (name, complaint)


def test_a_tensor_of_the_step_before_is_found_by_its_digest(planted: tuple[str, EngineHost]) -> None:
    family, host = planted
    (old,), (new,) = (tiny.pack(tiny.random_model(tiny.CONFIGS[family](), seed=version), version) for version in (6, 7))
    piece = new.manifest.pieces[len(new.manifest.pieces) // 2]
    bytes_of_it = slice(piece.offset, piece.offset + piece.nbytes)
    new.buffer[bytes_of_it] = old.buffer[bytes_of_it]
    with pytest.raises(HandoverError, match=f"^digest: tensor {piece.name} differs"):
        host.call(update, [new])
    with pytest.raises(RuntimeError, match="holds no weights"):
        host.call(generate, [Request(PROMPTS[0], 4)])


def shards(model: PreTrainedModel, version: int) -> list[Parcel]:
    """As two ranks send them: each half the rows of what has two dimensions, and the others by turns."""
    (whole,) = tiny.pack(model, version)
    parts: list[list[tuple[Piece, np.ndarray]]] = [[], []]
    for index, piece in enumerate(whole.manifest.pieces):
        data = whole.buffer[piece.offset : piece.offset + piece.nbytes]
        if len(piece.shape) < 2:
            parts[index % 2].append((piece, data))
            continue
        cut, width = piece.shape[0] // 2, piece.nbytes // piece.shape[0]
        for part, (first, end) in zip(parts, ((0, cut), (cut, piece.shape[0])), strict=True):
            block = {"start": (first, *piece.start[1:]), "size": (end - first, *piece.size[1:])}
            part.append((dataclasses.replace(piece, **block), data[first * width : end * width]))
    return [_parcel(version, part) for part in parts]


def _parcel(version: int, part: list[tuple[Piece, np.ndarray]]) -> Parcel:
    ends = np.cumsum([len(data) for _, data in part])
    placed = [
        dataclasses.replace(piece, offset=int(end) - len(data), nbytes=len(data))
        for (piece, data), end in zip(part, ends, strict=True)
    ]
    digests = {piece.name: digest(data) for piece, data in part}
    return Parcel(WeightManifest(version, tuple(placed), digests), np.concatenate([data for _, data in part]))


def test_shards_and_buckets_make_a_whole(planted: tuple[str, EngineHost]) -> None:
    family, host = planted
    reference = tiny.random_model(tiny.CONFIGS[family](), seed=3)
    host.call(update, shards(reference, 3))
    assert canary_of(host, family, reference) < TOLERANCE
    reference = tiny.random_model(tiny.CONFIGS[family](), seed=4)
    (whole,) = tiny.pack(reference, 4)
    names = [piece.name for piece in whole.manifest.pieces]
    thirds = [names[0::3], names[1::3], names[2::3]]
    for number, kept in enumerate(thirds):
        pieces = tuple(piece for piece in whole.manifest.pieces if piece.name in kept)
        bucket = Parcel(dataclasses.replace(whole.manifest, pieces=pieces), whole.buffer)
        host.call(update, [bucket], number == 0, number == 2)
    assert canary_of(host, family, reference) < TOLERANCE


def test_parts_that_do_not_make_a_whole_are_refused(planted: tuple[str, EngineHost]) -> None:
    """One rank's shard left out, of an earlier hand-over, twice; a bucket twice."""
    family, host = planted
    one, other = shards(tiny.random_model(tiny.CONFIGS[family](), seed=8), 8)
    old = Parcel(dataclasses.replace(one.manifest, version=7), one.buffer)
    for parcels, complaint in (
        ([one], "shards: of tensor .* only .* elements arrived"),
        ([old, other], r"version: buffers of hand-overs \[7, 8\]"),
        ([one, one, other], "duplicate: a piece of tensor .* arrived twice"),
    ):
        with pytest.raises(HandoverError, match=f"^{complaint}"):
            host.call(update, parcels)
    host.call(update, [one, other], True, False)
    with pytest.raises(HandoverError, match=r"^duplicate: tensor .* had arrived in an earlier bucket"):
        host.call(update, [one, other], False, True)


def test_canary_error_is_infinite_for_nan() -> None:
    table = np.log(np.array([[0.25, 0.75], [0.5, 0.5]]))
    assert canary_error([{1: float(table[0, 1])}, {0: float(table[1, 0]) + 0.125}], table) == pytest.approx(0.125)
    assert canary_error([{1: float("nan")}, {0: float(table[1, 0])}], table) == np.inf
    three = np.concatenate([table, table[:1]])
    answers = [{1: float(table[0, 1]) + 2.0}, {0: float(table[1, 0]) + 0.25}, {1: float(table[0, 1])}]
    assert canary_error(answers, three, median=True) == pytest.approx(0.25)
    assert canary_error([answers[0], {0: float("nan")}, {1: float("nan")}], three, median=True) == np.inf
