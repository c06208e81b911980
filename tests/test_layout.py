"""Ranks and what they hold: the arithmetic, and what does not divide."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import ray
from pydantic import ValidationError
from ranks import CONFIGS

from alignment.config import TrainConfig
from hybrid_engine import actors
from hybrid_engine.actors import devices, reserve
from hybrid_engine.layout import expert_layout, misfits, rollout_ranks
from rollout.config import RolloutConfig
from rollout.vllm.environment import Installed


def layout(shape: tuple[int, int, int]) -> TrainConfig:
    replicate, shard, expert = shape
    return TrainConfig(replicate=replicate, shard=shard, expert=expert)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 8, 2), (1, 4, 2)), ((2, 4, 8), (1, 1, 8)), ((4, 2, 4), (2, 1, 4)), ((2, 4, 2), (2, 2, 2))],
)
def test_the_ranks_beside_the_experts_shard_or_replicate_them(shape: tuple, expected: tuple) -> None:
    found = expert_layout(layout(shape))
    assert (found.replicate, found.shard, found.parallel) == expected


@pytest.mark.parametrize(
    ("family", "shape", "part"),
    [
        ("llama", (1, 2, 2), "train.expert: llama has no routed experts to lay over 2 ranks"),
        ("mixtral", (1, 8, 8), "train.expert: 8 ranks do not divide the model's 4 routed experts"),
        (
            "qwen3-moe",
            (1, 24, 8),
            "train.shard: `expert` 8 leaves 3 ranks to split each expert, and 3 does not divide 64",
        ),
        ("deepseek-v3", {"data": 3, "expert": True}, "rollout.expert: 3 ranks do not divide the model's 8"),
        ("llama-tied", {"tensor": 2, "expert": True}, "rollout.expert: llama has no routed experts"),
        ("llama", {"tensor": 3}, r"rollout.tensor: 3 does not divide the model's num_attention_heads \(4\)"),
        ("grouped", {"tensor": 8}, "rollout.tensor: of 8 and 3 key-value heads"),
        ("llama", (1, 4, 1), None),
        ("deepseek-v2", {"tensor": 4, "data": 2, "expert": True}, "rollout.data: vLLM's MoE layers then split the tok"),
        ("deepseek-v2", {"data": 4, "expert": True}, None),
        ("deepseek-v2", {"tensor": 2, "expert": True}, None),
    ],
)
def test_layouts_that_do_not_fit_the_model_are_refused(family: str, shape: tuple | dict, part: str | None) -> None:
    train, rollout = ({}, shape) if isinstance(shape, dict) else (layout(shape).model_dump(), {})
    model = CONFIGS["llama"].to_dict() | {"num_attention_heads": 24, "num_key_value_heads": 3}
    model = model if family == "grouped" else CONFIGS[family].to_dict()
    found = misfits(TrainConfig(**train), RolloutConfig(**rollout), model)
    problems = [f"{section}.{key}: {problem}" for section, key, problem in found]
    assert re.match(part, problems[0]) if part else not problems


@pytest.mark.parametrize(("family", "refused"), [("deepseek-v2", True), ("qwen3-moe", False)])
def test_float32_rollouts_of_mla_are_refused_on_cuda(
    family: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every MLA backend of vLLM 0.25 and 0.32 for CUDA names float16 and bfloat16 as its dtypes."""
    model, train = CONFIGS[family].to_dict(), TrainConfig()
    assert not list(misfits(train, RolloutConfig(), model))
    monkeypatch.setattr("hybrid_engine.layout.installed", lambda: Installed((0, 25), "cuda"))
    assert [key for _, key, _ in misfits(train, RolloutConfig(memory=0.3), model)] == ["dtype"] * refused
    assert [key for _, key, _ in misfits(train, RolloutConfig(dtype="bfloat16"), model)] == ["memory"], "all of it"
    assert not list(misfits(train, RolloutConfig(dtype="bfloat16", memory=0.3), model))


@pytest.mark.parametrize(
    ("shape", "part"),
    [
        ((1, 4, 3), r"`expert` \(3\) does not divide the 4 ranks of `replicate` x `shard`"),
        ((3, 2, 3), "one must divide the other"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(shape: tuple, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        layout(shape)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"expert": True}, "`expert` needs an engine of several ranks"),
        ({"data": 2}, "`data` above 1 needs `expert: true`"),
        ({"tensor": 0}, "greater than or equal to 1"),
    ],
)
def test_layouts_that_make_no_sense_are_refused(layout: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RolloutConfig(**layout)


def test_ranks_share_devices_or_have_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    train = TrainConfig(shard=4)
    assert devices(train, RolloutConfig(tensor=2)) == (range(4), range(2))
    assert devices(train, RolloutConfig(tensor=2, replicas=3, placement="split")) == (range(4), range(4, 10))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 8.0})
    with pytest.raises(ValueError, match="need 10 CUDA devices, the cluster has 8"):
        reserve(10)


def test_an_actor_gets_its_share_of_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict = {}
    started = SimpleNamespace(remote=lambda *arguments: arguments)
    monkeypatch.setattr(
        ray, "remote", lambda cls: SimpleNamespace(options=lambda **options: asked.update(options) or started)
    )
    monkeypatch.setattr(actors, "PlacementGroupSchedulingStrategy", lambda group, **at: (group, at))
    assert actors.launch(object, (1, 2), 1, {}, "group", 3, 0.5) == (1, 2)
    assert asked["num_gpus"] == 0.5
    assert asked["scheduling_strategy"] == ("group", {"placement_group_bundle_index": 3})
    asked.clear()
    actors.launch(object, (), 1, {}, None, 3, 0.5)
    assert asked["num_gpus"] == 0 and "scheduling_strategy" not in asked


def test_ranks_of_a_lane_follow_each_other() -> None:
    places = rollout_ranks(RolloutConfig(replicas=2, tensor=2, data=2, expert=True))
    assert [place.name for place in places][4:6] == ["rollout engine 1 rank 0", "rollout engine 1 rank 1"]
    assert [place.lane for place in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [place.answers for place in places] == [True, False] * 4
    assert [place.name for place in rollout_ranks(RolloutConfig(replicas=2))] == [
        "rollout engine 0",
        "rollout engine 1",
    ]
