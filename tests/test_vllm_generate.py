"""What the engine samples: limits, ends, seeds, texts. On the model with a prefix cache."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import tiny
import torch
from engine_host import EngineHost, needs_capable_vllm, shared
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rollout.config import RolloutConfig
from rollout.sampler import Request, Sample
from rollout.vllm.environment import environment

EOS = 1
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(2, tiny.VOCAB_SIZE, length).astype(np.int32) for length in (1, 5, 31, 32, 33, 64, 90, 120)]


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny.random_model(tiny.qwen3_moe_config(), seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def host(reference: PreTrainedModel) -> EngineHost:
    host = shared("qwen3_moe", False)
    host.call(lambda engine, parcels: engine.update_weights(parcels), tiny.pack(reference, 1))
    return host


def generate(engine, requests):
    """Samples in the order of their requests."""
    samples = [sample for finished in engine.generate(requests) for sample in finished]
    return sorted(samples, key=lambda sample: sample.index)


def said(sample: Sample) -> list[int]:
    return sample.trajectory.token_ids[sample.trajectory.loss_mask].tolist()


def test_every_request_yields_once_when_there_are_more_than_run_at_once(host: EngineHost) -> None:
    requests = [Request(PROMPTS[i % 8], 1 + i % 7, seed=i) for i in range(150)]
    samples = host.call(generate, requests)
    assert [sample.index for sample in samples] == list(range(150))
    for request, sample in zip(requests, samples, strict=True):
        trajectory, start = sample.trajectory, len(request.prompt)
        assert trajectory.token_ids[:start].tolist() == request.prompt.tolist()
        assert trajectory.loss_mask.tolist() == [False] * start + [True] * (len(trajectory.token_ids) - start)
        assert np.isnan(trajectory.logprobs).tolist() == (~trajectory.loss_mask).tolist()
        ended = said(sample)[-1] == EOS
        assert trajectory.finish_reason == ("stop" if ended else "length")
        assert ended or len(said(sample)) == request.max_tokens


def test_temperature_zero_takes_the_likeliest_token(host: EngineHost, reference: PreTrainedModel) -> None:
    samples = host.call(generate, [Request(prompt, 8, temperature=0.0, ignore_eos=True) for prompt in PROMPTS])
    for sample in samples:
        ids = torch.tensor(sample.trajectory.token_ids[None], dtype=torch.long)
        with torch.no_grad():
            table = reference(ids).logits[0, :-1].log_softmax(-1)
        mask = sample.trajectory.loss_mask[1:]
        assert table.argmax(-1).numpy()[mask].tolist() == said(sample)
        np.testing.assert_allclose(sample.trajectory.logprobs[1:][mask], table.max(-1).values.numpy()[mask], atol=1e-4)


def test_seeds_repeat_in_any_company(host: EngineHost) -> None:
    requests = [Request(PROMPTS[i % 8], 20, seed=1000 + i) for i in range(24)]
    together = host.call(generate, requests)
    alone = host.call(lambda engine, rs: [generate(engine, [r])[0] for r in rs], requests[::6])
    assert [said(sample) for sample in alone] == [said(sample) for sample in together[::6]]
    other_seed = host.call(generate, [dataclasses.replace(requests[0], seed=7)])
    assert said(other_seed[0]) != said(together[0])


def own_routes(model: PreTrainedModel, token_ids: np.ndarray) -> np.ndarray:
    """[T, L, K] the experts that Transformers' routers choose, in ascending order."""
    chosen: list[torch.Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(lambda module, args, out: chosen.append(out[2])) for router in routers]
    with torch.no_grad():
        model(torch.tensor(token_ids[None], dtype=torch.long))
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, 1).sort(-1).values.numpy()


@needs_capable_vllm
def test_routes_are_those_of_transformers_also_of_cached_prefixes(host: EngineHost, reference: PreTrainedModel) -> None:
    """Twice: what the second round reads from the cache keeps the experts of the first; and after a hand-over.

    Each batch of rollouts begins with one, so nothing is in the cache that was not recorded.
    """
    requests = [Request(PROMPTS[i % 8], 12, seed=i, routes=True) for i in range(40)]
    other = tiny.random_model(tiny.qwen3_moe_config(), seed=5)
    for model, version in ((reference, 1), (reference, None), (other, 2), (reference, 3)):
        if version is not None:
            host.call(lambda engine, parcels: engine.update_weights(parcels), tiny.pack(model, version))
        for sample in host.call(generate, requests):
            token_ids, routes = sample.trajectory.token_ids, sample.trajectory.routes
            assert routes.shape == (len(token_ids) - 1, 2, 2) and routes.dtype == np.int16
            np.testing.assert_array_equal(np.sort(routes, -1), own_routes(model, token_ids)[:-1])


@pytest.mark.slow
def test_seeds_repeat_in_another_process_that_read_the_weights_from_disk(host: EngineHost) -> None:
    config = RolloutConfig(max_length=512, max_num_seqs=32, memory=0.25)
    folder = tiny.model_dir("qwen3_moe")

    def start():
        from rollout.vllm.engine import VllmEngine

        return VllmEngine(folder, config, seed=99)

    requests = [Request(PROMPTS[i % 8], 20, seed=i) for i in range(24)]
    other = EngineHost(start, environment(config))
    try:
        assert [said(s) for s in other.call(generate, requests)] == [said(s) for s in host.call(generate, requests)]
        (whole,) = other.call(lambda engine, given: engine.score(given), [np.full(512, 7, np.int32)])
        assert np.isfinite(whole.logprobs[1:]).all()  # 512 is all that the model takes.
    finally:
        other.close()


def test_seeded_prompts_that_fill_more_than_one_step_are_sampled(host: EngineHost) -> None:
    prompts = [RNG.integers(2, tiny.VOCAB_SIZE, 150).astype(np.int32) for _ in range(64)]  # A step takes 4,096 tokens.
    samples = host.call(generate, [Request(prompt, 2, seed=i, ignore_eos=True) for i, prompt in enumerate(prompts)])
    assert [len(said(sample)) for sample in samples] == [2] * 64


def test_the_end_token_stops_unless_it_is_ignored(host: EngineHost) -> None:
    requests = [Request(PROMPTS[5], 150, seed=seed) for seed in range(32)]
    samples = host.call(generate, requests)
    stopped = [sample for sample in samples if sample.trajectory.finish_reason == "stop"]
    assert stopped, "no sample met the end token; take more seeds"
    assert all(said(sample)[-1] == EOS and EOS not in said(sample)[:-1] for sample in stopped)
    on = host.call(generate, [dataclasses.replace(request, ignore_eos=True) for request in requests])
    assert {len(said(sample)) for sample in on} == {150}
    assert all(said(b)[: len(said(a))] == said(a) for a, b in zip(samples, on, strict=True))


def test_text_leaves_special_and_unused_entries_out(host: EngineHost, tokenizer: PreTrainedTokenizerFast) -> None:
    samples = host.call(generate, [Request(prompt, 60, seed=3, ignore_eos=True) for prompt in PROMPTS])
    assert any(token >= len(tokenizer) for sample in samples for token in said(sample))
    for sample in samples:
        known = [token for token in said(sample) if 2 <= token < len(tokenizer)]
        assert sample.text == tokenizer.decode(known)


def test_stop_strings_end_the_completion_and_leave_the_text(
    host: EngineHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [np.array(tokenizer.encode(f"What is {i} plus 1? The answer is"), np.int32) for i in range(12)]
    requests = [Request(prompt, 60, seed=i, ignore_eos=True) for i, prompt in enumerate(prompts)]
    free = host.call(generate, requests)
    stops = ("2", "?")
    cut = host.call(generate, [dataclasses.replace(request, stop=stops) for request in requests])
    assert {"stop", "length"} == {sample.trajectory.finish_reason for sample in cut}
    for whole, sample in zip(free, cut, strict=True):
        assert said(whole)[: len(said(sample))] == said(sample)
        places = [place for stop in stops if (place := whole.text.find(stop)) >= 0]
        assert sample.trajectory.finish_reason == ("stop" if places else "length")
        assert sample.text == whole.text[: min(places, default=None)]


def test_a_prompt_that_ends_inside_a_character_is_named_when_vllm_mistakes_it_for_the_completion(
    host: EngineHost, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt = np.array(tokenizer.encode("1 plus 1 is \u20ac")[:-2], np.int32)
    with pytest.raises(RuntimeError, match="request 0: vLLM stopped at '1', which the completion does not contain"):
        host.call(generate, [Request(prompt, 4, temperature=0.0, stop=("1",))])


def test_completions_end_where_the_context_does(host: EngineHost) -> None:
    prompt = RNG.integers(2, tiny.VOCAB_SIZE, 250).astype(np.int32)
    (sample,) = host.call(generate, [Request(prompt, 100, ignore_eos=True)])
    assert len(sample.trajectory.token_ids) == 256
    assert sample.trajectory.finish_reason == "length"


def test_bad_requests_are_refused_by_their_number(host: EngineHost) -> None:
    good = Request(PROMPTS[0], 4)
    for bad, words in [
        (Request(np.zeros(256, np.int32), 4), "request 1: its prompt has 256 tokens"),
        (Request(np.zeros(0, np.int32), 4), "request 1: its prompt has 0 tokens"),
        (Request(PROMPTS[0], 0), "request 1: max_tokens is 0"),
    ]:
        with pytest.raises(ValueError, match=words):
            host.call(generate, [good, bad])
    assert len(host.call(generate, [good])) == 1


def test_the_longest_sequence_can_be_scored(host: EngineHost, reference: PreTrainedModel) -> None:
    sequences = [RNG.integers(2, tiny.VOCAB_SIZE, length).astype(np.int32) for length in (256, 1, 2, 100)]
    scores = host.call(lambda engine, given: engine.score(given), sequences)
    for sequence, score in zip(sequences, scores, strict=True):
        ids = torch.tensor(sequence[None], dtype=torch.long)
        with torch.no_grad():
            table = reference(ids).logits[0, :-1].log_softmax(-1)
        assert np.isnan(score.logprobs[0]) and not score.greedy[0]
        np.testing.assert_allclose(score.logprobs[1:], table.gather(1, ids[0, 1:, None])[:, 0].numpy(), atol=1e-4)
        assert score.greedy[1:].tolist() == (table.argmax(-1) == ids[0, 1:]).tolist()
    with pytest.raises(ValueError, match="sequence 0 has 257 tokens"):
        host.call(lambda engine, given: engine.score(given), [np.zeros(257, np.int32)])


def test_greedy_tokens_are_marked(host: EngineHost) -> None:
    samples = host.call(generate, [Request(prompt, 8, temperature=0.0, ignore_eos=True) for prompt in PROMPTS])
    scores = host.call(lambda engine, given: engine.score(given), [sample.trajectory.token_ids for sample in samples])
    assert all(score.greedy[sample.trajectory.loss_mask].all() for sample, score in zip(samples, scores, strict=True))


def test_an_iterator_that_is_closed_early_aborts_its_requests(host: EngineHost) -> None:
    def leave_early(engine, requests):
        iterator = engine.generate(requests)
        first = next(iterator)
        try:
            next(engine.generate(requests))
        except RuntimeError as error:
            complaint = str(error)
        iterator.close()
        return first, complaint

    requests = [Request(PROMPTS[3], 1 + 50 * (i % 2), ignore_eos=True) for i in range(8)]
    first, complaint = host.call(leave_early, requests)
    assert [sample.index for sample in first] == [0, 2, 4, 6]
    assert "still generating" in complaint
    assert len(host.call(generate, requests)) == 8


def test_logprobs_are_nan_when_nobody_asks(host: EngineHost) -> None:
    (sample,) = host.call(generate, [Request(PROMPTS[2], 5, logprobs=False)])
    assert np.isnan(sample.trajectory.logprobs).all()


def test_an_engine_without_weights_refuses(host: EngineHost) -> None:
    def ask(engine, request):
        version, engine._version = engine._version, None
        try:
            next(engine.generate([request]))
        finally:
            engine._version = version

    with pytest.raises(RuntimeError, match="holds no weights"):
        host.call(ask, Request(PROMPTS[0], 1))


def test_a_wrong_start_is_refused_before_anything_is_loaded(host: EngineHost) -> None:
    def start(engine, folder, config, mla_disabled):
        import os

        from rollout.vllm.engine import VllmEngine

        os.environ["VLLM_MLA_DISABLE"], before = mla_disabled, os.environ["VLLM_MLA_DISABLE"]
        try:
            VllmEngine(folder, config)
        finally:
            os.environ["VLLM_MLA_DISABLE"] = before

    folder = tiny.model_dir("qwen3_moe")
    with pytest.raises(RuntimeError, match=r"start this process with .*VLLM_MLA_DISABLE"):
        host.call(start, folder, RolloutConfig(max_length=256), "0")
    with pytest.raises(ValueError, match=r"rollout.max_length is 513; the model in .* takes at most 512 tokens"):
        host.call(start, folder, RolloutConfig(max_length=513), "1")
