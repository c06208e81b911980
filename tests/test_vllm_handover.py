"""Weights into the live engine: right after every hand-over, and wrong ones are refused by the name of a check."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import tiny
import torch
from engine_host import EngineHost, shared
from transformers import PreTrainedModel

from hybrid_engine.engine import _canary_prompts
from hybrid_engine.rollout_worker import CANARY_TOP
from rollout.sampler import Request, Sample
from rollout.types import VersionSpan
from rollout.weights import HandoverError, WeightManifest, canary_error

TOLERANCE = 1e-4
TEMPERATURE = 0.7
PROMPTS = [np.random.default_rng(seed).integers(2, tiny.VOCAB_SIZE, 70).astype(np.int32) for seed in range(6)]
"""Longer than two blocks of the prefix cache (32), so that its blocks count."""
MODELS = [("deepseek", False), ("deepseek", True), ("qwen3_moe", False)]


@pytest.fixture(params=MODELS, ids=["deepseek", "deepseek-mla", "qwen3_moe"])
def model(request: pytest.FixtureRequest) -> tuple[str, EngineHost]:
    family, mla = request.param
    return family, shared(family, mla)


def update(engine, manifest, buffer):
    engine.update_weights(manifest, buffer)


def generate(engine, requests):
    return [sample for finished in engine.generate(requests) for sample in finished]


def canary(engine, prompts, top):
    return engine.canary(prompts, top)


def canary_of(host: EngineHost, family: str, reference: PreTrainedModel) -> float:
    """The error that the hybrid engine would find, with its prompts, against Transformers' forward."""
    prompts = _canary_prompts(tiny.model_dir(family), 96)
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
        host.call(update, *tiny.pack(reference, version))
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
    host.call(update, *tiny.pack(reference, 9))
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
    host.call(update, *tiny.pack(first, 4))
    assert canary_of(host, family, first) < TOLERANCE
    host.call(_take_away, fault)
    host.call(update, *tiny.pack(second, 5))
    return canary_of(host, family, second)


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
    if host is shared("deepseek", True):
        assert error < TOLERANCE  # MLA on the CPU has no prefix cache: nothing to go stale.
    else:
        assert error > 100 * TOLERANCE


def without(manifest: WeightManifest, name: str) -> WeightManifest:
    return dataclasses.replace(manifest, tensors=tuple(spec for spec in manifest.tensors if spec.name != name))


def _complaints(engine, manifest, buffer, incomplete):
    """What the engine says of each incomplete manifest."""
    said = []
    for part in incomplete:
        try:
            engine.update_weights(part, buffer)
            said.append(None)
        except HandoverError as error:
            said.append(str(error))
    return said


def test_every_missing_tensor_is_found_by_the_coverage_check(planted: tuple[str, EngineHost]) -> None:
    family, host = planted
    manifest, buffer = tiny.pack(tiny.random_model(tiny.CONFIGS[family](), seed=6), 6)
    names = [spec.name for spec in manifest.tensors]
    said = host.call(_complaints, manifest, buffer, [without(manifest, name) for name in names])
    for name, complaint in zip(names, said, strict=True):
        assert complaint is not None, f"nobody missed {name}"
        assert complaint.startswith("coverage: parameter "), (name, complaint)


def test_a_tensor_of_the_step_before_is_found_by_its_digest(planted: tuple[str, EngineHost]) -> None:
    family, host = planted
    (_, old), (manifest, new) = (tiny.pack(tiny.random_model(tiny.CONFIGS[family](), seed=v), v) for v in (6, 7))
    spec = manifest.tensors[len(manifest.tensors) // 2]
    new[spec.offset : spec.offset + spec.nbytes] = old[spec.offset : spec.offset + spec.nbytes]
    with pytest.raises(HandoverError, match=f"^digest: tensor {spec.name} differs"):
        host.call(update, manifest, new)
    with pytest.raises(RuntimeError, match="holds no weights"):
        host.call(generate, [Request(PROMPTS[0], 4)])


def test_a_tensor_that_is_named_twice_is_refused(planted: tuple[str, EngineHost]) -> None:
    family, host = planted
    manifest, buffer = tiny.pack(tiny.random_model(tiny.CONFIGS[family](), seed=8), 8)
    twice = dataclasses.replace(manifest, tensors=(*manifest.tensors, manifest.tensors[0]))
    with pytest.raises(HandoverError, match=f"^duplicate: tensor {manifest.tensors[0].name}"):
        host.call(update, twice, buffer)


def test_canary_error_is_infinite_for_nan() -> None:
    table = np.log(np.array([[0.25, 0.75], [0.5, 0.5]]))
    assert canary_error([{1: float(table[0, 1])}, {0: float(table[1, 0]) + 0.125}], table) == pytest.approx(0.125)
    assert canary_error([{1: float("nan")}, {0: float(table[1, 0])}], table) == np.inf
    three = np.concatenate([table, table[:1]])
    answers = [{1: float(table[0, 1]) + 2.0}, {0: float(table[1, 0]) + 0.25}, {1: float(table[0, 1])}]
    assert canary_error(answers, three, median=True) == pytest.approx(0.25)
    assert canary_error([answers[0], {0: float("nan")}, {1: float("nan")}], three, median=True) == np.inf
