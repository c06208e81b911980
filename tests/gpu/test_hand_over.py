"""On CUDA devices: weights into live engines by CUDA IPC and over NCCL, in every layout, in two buckets of memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from engine_host import EngineHost
from test_engine import begin, config, run_steps, start
from test_vllm_handover import canary, generate

from hybrid_engine.hand_over import CANARY_LIMIT, Sender, Sent, canary_prompts, received
from hybrid_engine.rollout_worker import CANARY_TOP
from hybrid_engine.weight_sync import WeightPacker
from rollout.config import RolloutConfig
from rollout.sampler import Request
from rollout.vllm.environment import environment
from rollout.weights import HandoverError, canary_error, device_digests

pytestmark = pytest.mark.gpu

DTYPES = {"deepseek": "bfloat16", "qwen3_moe": "float32"}
"""vLLM's MLA kernels for CUDA know no float32."""


def rollout(family: str) -> RolloutConfig:
    return RolloutConfig(max_length=256, max_num_seqs=32, memory=0.1, bucket_mb=1, dtype=DTYPES[family])


@pytest.fixture(params=DTYPES, scope="module")
def engine(request: pytest.FixtureRequest) -> Iterator[tuple[str, EngineHost]]:
    """A model's name, and its engine in a process of its own on the device of this one."""
    folder, settings = tiny.model_dir(request.param), rollout(request.param)

    def make() -> Any:
        from rollout.vllm.engine import VllmEngine

        return VllmEngine(folder, settings, dummy=True)

    host = EngineHost(make, environment(settings))
    yield request.param, host
    host.close()


def take(engine: Any, first: bool, last: bool, published: list[list[Sent]]) -> None:
    engine.update_weights(received(published, 0, "cuda", None), first=first, last=last)


def training_rank(family: str, seed: int) -> tuple[torch.nn.Module, WeightPacker, Sender]:
    model = tiny.random_model(tiny.CONFIGS[family](), seed=seed).cuda()
    return model, WeightPacker(model, rollout(family)), Sender([(0, "ipc")], torch.device("cuda"), None)


def hand_over(sender: Sender, packer: WeightPacker, version: int, host: EngineHost) -> None:
    """As the hybrid engine does it, one step after the other."""
    for bucket in range(packer.buckets):
        sent = sender.publish(packer.pack(version, bucket, sender.room(packer.nbytes)))
        host.call(take, bucket == 0, bucket + 1 == packer.buckets, [sent])


def test_three_hand_overs_by_ipc_agree_with_the_trainer_and_take_two_buckets(engine: tuple[str, EngineHost]) -> None:
    family, host = engine
    precision = DTYPES[family]
    prompts = canary_prompts(tiny.VOCAB_SIZE, 96, 9)
    for version in (1, 2, 3):
        model, packer, sender = training_rank(family, seed=version)
        assert packer.buckets > 1
        torch.cuda.ipc_collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        hand_over(sender, packer, version, host)
        above = torch.cuda.max_memory_allocated() - before
        assert above < 2.5 * packer.nbytes + 2**25, "two buckets, and what a digest needs for some lines"
        del sender
        torch.cuda.ipc_collect()
        assert torch.cuda.memory_allocated() <= before, "a handle that was not closed keeps its memory"
        with torch.no_grad():
            logits = model(torch.tensor(np.stack(prompts), dtype=torch.long, device="cuda")).logits[:, -1]
        expected, found = logits.log_softmax(-1).cpu().numpy(), host.call(canary, prompts, CANARY_TOP)
        assert canary_error(found, expected, median=precision != "float32") < CANARY_LIMIT[precision]
        samples = host.call(generate, [Request(prompt, 8, temperature=0.7, seed=5) for prompt in prompts])
        assert all(sample.trajectory.version_spans[0].version == version for sample in samples)


def test_bytes_that_change_after_they_left_are_refused_by_name(engine: tuple[str, EngineHost]) -> None:
    family, host = engine
    _, packer, sender = training_rank(family, seed=4)
    room = sender.room(packer.nbytes)
    sent = sender.publish(packer.pack(4, 0, room))
    piece = sent[0].manifest.pieces[0]
    room[piece.offset + 1] ^= 4
    torch.cuda.synchronize()
    with pytest.raises(HandoverError, match=f"^digest: tensor {piece.name} differs"):
        host.call(take, True, True, [sent])


def test_digests_of_the_device_equal_the_hosts(engine: tuple[str, EngineHost]) -> None:
    family, host = engine
    _, packer, sender = training_rank(family, seed=5)
    hand_over(sender, packer, 5, host)
    for bucket in range(packer.buckets):
        (parcel,) = packer.pack(6, bucket, sender.room(packer.nbytes)).values()
        assert device_digests(parcel.buffer.cpu(), parcel.manifest.pieces) == parcel.manifest.digests


@pytest.mark.parametrize("family", DTYPES)
def test_a_device_packs_the_bytes_that_the_host_packs(family: str) -> None:
    _, packer, sender = training_rank(family, seed=6)
    on_host = WeightPacker(tiny.random_model(tiny.CONFIGS[family](), seed=6), rollout(family))
    for bucket in range(packer.buckets):
        (parcel,) = packer.pack(6, bucket, sender.room(packer.nbytes)).values()
        (expected,) = on_host.pack(6, bucket).values()
        assert parcel.manifest.pieces == expected.manifest.pieces
        assert parcel.buffer.cpu().numpy().tobytes()[: expected.buffer.nbytes] == expected.buffer.tobytes()


LAYOUTS = {
    "IPC, one device": (1, {}, {}),
    "IPC, two ranks, TP 2 + EP": (2, {"shard": 2, "expert": 2}, {"tensor": 2, "expert": True}),
    "IPC, two ranks, DP 2 + EP": (2, {"shard": 2, "expert": 2}, {"data": 2, "expert": True}),
    "IPC, two ranks, two replicas": (2, {"shard": 2}, {"replicas": 2}),
    "NCCL, one rank, one engine": (2, {}, {"placement": "split"}),
    "NCCL, two ranks, TP 2 + EP": (4, {"shard": 2, "expert": 2}, {"placement": "split", "tensor": 2, "expert": True}),
    "NCCL, two ranks, two replicas": (4, {"shard": 2}, {"placement": "split", "replicas": 2}),
}
"""Devices that it needs, training, rollout."""


def three_steps(train: dict, layout: dict) -> list[dict]:
    """The hand-over's own checks and the canary are on: a wrong weight would end the run."""
    engine = start({"memory": 0.1, "bucket_mb": 1, "dtype": "bfloat16"} | layout, **train)
    try:
        begin(engine, config())
        done = run_steps(engine, config())
    finally:
        engine.close()
    assert all(step["updates"] == 1 and step["grad_norm"] > 0 for step in done)
    assert all(step["handover/canary"] < CANARY_LIMIT["bfloat16"] and step["mismatch/k3"] < 0.1 for step in done)
    return done


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_three_steps_with_verified_hand_overs(layout: tuple[int, dict, dict]) -> None:
    count, train, rollout = layout
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} CUDA devices, there are {torch.cuda.device_count()}")
    three_steps(train, rollout)


def test_compiled_engines_with_their_graphs_take_new_weights() -> None:
    three_steps({}, {"eager": False})


def test_with_routing_replay_the_trainer_uses_the_experts_that_vllm_chose() -> None:
    assert all(step["mismatch/experts"] == 0 for step in three_steps({"routing_replay": True}, {}))


def test_the_way_to_another_host_on_one_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hybrid_engine.hand_over.way", lambda *places: "host")
    three_steps({}, {})
