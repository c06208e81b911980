"""On a CUDA device: a small recipe from end to end, and log-probabilities and updates equal to the CPU's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from test_run import RECIPE, align, finish, metrics, write_recipe
from transformers import AutoModelForCausalLM

from alignment.config import TrainConfig
from alignment.logprobs import TREE_ATTENTION
from alignment.losses import sft_loss
from alignment.policy import RankPolicy
from alignment.protocols import TrainRow
from alignment.routing import Routing
from hybrid_engine.sharding import clip_grad_norm
from rollout.types import Trajectory


def rows() -> list[TrainRow]:
    """Two groups of four sequences with a shared prompt each."""
    rng = np.random.default_rng(0)
    made = []
    for group in range(2):
        prompt = rng.integers(3, tiny.VOCAB_SIZE, 6)
        for length in rng.integers(2, 12, 4):
            tokens = np.concatenate([prompt, rng.integers(3, tiny.VOCAB_SIZE, length)]).astype(np.int32)
            spoken = np.arange(len(tokens)) >= len(prompt)
            trajectory = Trajectory(tokens, spoken, np.full(len(tokens), np.nan, np.float32), "stop")
            made.append(TrainRow(trajectory, group, len(tokens), 1.0, 0.01))
    return made


def policy(family: str, device: str) -> RankPolicy:
    model = AutoModelForCausalLM.from_pretrained(
        tiny.model_dir(family), attn_implementation=TREE_ATTENTION, dtype=torch.float32
    ).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    parameters = list(model.parameters())
    clip, routing = (lambda norm: clip_grad_norm(parameters, norm)), Routing(model, TrainConfig())
    return RankPolicy(model, optimizer, 64, clip, lambda last: None, lambda: None, routing)


@pytest.mark.gpu
@pytest.mark.parametrize("family", tiny.CONFIGS)
def test_logprobs_and_updates_equal_the_cpus(family: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        held = policy(family, device)
        before = held.logprobs(rows(), temperature=0.7)
        stats = held.update(rows(), sft_loss, learning_rate=0.1, temperature=0.7, max_grad_norm=1.0)
        found[device] = np.concatenate(before + held.logprobs(rows(), temperature=0.7)), stats
    (cpu, cpu_stats), (cuda, cuda_stats) = found["cpu"], found["cuda"]
    assert not np.allclose(cpu[: len(cpu) // 2], cpu[len(cpu) // 2 :], atol=1e-3), "the update changed nothing"
    np.testing.assert_allclose(cuda, cpu, atol=1e-4)
    assert cuda_stats.grad_norm == pytest.approx(cpu_stats.grad_norm, rel=1e-3)


@pytest.mark.gpu
def test_a_recipe_runs_with_verified_hand_overs(tmp_path: Path) -> None:
    """The hand-over's checks and the mismatch limit are on: a wrong weight would end the run."""
    recipe = write_recipe(tmp_path, RECIPE.replace("memory: 0.25", "memory: 0.1, dtype: bfloat16"))
    finish(align("run", str(recipe), "--output", str(tmp_path / "run")))
    steps = metrics(tmp_path / "run", "02-grpo")
    assert len(steps) == 6
    assert all(step["mismatch/p99"] < 0.1 for step in steps)
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "02-grpo" / "final")
    assert all(bool(torch.isfinite(parameter).all()) for parameter in final.parameters())
