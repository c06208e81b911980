"""The hybrid engine on real parts: Ray actors, FSDP2 over gloo, vLLM; hand-overs, planted faults, deaths."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import faulty
import numpy as np
import pytest
import ray
from engine_host import CAPABLE, needs_capable_vllm
from tiny import model_dir

import hybrid_engine.engine as engine_module
from alignment.config import GRPOConfig, SFTConfig, TrainConfig
from alignment.grpo import grpo
from alignment.sft import sft_step
from hybrid_engine import actors
from hybrid_engine.actors import WorkerError, start_ray
from hybrid_engine.engine import HybridEngine
from hybrid_engine.hand_over import CanaryError
from rollout.config import RolloutConfig
from rollout.prompts import Stream
from rollout.sampler import Request, Sampling
from rollout.types import Prompt, Scores, Trajectory

FAMILY = "deepseek"
ray.cloudpickle.register_pickle_by_value(faulty)  # Ray's processes cannot import from here


def start(rollout: dict[str, Any] | None = None, family: str = FAMILY, **train: Any) -> HybridEngine:
    engines = RolloutConfig(**{"max_length": 96, "max_num_seqs": 64, "memory": 0.25} | (rollout or {}))
    return HybridEngine(model_dir(family), TrainConfig(**train), engines, seed=0)


def config(**changes) -> GRPOConfig:
    base = {
        "prompts": {"path": "x.jsonl"}, "rewards": [{"function": "m:f"}], "steps": 3, "prompts_per_step": 4,
        "completions": 4, "max_new_tokens": 6, "learning_rate": 1e-3,
    }  # fmt: skip
    return GRPOConfig(**base | changes)


class EvenTokens:
    """Scores in this process: the share of even token ids."""

    def submit(self, groups, trainer_state):
        future: Future = Future()
        future.set_result([
            Scores(np.array([(c.token_ids % 2 == 0).mean() for c in group.completions]), {}, {}) for group in groups
        ])  # fmt: skip
        return future

    def close(self) -> None:
        return None


def prompts() -> Stream[Prompt]:
    rng = np.random.default_rng(0)
    return Stream(
        [Prompt(i, "", rng.integers(5, 300, rng.integers(3, 40)).astype(np.int32), {}) for i in range(8)], 4, seed=0
    )


def run_steps(engine: HybridEngine, config: GRPOConfig, first: int = 1, stream: Stream | None = None) -> list[dict]:
    sampling = Sampling(config.completions, config.max_new_tokens, config.temperature, seed=0)
    return [
        done.metrics | engine.take_metrics()
        for done in grpo(engine, stream or prompts(), config, sampling, EvenTokens(), first)
    ]


@pytest.fixture(scope="module")
def small():
    """One training rank, one engine: for every test that breaks neither."""
    engine = start()
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def one(small: HybridEngine) -> list[dict]:
    """The metrics of one training rank and one engine, which every layout must reach."""
    begin(small, config())
    return run_steps(small, config())


def begin(engine: HybridEngine, config: GRPOConfig, family: str = FAMILY) -> None:
    folder = model_dir(family)
    engine.load(folder, folder, config, folder if config.kl else None)


KEYS = ("loss", "grad_norm", "reward/mean", "entropy", "completions/mean_length")


def comparable(metrics: list[dict]) -> list[list[float]]:
    return [[step[key] for key in KEYS] for step in metrics]


def test_three_hand_overs_with_changed_weights_agree_to_1e4(small: HybridEngine) -> None:
    begin(small, config())
    done = run_steps(small, config())
    assert all(step["updates"] == 1 and step["grad_norm"] > 0 for step in done)
    assert max(step["handover/canary"] for step in done) < 1e-4
    assert max(step["mismatch/max"] for step in done) < 1e-4
    assert {"time/generate", "time/handover", "time/train", "time/score"} <= done[0].keys()


def test_the_same_run_again_is_the_same_to_the_bit(small: HybridEngine) -> None:
    runs = []
    for _ in range(2):
        begin(small, config(kl=0.02, updates_per_batch=2))
        runs.append(run_steps(small, config(kl=0.02, updates_per_batch=2)))
    assert comparable(runs[0]) == comparable(runs[1])
    assert runs[0][-1]["kl"] == runs[1][-1]["kl"] > 0


def test_a_checkpoint_continues_as_if_nothing_had_happened(small: HybridEngine, tmp_path: Path) -> None:
    begin(small, config())
    whole = run_steps(small, config())
    begin(small, config())
    stream = prompts()
    run_steps(small, config(steps=2), stream=stream)
    small.save_checkpoint(tmp_path / "step-2", {"step": 2, "stream": stream.state()})
    begin(small, config())
    extra = small.load_checkpoint(tmp_path / "step-2")
    again = prompts()
    again.restore(extra["stream"])
    assert comparable(run_steps(small, config(), first=extra["step"] + 1, stream=again)) == comparable(whole[2:])


def test_the_sampler_serves_evals(small: HybridEngine) -> None:
    begin(small, config())
    sampler = small.sampler
    requests = [Request(np.array([5, 6 + i], np.int32), max_tokens=4, temperature=0.0) for i in range(5)]
    samples = {sample.index: sample for sample in sampler.generate(requests)}
    assert sorted(samples) == list(range(5))
    sequence = samples[0].trajectory.token_ids
    scores = sampler.score([sequence])[0]
    assert scores.greedy[2:].all()
    assert sampler.max_length == 96


DIFFERS = (CanaryError, "canary: after hand-over .* rollout engine 0 differs from the trainer")
PLANTED = {
    "swap_experts": DIFFERS,
    "stale_tensor": DIFFERS,
    **({"repack_experts": DIFFERS} if CAPABLE else {}),
    "forget_prefixes": DIFFERS,
    "lose_tensor": (WorkerError, "rollout engine 0: HandoverError: coverage: .*"),
    "old_tensor": (WorkerError, "rollout engine 0: HandoverError: digest: tensor .* differs"),
}
"""Two that the trainer makes, whose digests are right; two of the engine's own; two on the way."""


@pytest.mark.parametrize("family", ["deepseek", "qwen3_moe"])
def test_a_hand_over_that_goes_wrong_stops_the_run_by_the_name_of_a_check(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With and without MLA, prefixes cached on both; each fault comes after a step that went well."""
    monkeypatch.setattr(engine_module, "TrainWorker", faulty.PlantedTrainer)
    monkeypatch.setattr(engine_module, "RolloutWorker", faulty.PlantedEngine)
    engine = start(family=family)
    actors = (*engine._ranks.values(), *engine._replicas.values())
    try:
        for fault, (error, message) in PLANTED.items():
            ray.get([actor.plant.remote(None) for actor in actors])
            begin(engine, config(learning_rate=0.05), family)
            run_steps(engine, config(learning_rate=0.05, steps=1))
            ray.get([actor.plant.remote(fault) for actor in actors])
            with pytest.raises(error, match=message):
                run_steps(engine, config(learning_rate=0.05))
    finally:
        engine.close()


@pytest.mark.parametrize(("train", "rollout"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_step_in_bfloat16_stays_within_its_own_limits(train: str, rollout: str) -> None:
    engine = start({"dtype": rollout}, dtype=train)
    try:
        begin(engine, config())
        done = run_steps(engine, config())
    finally:
        engine.close()
    assert engine.precision == "bfloat16"
    assert all(1e-4 < step["handover/canary"] < 0.5 and 0 < step["mismatch/k3"] < 0.1 for step in done)
    assert all(np.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in done)
    assert (rollout == "bfloat16") <= all(step["mismatch/experts"] > 0 for step in done if CAPABLE)


@needs_capable_vllm
@pytest.mark.parametrize(("rollout", "shard"), [({}, 1), ({"data": 2, "expert": True}, 2)], ids=["one", "DP 2 + EP"])
def test_with_routing_replay_every_token_is_trained_with_the_experts_that_sampled_it(rollout: dict, shard: int) -> None:
    engine = start({"dtype": "bfloat16"} | rollout, shard=shard, routing_replay=True)
    try:
        begin(engine, config(kl=0.01))
        done = run_steps(engine, config(kl=0.01, updates_per_batch=2, correction={"token_mask": (0.5, 5.0)}))
    finally:
        engine.close()
    assert all(step["mismatch/experts"] == 0 and 0 < step["mismatch/k3"] < 0.1 for step in done)
    assert all(0 <= step["mismatch/corrected"] < 1 for step in done)


def test_two_ranks_and_two_replicas_train_as_one(small: HybridEngine, one: list[dict]) -> None:
    small.close()
    engine = start({"replicas": 2}, shard=2, expert=2)
    try:
        begin(engine, config())
        two = run_steps(engine, config())
        np.testing.assert_allclose(comparable(two), comparable(one), rtol=2e-4, atol=1e-7)
        sequences = [np.arange(3, 6 + 2 * i, dtype=np.int32) for i in range(5)]
        scores = engine.sampler.score(sequences)
        assert [len(score.logprobs) for score in scores] == [len(sequence) for sequence in sequences]
        requests = [Request(sequence, max_tokens=2, temperature=0.0) for sequence in sequences]
        for sample in engine.sampler.generate(requests):
            asked = sequences[sample.index]
            assert sample.trajectory.token_ids[: len(asked)].tolist() == asked.tolist()
        _kill_and_see(engine, "training rank 1")
    finally:
        engine.close()
    assert not ray.is_initialized()


@needs_capable_vllm
def test_a_layout_with_experts_over_both_sides_trains_as_one(one: list[dict]) -> None:
    engine = start({"tensor": 2, "expert": True, "bucket_mb": 1}, shard=2, expert=2, balance={"devices": 2})
    try:
        begin(engine, config())
        np.testing.assert_allclose(comparable(run_steps(engine, config())), comparable(one), rtol=2e-4, atol=1e-7)
        dropping = config(capacity=0.8)  # old log-probabilities of a forward that drops nothing: no mismatch
        begin(engine, dropping)
        done = run_steps(engine, dropping)
        assert all(step["tokens/dropped"] > 0 and step["mismatch/max"] < 1e-4 for step in done)
        _kill_and_see(engine, "rollout engine 0 rank 1")
    finally:
        engine.close()


def test_deaths_are_seen_while_others_work_and_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actors, "LOOK", 1.0)
    started = start_ray(None)
    sleeper = ray.remote(faulty.Sleeper).options(num_cpus=0)
    busy, idle, broken = sleeper.remote(), sleeper.remote(), sleeper.remote("no such model")
    with pytest.raises(WorkerError, match="broken: it could not start: ValueError: 1 error of it\n  no such model"):
        actors.wait_all({"busy": busy.sleep.remote(), "broken": broken.pid.remote()})
    os.kill(ray.get(idle.pid.remote()), signal.SIGKILL)
    with pytest.raises(WorkerError, match="idle: the process died"):
        actors.wait_all({"busy": busy.sleep.remote()}, {"idle": idle})
    ray.kill(busy)
    if started:
        ray.shutdown()


def test_a_killed_engine_ends_the_run_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start()
    try:
        begin(engine, config())
        run_steps(engine, config(steps=1))
        _kill_and_see(engine, "rollout engine 0")
        monkeypatch.setattr("hybrid_engine.engine.LOOK", 0.0)
        row = Trajectory(np.arange(5, dtype=np.int32), np.ones(5, bool), np.full(5, np.nan, np.float32), "stop")
        sft = SFTConfig(data={"path": "x.jsonl"}, steps=2)
        with pytest.raises(WorkerError, match="rollout engine 0: the process died"):
            sft_step(engine, [row], sft, 1, 2)  # it asks no engine for anything
    finally:
        engine.close()


def _kill_and_see(engine: HybridEngine, name: str) -> None:
    actor = (engine._ranks | engine._replicas)[name]
    os.kill(ray.get(actor.pid.remote()), signal.SIGKILL)
    begun = time.monotonic()
    with pytest.raises(WorkerError, match=f"{name}: the process died"):
        run_steps(engine, config())
    assert time.monotonic() - begun < 60
