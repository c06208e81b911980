"""From rewards to rows: weights by hand, and who is left out of what."""

from __future__ import annotations

import numpy as np
import pytest

from alignment.batch import grpo_minibatches, split_over_ranks
from alignment.config import GRPOConfig
from alignment.protocols import TrainRow
from rollout.types import Completion, Group, Handle, Prompt, Scores


def config(**changes) -> GRPOConfig:
    base = {"prompts": {"path": "x.jsonl"}, "rewards": [{"function": "m:f"}], "steps": 1, "prompts_per_step": 2}
    return GRPOConfig(**base | {"completions": 2} | changes)


def group(index: int, rewards: list[float], lengths: list[int], reasons: list[str] | None = None) -> Group:
    reasons = reasons or ["stop"] * len(lengths)
    completions = tuple(
        Completion("", np.zeros(n, np.int32), reason, Handle("ref", 10 * index + g))
        for g, (n, reason) in enumerate(zip(lengths, reasons, strict=True))
    )
    scores = Scores(np.array(rewards), {}, {})
    return Group(Prompt(index, "", np.zeros(3, np.int32), {}), completions, scores)


def test_token_weights_divide_by_all_tokens_of_the_batch_over_its_updates() -> None:
    groups = [group(0, [1, 0], [2, 4]), group(1, [0, 1], [3, 1])]
    (rows,) = grpo_minibatches(groups, config())
    assert [row.weight for row in rows] == pytest.approx([1 / 10] * 4)
    first, second = grpo_minibatches(groups, config(updates_per_batch=2))
    assert [row.weight for row in first + second] == pytest.approx([1 / 5] * 4)
    assert [row.group for row in first] == [0, 0] and [row.group for row in second] == [1, 1]
    assert [row.length for row in first] == [5, 7]


def test_sequence_weights_average_over_a_completion_then_over_completions() -> None:
    (rows,) = grpo_minibatches([group(0, [1, 0], [2, 4]), group(1, [0, 1], [3, 1])], config(normalize="sequence"))
    assert [row.weight for row in rows] == pytest.approx([1 / (2 * 4), 1 / (4 * 4), 1 / (3 * 4), 1 / (1 * 4)])


def test_groups_without_signal_are_skipped_but_stay_in_the_denominator() -> None:
    groups = [group(0, [1, 1], [2, 4]), group(1, [0, 1], [3, 1])]
    (rows,) = grpo_minibatches(groups, config())
    assert [row.trajectory.index for row in rows] == [10, 11]
    assert [row.weight for row in rows] == pytest.approx([1 / 10] * 2)
    (rows,) = grpo_minibatches(groups, config(kl=0.1))
    assert len(rows) == 4 and [row.advantage for row in rows[:2]] == [0, 0]


def test_truncated_completions_train_are_masked_or_get_nothing() -> None:
    groups = [group(0, [1, 0], [2, 4], ["length", "stop"]), group(1, [0, 1], [3, 1])]
    assert len(grpo_minibatches(groups, config())[0]) == 4
    (masked,) = grpo_minibatches(groups, config(truncated="mask"))
    assert [row.trajectory.index for row in masked] == [1, 10, 11]
    assert masked[0].advantage < 0  # the masked one still counts in the group's mean
    assert [row.weight for row in masked] == pytest.approx([1 / 8] * 3)
    (rows,) = grpo_minibatches(groups, config(truncated="mask", normalize="sequence"))
    assert rows[0].weight == pytest.approx(1 / (4 * 4))  # TRL: still one of four completions
    (zero,) = grpo_minibatches(groups, config(truncated="zero"))
    assert [row.trajectory.index for row in zero] == [10, 11]  # group 0 now has rewards 0, 0: no signal


def test_a_masked_reward_leaves_group_loss_and_denominator() -> None:
    groups = [group(0, [np.nan, 0], [2, 4]), group(1, [0, 1], [3, 1])]
    (rows,) = grpo_minibatches(groups, config(normalize="sequence"))
    assert [row.trajectory.index for row in rows] == [10, 11]
    assert rows[0].weight == pytest.approx(1 / (3 * 3))


def test_ranks_get_whole_groups_of_balanced_size() -> None:
    rows = [TrainRow(Handle(None, i), i // 2, n, 1.0, 1.0) for i, n in enumerate([9, 9, 5, 5, 4, 4, 1, 1])]
    parts = split_over_ranks(rows, 2)
    assert sorted(i for part in parts for i in part) == list(range(8))
    assert [sum(rows[i].length for i in part) for part in parts] == [20, 18]
    for part in parts:
        assert all((i ^ 1) in part for i in part)
    assert split_over_ranks(rows[:2], 2) == [[0, 1], []]
