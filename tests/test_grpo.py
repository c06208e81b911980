"""The GRPO step on one process: a fake engine that samples, and computes its own log-probabilities, token by token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from test_tree import MODELS
from transformers import AutoModelForCausalLM

from alignment.config import GRPOConfig, TrainConfig
from alignment.grpo import MismatchError, grpo
from alignment.logprobs import TREE_ATTENTION
from alignment.losses import sft_loss
from alignment.policy import RankPolicy, merge_stats
from alignment.protocols import TrainRow
from alignment.routing import Routing
from rollout.prompts import Stream
from rollout.sampler import Sampling
from rollout.types import Completion, Group, Handle, Prompt, Scores, Trajectory

GOOD = 7
END = 1


def test_gradients_that_keep_their_memory_change_no_number() -> None:
    """Every parameter that trains has a gradient after every update: AdamW steps none by zeros alone."""
    rng, found = np.random.default_rng(0), []
    tokens = [rng.integers(3, 40, 9).astype(np.int32) for _ in range(4)]
    said = np.arange(9) >= 4
    rows = [TrainRow(Trajectory(t, said, np.full(9, np.nan, np.float32), "stop"), i, 9, 1.0, 0.1)
            for i, t in enumerate(tokens)]  # fmt: skip
    for keeps in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(MODELS["deepseek_v2"], attn_implementation=TREE_ATTENTION)
        optimizer, routing = torch.optim.AdamW(model.parameters(), weight_decay=0.1), Routing(model, TrainConfig())
        policy = RankPolicy(model, optimizer, 16, lambda norm: norm, lambda last: None, lambda: None, routing)
        policy.keep_gradients = keeps
        for _ in range(3):
            policy.update(rows, sft_loss, learning_rate=1e-2, temperature=1.0, max_grad_norm=1.0)
        assert all((p.grad is not None) == keeps for p in model.parameters())
        found.append([p.detach() for p in model.parameters()] + [s["exp_avg_sq"] for s in optimizer.state.values()])
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


class FakeEngine:
    """Samples with Transformers' plain forward (eager attention); trains with `RankPolicy`. `error` is added to the
    log-probabilities it reports; `drift` scales its weights away from the trainer's."""

    precision = "float32"

    def __init__(self, *, error: float = 0.0, learn_from: str = "right") -> None:
        torch.manual_seed(0)
        config = MODELS["deepseek_v2"]
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation=TREE_ATTENTION)
        self.phases: list[str] = []
        self.error, self.learn_from = error, learn_from
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.0)
        reference = AutoModelForCausalLM.from_config(config, attn_implementation=TREE_ATTENTION)
        routing = Routing(torch.nn.Identity(), TrainConfig())  # hooks nothing: the same model samples
        self.policy, self.reference = (
            RankPolicy(model, optimizer, 4096, self._clip, lambda last: None, lambda: None, routing)
            for model in (self.model, reference)
        )
        self.reference.model.load_state_dict(self.model.state_dict())

    def _clip(self, max_norm: float) -> float:
        return float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm))

    def rollouts(self, batches, sampling, scorer) -> Iterator[list[Group]]:
        for step, prompts in batches:
            trajectories = self._sample([p for p in prompts for _ in range(sampling.completions)], sampling, step)
            groups = []
            for p, prompt in enumerate(prompts):
                mine = trajectories[p * sampling.completions : (p + 1) * sampling.completions]
                completions = tuple(
                    Completion("", t.token_ids[t.loss_mask], t.finish_reason, Handle(mine, g))
                    for g, t in enumerate(mine)
                )
                groups.append(Group(prompt, completions, scorer(completions)))
            yield groups

    @torch.no_grad()
    def _sample(self, prompts: list[Prompt], sampling: Sampling, seed: int) -> list[Trajectory]:
        """Token by token, all prompts (of equal length) at once; what comes after an end token is cut off."""
        self.model.config._attn_implementation = "eager"
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.from_numpy(np.stack([prompt.token_ids for prompt in prompts])).long()
        start = tokens.shape[1]
        logprobs = torch.full(tokens.shape, torch.nan)
        for _ in range(sampling.max_tokens):
            probabilities = (self.model(tokens).logits[:, -1] / sampling.temperature).softmax(-1)
            new = torch.multinomial(probabilities, 1, generator=generator)
            tokens = torch.cat([tokens, new], 1)
            logprobs = torch.cat([logprobs, probabilities.gather(1, new).log() + self.error], 1)
        self.model.config._attn_implementation = TREE_ATTENTION
        pairs = zip(tokens.numpy(), logprobs.numpy(), strict=True)
        return [self._trajectory(ids, values, start) for ids, values in pairs]

    def _trajectory(self, tokens: np.ndarray, logprobs: np.ndarray, start: int) -> Trajectory:
        ends = np.flatnonzero(tokens[start:] == END)
        length = start + ends[0] + 1 if len(ends) else len(tokens)
        reason = "stop" if len(ends) else "length"
        mask = np.arange(length) >= start
        return Trajectory(tokens[:length].astype(np.int32), mask, logprobs[:length], reason)

    @contextmanager
    def phase(self, name):
        self.phases.append(name)
        yield self

    def _rows(self, rows) -> list[TrainRow]:
        def fetch(handle):
            return None if handle is None else handle.ref[handle.index]

        return [
            dataclasses.replace(
                r,
                trajectory=fetch(r.trajectory),
                old_logprobs=fetch(r.old_logprobs),
                reference_logprobs=fetch(r.reference_logprobs),
            )
            for r in rows
        ]

    def update(self, rows, loss, **kwargs):
        return merge_stats([self.policy.update(self._rows(rows), loss, **kwargs)])

    def logprobs(self, rows, *, temperature, reference=False):
        policy = self.reference if reference else self.policy
        values = policy.logprobs(self._rows(rows), temperature=temperature)
        return [Handle(values, i) for i in range(len(values))]


def wants_good_token(completions) -> Scores:
    return Scores(np.array([float((c.token_ids == GOOD).mean()) for c in completions]), {"good": np.zeros(4)}, {})


def config(**changes) -> GRPOConfig:
    base = {
        "prompts": {"path": "x.jsonl"}, "rewards": [{"function": "m:f"}], "steps": 8, "prompts_per_step": 4,
        "completions": 4, "max_new_tokens": 4, "learning_rate": 1e-2, "temperature": 1.3,
    }  # fmt: skip
    return GRPOConfig(**base | changes)


def steps(engine: FakeEngine, config: GRPOConfig, scorer=wants_good_token) -> list:
    prompts = [Prompt(i, "", np.array([3 + i, 9, 4 + i], np.int32), {}) for i in range(6)]
    stream = Stream(prompts, config.prompts_per_step, seed=0)
    sampling = Sampling(config.completions, config.max_new_tokens, config.temperature, seed=0)
    return list(grpo(engine, stream, config, sampling, scorer, 1))


def test_the_reward_rises_and_the_sampler_agrees_with_the_trainer() -> None:
    engine = FakeEngine()
    done = steps(engine, config(steps=25))
    rewards = [step.metrics["reward/mean"] for step in done]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3
    assert max(step.metrics["mismatch/max"] for step in done if step.metrics["updates"]) < 1e-4
    assert [step.step for step in done] == list(range(1, 26))
    assert engine.phases == ["train"] * 25  # no reference, no second forward


@pytest.mark.parametrize("error", [0.1, -0.1, math.nan, "nan in one row of two"])
def test_a_sampler_that_reports_other_logprobs_stops_the_run_by_name(error: float | str) -> None:
    if isinstance(error, str):
        rows = config().prompts_per_step * config().completions
        error = torch.where(torch.arange(rows) % 2 == 0, 0.0, math.nan)[:, None]
    with pytest.raises(MismatchError, match="step 1: the k3 KL between sampler and trainer"):
        steps(FakeEngine(error=error), config())


def test_the_mismatch_limit_is_the_recipes() -> None:
    assert len(steps(FakeEngine(error=0.1), config(steps=2, mismatch_limit=0.1))) == 2


def test_several_updates_clip_against_the_logprobs_before_the_first() -> None:
    done = steps(FakeEngine(), config(steps=3, updates_per_batch=2, learning_rate=5e-2))
    assert all(step.metrics["updates"] == 2 for step in done)
    # the second update trains weights that the first has moved: some ratios leave the clip range
    assert max(step.metrics["clip_fraction"] for step in done) > 0
    # and yet the sampler is compared with the trainer as it was when it sampled
    assert max(step.metrics["mismatch/max"] for step in done) < 1e-4


def test_kl_holds_the_policy_at_its_reference() -> None:
    free, engine = FakeEngine(), FakeEngine()
    without = steps(free, config())
    held = steps(engine, config(kl=5.0))
    assert engine.phases[:2] == ["reference", "train"]
    assert held[0].metrics["kl"] == pytest.approx(0.0, abs=1e-9)
    assert held[-1].metrics["reward/mean"] < without[-1].metrics["reward/mean"]

    def divergence(engine: FakeEngine) -> float:
        prompts = [np.array([3 + i, 9, 4 + i], np.int32) for i in range(6)]
        now, then = (policy.next_token_logprobs(prompts) for policy in (engine.policy, engine.reference))
        return float((np.exp(now) * (now - then)).sum(-1).mean())

    assert 0 < divergence(engine) < divergence(free)


def test_a_batch_without_signal_is_a_counted_step_without_an_update() -> None:
    engine = FakeEngine()
    before = [p.detach().clone() for p in engine.model.parameters()]
    done = steps(engine, config(steps=2), scorer=lambda completions: Scores(np.ones(4), {"one": np.ones(4)}, {}))
    assert [step.metrics["updates"] for step in done] == [0, 0]
    assert done[0].metrics["groups/without_signal"] == 1
    assert all(torch.equal(p, q) for p, q in zip(before, engine.model.parameters(), strict=True))


def test_everything_truncated_and_masked_trains_on_nothing() -> None:
    done = steps(FakeEngine(), config(steps=1, truncated="mask", max_new_tokens=1))
    assert done[0].metrics["completions/truncated"] > 0.9


def test_planted_mask_fault_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss on the token after the right one: the sampler's log-probabilities give it away."""
    engine = FakeEngine()
    honest = engine._trajectory

    def shifted(tokens, logprobs, start):
        trajectory = honest(tokens, logprobs, start)
        moved = [*trajectory.logprobs[:start], *trajectory.logprobs[start + 1 :], -1.0]
        return dataclasses.replace(trajectory, logprobs=np.array(moved, np.float32))

    monkeypatch.setattr(engine, "_trajectory", shifted)
    with pytest.raises(MismatchError, match="step 1"):
        steps(engine, config())
