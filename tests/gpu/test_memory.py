"""Offloading on a CUDA device: tensors leave it for pinned memory and disk, and a run within a budget goes through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_run import RECIPE, align, finish, metrics, write_recipe

from hybrid_engine.offload import Offloader, Place

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


@pytest.mark.gpu
def test_a_recipe_runs_within_a_budget(tmp_path: Path) -> None:
    """vLLM sleeps and wakes; hand-overs are verified and the mismatch is limited, so weights that came back wrong would
    end the run. All the trainer has fits: nothing of it leaves the device here."""
    recipe = RECIPE + "memory: {device: 70GiB, disk: ./scratch}\n"
    output = finish(align("run", str(write_recipe(tmp_path, recipe)), "--output", str(tmp_path / "run")))
    assert "Memory, phase by phase" in output
    steps = metrics(tmp_path / "run", "02-grpo")
    assert len(steps) == 6 and all(0 < step["memory/measured"] <= 70 for step in steps)
