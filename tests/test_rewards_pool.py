"""Scoring in real worker processes: the arithmetic and TRL's convention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from reward_files import group, score, write_files

from rewards.config import RewardConfig
from rewards.pool import RewardPool


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("rewards"))


def test_a_reward_file_written_for_trl_runs_unchanged(folder: Path) -> None:
    names = ("reward_len", "reward_ids", "reward_func", "math_reward_func", "reward_by_progress", "async_reward")
    groups = [
        group(0, "a", ["b", r"\boxed{4}"], ground_truth="4", task="math"),
        group(1, "x", ["b", r"\boxed{4}"], ground_truth="5", task="code"),
    ]
    rewards = [{"function": f"trl_style.py:{name}"} for name in names]
    first, second = score(folder, rewards, groups, global_step=3, max_steps=12)
    ids = float(sum(map(ord, r"\boxed{4}")))
    parts = {"reward_len": [1, 9], "reward_ids": [98, ids], "reward_func": [0, 1], "math_reward_func": [1, 9],
             "reward_by_progress": [3, 3], "async_reward": [1, 0]}  # fmt: skip
    assert {name: values.tolist() for name, values in first.parts.items()} == parts
    assert first.total.tolist() == [1 + 98 + 0 + 1 + 3 + 1, 9 + ids + 1 + 9 + 3 + 0]
    assert np.isnan(second.parts["math_reward_func"]).all()  # None: not applicable
    assert second.total.tolist() == [1 + 98 + 0 + 3 + 0, 9 + ids + 0 + 3 + 0]
    assert first.extra == {"half": [0.5, 4.5], "progress": 0.25}
    assert first.total.dtype == np.float64


def test_trls_own_rewards_run_unchanged_on_conversations(folder: Path) -> None:
    chat = [{"role": "user", "content": "1/3?"}]
    completions = [r"<think>easy</think>It is \boxed{\frac{1}{3}}.", r"\boxed{\frac{1}{2}}"]
    rewards = [{"function": "trl.rewards:accuracy_reward"}, {"function": "trl.rewards:think_format_reward"}]
    rewards.append({"function": "trl_style.py:format_reward_func"})
    (scores,) = score(folder, rewards, [group(0, chat, completions, solution=r"$\frac{1}{3}$")])
    assert scores.parts["accuracy_reward"].tolist() == [1.0, 0.0]
    assert scores.parts["think_format_reward"].tolist() == [1.0, 0.0]
    assert scores.parts["format_reward_func"].tolist() == [0.0, 0.0]
    assert scores.extra["solution"] == [r"$\frac{1}{3}$"] * 2


def test_the_weighted_sum_leaves_out_what_does_not_apply(folder: Path) -> None:
    groups = [group(0, "p", ["abc"], task="math"), group(1, "p", ["abcd"], task="code")]
    lengths = {"function": "trl_style.py:reward_len", "weight": 0.5, "name": "length"}
    sometimes = {"function": "trl_style.py:math_reward_func", "weight": -2.0}
    first, second = score(folder, [lengths, sometimes], groups)
    assert first.total.tolist() == [0.5 * 3 - 2.0 * 3]
    assert second.total.tolist() == [0.5 * 4]
    assert first.parts["length"].tolist() == [3.0]
    _, alone = score(folder, [sometimes], groups)
    assert math.isnan(alone.total[0])


def test_every_kind_of_number_is_a_reward(folder: Path) -> None:
    (scores,) = score(folder, [{"function": "bad.py:numbers"}], [group(0, "p", list("abcdef"))])
    assert scores.parts["numbers"].tolist()[:5] == [1.0, 2.0, 0.5, 3.0, 0.0]
    assert math.isnan(scores.parts["numbers"][5])


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RewardPool]:
    configs = [RewardConfig(function="bad.py:counts"), RewardConfig(function="bad.py:mutates")]
    with RewardPool(configs, folder) as pool:
        yield pool


def test_a_worker_keeps_state_and_serves_submissions_in_order(pool: RewardPool) -> None:
    groups = [group(0, [{"role": "user", "content": "?"}], ["a"], tags=[])]
    futures = [pool.submit(groups, {}) for _ in range(20)]
    assert [future.result(60)[0].parts["counts"][0] for future in futures] == list(range(1, 21))


def test_values_changed_in_place_are_the_completions_own(pool: RewardPool) -> None:
    prompt = [{"role": "user", "content": "?"}]
    (scores,) = pool.submit([group(0, prompt, ["a", "b", "c"], tags=[])], {}).result(60)
    assert scores.parts["mutates"].tolist() == [2 + 10 * 1] * 3
    assert len(prompt) == 1


def test_a_column_that_some_rows_lack_is_none_there(folder: Path) -> None:
    groups = [group(0, "p", ["abc"], task="math"), group(1, "p", ["abcd"])]
    _, second = score(folder, [{"function": "trl_style.py:math_reward_func"}], groups)
    assert math.isnan(second.total[0])


def test_what_a_reward_prints_does_not_reach_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    score(folder, [{"function": "bad.py:raises"}], [group(0, "p", ["ok"])])
    out, err = capfd.readouterr()
    assert out == "" and "to standard output" in err
