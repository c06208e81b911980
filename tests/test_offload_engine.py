"""A budget on real parts: the same metrics, memory that is really given up, and a disk that fills up within a run."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray
import test_engine
from test_engine import begin, config, prompts, run_steps
from test_model_rewards import classifier_dir
from tiny import model_dir

import hybrid_engine.engine as engine_module
from alignment.config import SFTConfig, TrainConfig
from alignment.sft import sft_step
from hybrid_engine.actors import WorkerError
from hybrid_engine.engine import HybridEngine
from hybrid_engine.phases import Budget
from hybrid_engine.residency import ResidencyError, Tier
from hybrid_engine.train_worker import TrainWorker
from rewards.config import RewardConfig
from rewards.worker import Batch
from rollout.config import RolloutConfig
from rollout.types import Trajectory

MIB = 2**20
ROOT = Path(__file__).resolve().parent.parent
ray.cloudpickle.register_pickle_by_value(test_engine)


class LimitedTrainer(TrainWorker):
    """A training rank whose disk may be full."""

    def fill_disk(self, full: bool) -> None:
        from hybrid_engine import disk

        if full:
            self._pwrite = disk.os.pwrite

            def pwrite(*_: Any) -> int:
                raise OSError(errno.ENOSPC, "No space left on device")

            disk.os.pwrite = pwrite
        else:
            disk.os.pwrite = self._pwrite


ray.cloudpickle.register_pickle_by_value(__import__(__name__))


@pytest.fixture(scope="module")
def budgeted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HybridEngine, list[str], Path]]:
    """One training rank and one engine, what was said of the schedule, and the disk."""
    said: list[str] = []
    disk = tmp_path_factory.mktemp("disk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "TrainWorker", LimitedTrainer)
        engine = HybridEngine(
            model_dir("deepseek"), TrainConfig(), RolloutConfig(max_length=96, max_num_seqs=64, memory=0.25), seed=0,
            budget=Budget(None, None, disk, said.append),
        )  # fmt: skip
    yield engine, said, disk
    engine.close()


class NoWatch:
    """Memory as if there were only what moves."""

    def take(self) -> int:
        return 0

    def close(self) -> None:
        return None


@pytest.fixture
def exact(budgeted, monkeypatch: pytest.MonkeyPatch):
    """Gives the engine an exact budget, in MiB, for the components alone."""
    engine, said, _ = budgeted
    memory = engine._memory
    monkeypatch.setattr(memory, "_used", lambda: memory.residency.resident())
    monkeypatch.setattr(memory, "_watch", NoWatch())
    monkeypatch.setattr("hybrid_engine.memory.predicted_work", lambda *_: {})
    whole = memory.residency.tiers[0]

    def limit(mib: float) -> None:
        memory.residency.tiers[0] = Tier("host", int(mib * MIB))
        del said[:]

    yield limit
    memory.residency.tiers[0] = whole


def pss(actor: Any) -> int:
    return psutil.Process(ray.get(actor.pid.remote())).memory_full_info().pss


def same(a: list[dict], b: list[dict]) -> bool:
    kept = [
        [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows] for rows in (a, b)
    ]
    return kept[0] == kept[1] and len(a) > 1


@pytest.fixture(scope="module")
def unlimited(budgeted) -> list[dict]:
    """The metrics of the same steps where nothing moves."""
    engine, _, _ = budgeted
    begin(engine, config(kl=0.02, updates_per_batch=2))
    assert engine.sampler.lanes == 1  # all is resident now
    engine._memory.on = False
    begin(engine, config(kl=0.02, updates_per_batch=2))
    engine.take_metrics()
    found = run_steps(engine, config(kl=0.02, updates_per_batch=2))
    engine._memory.on = True
    assert not any(key.startswith("memory/") for row in found for key in row)
    return found


def test_peaks_are_in_the_metrics_and_near_the_prediction(budgeted, unlimited) -> None:
    engine, said, _ = budgeted
    begin(engine, config(kl=0.02, updates_per_batch=2))
    found = run_steps(engine, config(kl=0.02, updates_per_batch=2))
    assert same(found, unlimited)
    last = found[-1]
    for phase in ("handover", "generate", "reference", "train"):
        measured, predicted = (last[f"memory/{phase}/{kind}"] for kind in ("measured", "predicted"))
        assert 0.9 < measured / predicted < 1.1
        assert measured <= last["memory/measured"]
    assert last["memory/generate/measured"] - last["memory/train/measured"] > 0.2  # the KV cache
    assert "generate: " in said[0] and "GiB of host" in said[0]


def test_vllm_gives_its_memory_up_and_samples_the_same_afterwards(budgeted) -> None:
    engine, _, _ = budgeted
    begin(engine, config())
    sequence = [np.arange(3, 40, dtype=np.int32)]
    before = engine.sampler.score(sequence)[0].logprobs
    (replica,) = engine._replicas.values()
    full = pss(replica)
    engine._move(lambda memory: memory.enter("train"))
    assert full - pss(replica) > 0.24 * 2**30  # the KV cache alone has 0.25 GiB
    after = engine.sampler.score(sequence)[0].logprobs  # another hand-over
    np.testing.assert_array_equal(before, after)
    assert abs(full - pss(replica)) < 30 * MIB


def test_a_run_within_a_budget_too_small_for_all_has_the_same_metrics(budgeted, unlimited, exact, tmp_path) -> None:
    """262 MiB for 256 of KV cache and the weights: in training 4.8 parameters, 4.8 gradients and 9.6 of states."""
    engine, said, disk = budgeted
    begin(engine, config(kl=0.02, updates_per_batch=2))
    sizes = {name: held.component.bytes / MIB for name, held in engine._memory.residency._held.items()}
    model = sizes["parameters"]
    cache, weights = sizes["KV cache"], sizes["weights"]
    exact(cache + weights)  # nothing else beside the engine
    found = run_steps(engine, config(kl=0.02, updates_per_batch=2))
    assert same(found, unlimited)
    assert any(f"parameters, host -> disk: {model / 1024:.2f} GiB" in line for line in said[0].splitlines()), said[0]
    assert not list(disk.iterdir())
    engine.save_checkpoint(tmp_path / "step-3", {"step": 3})
    engine.finish_checkpoint()
    engine.load_checkpoint(tmp_path / "step-3")
    engine.save_final(tmp_path / "final")
    assert (tmp_path / "step-3").is_dir() and (tmp_path / "final" / "config.json").is_file()


def test_streamed_optimizer_states_have_the_same_metrics_and_are_saved_piece_by_piece(
    budgeted, unlimited, exact, tmp_path
) -> None:
    engine, said, _ = budgeted
    stage = SFTConfig(data={"path": "x.jsonl"}, steps=3, learning_rate=1e-3)
    row = Trajectory(np.arange(5, 25, dtype=np.int32), np.ones(20, bool), np.full(20, np.nan, np.float32), "stop")
    folder, found = model_dir("deepseek"), []
    for limit in (None, 15.0):
        engine.load(folder, folder, stage)
        if limit:
            exact(limit)
        found.append([sft_step(engine, [row], stage, step, 3) for step in (1, 2)])
        engine.save_checkpoint(tmp_path / f"{limit}" / "step-2", {"step": 2})
        engine.finish_checkpoint()
        engine.take_metrics()
        found[-1].append(sft_step(engine, [row], stage, 3, 3))
        last = engine.take_metrics()["time/train"]
        assert not limit or engine._memory.residency._measured["train"] < 1.5 * last + 0.1  # not of all steps since
    assert found[0] == found[1]
    assert "optimizer" in said[0] and "disk -> host and back" in said[0]
    for saved in ("None", "15.0"):  # what was saved in either way continues in either way
        for limit in (15.0, None):
            engine.load(folder, folder, stage)
            exact(limit or 10_000)
            assert engine.load_checkpoint(tmp_path / saved / "step-2")["step"] == 2
            assert sft_step(engine, [row], stage, 3, 3) == found[0][2]


def test_a_reward_model_is_read_again_for_its_turn_and_may_end_before_the_stage(budgeted, tmp_path) -> None:
    engine, _, _ = budgeted
    begin(engine, config())
    folder = classifier_dir(tmp_path)
    judge = engine.reward_model(RewardConfig(path=str(folder)), str(folder))
    batch = Batch({"prompts": ["What is 2 plus 2?"], "completions": [" 4"]}, {})
    with engine.phase("score"):
        first = judge.call(batch).values
    full = pss(judge.worker)
    engine._move(lambda memory: memory.bring("checkpoint", ("parameters",)))
    assert full - pss(judge.worker) > 0.5 * ray.get(judge.worker.nbytes.remote())
    with engine.phase("score"):
        assert judge.call(batch).values == first
    judge.close()
    engine.save_final(tmp_path / "final")
    begin(engine, config())


def test_a_budget_that_cannot_work_is_said_before_the_first_step(budgeted, exact) -> None:
    engine, _, _ = budgeted
    begin(engine, config())
    exact(200)
    with pytest.raises(ResidencyError, match=r"generate: 0\.\d\d GiB of host are missing; .*: host 0\.2\d GiB"):
        run_steps(engine, config(steps=1))


def test_a_disk_that_fills_up_ends_the_run_with_that_cause_and_leaves_the_checkpoint(budgeted, exact, tmp_path) -> None:
    engine, _, disk = budgeted
    begin(engine, config())
    run_steps(engine, config(steps=1))
    engine.save_checkpoint(tmp_path / "step-1", {"step": 1, "stream": prompts().state()})
    engine.finish_checkpoint()
    begin(engine, config())
    sizes = {name: held.component.bytes / MIB for name, held in engine._memory.residency._held.items()}
    exact(sizes["KV cache"] + sizes["weights"])
    (rank,) = engine._ranks.values()
    ray.get(rank.fill_disk.remote(True))
    with pytest.raises(
        WorkerError, match=f"training rank 0: DiskError: .*memory.disk: {disk}: No space left on device"
    ):
        run_steps(engine, config())
    ray.get(rank.fill_disk.remote(False))
    begin(engine, config())
    assert engine.load_checkpoint(tmp_path / "step-1")["step"] == 1


@pytest.mark.slow
def test_a_model_of_more_than_100m_parameters_runs_within_two_thirds_of_what_its_parts_need(tmp_path: Path) -> None:
    """229M parameters, a reference, a KV cache: metrics as without a budget, the peak of all processes within it."""
    command = [
        "benchmarks/offload.py",
        "--disk",
        str(tmp_path),
        "--step",
        "6.2GiB",
        "--millions",
        "230",
        "--steps",
        "4",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert float(re.search(r"parts .*, ([\d.]+) x the budget", done.stdout)[1]) >= 1.5, done.stdout
    steps = re.findall(r"^step .* metrics (\w+); peak ([\d.]+) GiB, ([-+][\d.]+)% of the predicted", done.stdout, re.M)
    assert len(steps) == 4, done.stdout
    assert all(equal == "equal" and float(peak) <= 6.2 for equal, peak, _ in steps), done.stdout
    peaks = [float(peak) for _, peak, _ in steps]
    predicted = [float(peak) / (1 + float(error) / 100) for _, peak, error in steps]
    assert 0.9 <= max(peaks) / max(predicted) <= 1.1, done.stdout
