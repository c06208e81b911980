"""Offloading on a CUDA device: tensors leave it for pinned memory and disk, and a run within a budget goes through."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from engine_host import EngineHost
from test_run import RECIPE, align, finish, metrics, write_recipe

from hybrid_engine.offload import Offloader, Place
from rollout.config import RolloutConfig
from rollout.sampler import Request
from rollout.vllm.environment import environment

DEVICE, HOST, DISK = (frozenset({tier}) for tier in ("device", "host", "disk"))


@pytest.mark.gpu
def test_what_leaves_the_device_frees_it_and_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = [torch.randn(4099, 2053, device="cuda"), torch.randn(17, device="cuda").bfloat16()]
    before, held = [tensor.clone() for tensor in tensors], torch.cuda.memory_allocated()
    moved = Offloader(torch.device("cuda"), tmp_path)
    moved.add("p", [lambda: tensors], sum(tensor.nbytes for tensor in tensors))
    for below in (HOST, DISK, HOST):
        tensors[0].mul_(1.0)  # still on its way when the copy is asked for
        moved.place([Place("p", 0, below)])
        assert held - torch.cuda.memory_allocated() >= tensors[0].numel() * 4
        moved.place([Place("p", 0, DISK if below == HOST else HOST), Place("p", 0, DEVICE)])
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert all(speed > 1e8 for pair in moved.speeds().values() for speed in pair)


def sleep_and_wake(engine: Any, parcels: list, requests: list[Request]) -> tuple[list, list, list[int]]:
    """Completions before and after the engine gave everything up; the device's free bytes at each point."""

    def free() -> int:
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0]

    def sampled() -> list[list[int]]:
        found = [sample for finished in engine.generate(requests) for sample in finished]
        return [sample.trajectory.token_ids.tolist() for sample in sorted(found, key=lambda sample: sample.index)]

    engine.update_weights(parcels)
    before, frees = sampled(), [free()]
    sizes = engine.give_up()
    frees.append(free())
    engine.hold({"weights"})
    frees.append(free())
    engine.update_weights(parcels)
    engine.hold({"weights", "KV cache"})
    frees.append(free())
    after = sampled()
    engine.hold({"weights"})  # the cache alone is given up, and with it what the weights are
    engine.hold({"weights", "KV cache"})
    engine.update_weights(parcels)
    return before, [after, sampled()], [*frees, sizes["weights"], sizes["KV cache"]]


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_vllm_sleeps_and_wakes_in_stages_and_samples_the_same(family: str) -> None:
    settings = RolloutConfig(max_length=256, max_num_seqs=32, memory=0.1, dtype="bfloat16")
    folder = tiny.model_dir(family)

    def make() -> Any:
        from rollout.vllm.engine import VllmEngine

        return VllmEngine(folder, settings, dummy=True, sleeps=True)

    host = EngineHost(make, environment(settings))
    try:
        parcels = tiny.pack(tiny.random_model(tiny.CONFIGS[family](), seed=3), 1)
        requests = [Request(np.arange(5 + i, 60 + i, dtype=np.int32), 8, temperature=0.0) for i in range(4)]
        before, (after, again), numbers = host.call(sleep_and_wake, parcels, requests)
    finally:
        host.close()
    awake, asleep, weights, whole, held_weights, cache = numbers
    assert before == after == again
    assert asleep - awake > 0.95 * (held_weights + cache), "freed for true"
    assert asleep - weights >= held_weights and weights - whole > 0.95 * cache


@pytest.mark.gpu
def test_a_recipe_runs_within_a_budget(tmp_path: Path) -> None:
    """vLLM sleeps and wakes; hand-overs are verified and the mismatch is limited, so weights that came back wrong would
    end the run. All the trainer has fits: nothing of it leaves the device here."""
    recipe = (
        RECIPE.replace("memory: 0.25", "memory: 0.1, dtype: bfloat16") + "memory: {device: 70GiB, disk: ./scratch}\n"
    )
    output = finish(align("run", str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "run")))
    assert "Memory, phase by phase" in output
    steps = metrics(tmp_path / "run", "02-grpo")
    assert len(steps) == 6 and all(0 < step["memory/measured"] <= 70 for step in steps)


@pytest.mark.gpu
def test_steps_within_a_budget_that_moves_are_those_without(tmp_path: Path) -> None:
    """The benchmark's: 800M parameters, all that is held in turn takes about 1.7 times the budget."""
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "offload.py"
    how = ["--step", "11GiB", "--millions", "800", "--steps", "3", "--no-all-moved", "--disk", str(tmp_path)]
    done = subprocess.run([sys.executable, str(script), *how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert float(re.search(r"([\d.]+) x the budget", done.stdout)[1]) > 1.3
    norms = re.findall(r"gradient's norm ([\d.e+-]+), ([\d.e+-]+)\)", done.stdout)
    assert len(norms) == 3
    for free, within in norms:
        assert float(within) == pytest.approx(float(free), rel=1e-4)
    peaks = re.findall(r"peak ([\d.]+) GiB", done.stdout)
    assert all(float(peak) <= 11 for peak in peaks)
