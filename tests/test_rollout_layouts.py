"""Any training layout to any rollout layout: real shards over gloo, real vLLM in several processes, no Ray.

The weights of three hand-overs leave each training layout in pieces and buckets, and enter each rollout layout; what
the engine then samples must have the log-probabilities of Transformers' forward with the same weights.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from engine_host import EngineGroup, EngineHost, needs_capable_vllm
from ranks import run_ranks

from alignment.config import TrainConfig
from hybrid_engine.layout import rollout_ranks
from hybrid_engine.loading import fill, load_model
from hybrid_engine.sharding import make_meshes
from hybrid_engine.weight_sync import Receiver, WeightPacker
from rollout.config import RolloutConfig
from rollout.sampler import Request
from rollout.weights import HandoverError, Parcel

TOLERANCE = 1e-5
TRAINING = {
    "1 rank": TrainConfig(),
    "shard 2, expert 2": TrainConfig(shard=2, expert=2),
    "shard 4, expert 2": TrainConfig(shard=4, expert=2),
    "replicate 2 x shard 2": TrainConfig(replicate=2, shard=2),
}
ROLLOUT = {
    "1 engine": {},
    "2 replicas": {"replicas": 2},
    "TP 2": {"tensor": 2},
    "TP 2, EP": {"tensor": 2, "expert": True},
    "DP 2, EP": {"data": 2, "expert": True},
}
VERSIONS = (1, 2, 3)


def config(rollout: str) -> RolloutConfig:
    return RolloutConfig(max_length=96, max_num_seqs=32, memory=0.1, bucket_mb=1, **ROLLOUT[rollout])


slow = pytest.mark.slow
CELLS = [
    pytest.param(
        family,
        training,
        rollout,
        marks=[slow] * (not quick) + [needs_capable_vllm] * (config(rollout).world > 1),
    )
    for family, fast in (
        ("deepseek", {("shard 2, expert 2", "TP 2, EP"), ("shard 2, expert 2", "DP 2, EP")}),
        ("qwen3_moe", set()),
    )
    for rollout in ROLLOUT
    for training in TRAINING
    for quick in [(training, rollout) in fast]
]


@functools.cache
def weights(family: str, version: int) -> Path:
    """A model directory with the weights of a hand-over."""
    folder = tiny.model_dir(family) / f"version-{version}"
    tiny.random_model(tiny.CONFIGS[family](), seed=version).save_pretrained(folder)
    return folder


Buckets = list[dict[Receiver, Parcel]]


def _pack(folder: Path, train: TrainConfig, rollout: RolloutConfig, models: list[Path]) -> None:
    """On every rank: what it sends, of each version."""
    model = load_model(models[0], train, make_meshes(train, "cpu"), torch.device("cpu"))
    packer, sent = WeightPacker(model, rollout), []
    for version, path in zip(VERSIONS, models, strict=True):
        fill(model, path)
        # Packed again and again into the same buffers: each bucket is copied before the next.
        for bucket in range(packer.buckets):
            packed = packer.pack(version, bucket)
            sent.append({key: Parcel(parcel.manifest, parcel.buffer.copy()) for key, parcel in packed.items()})
    torch.save((packer.buckets, sent), folder / f"sent-{dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory):
    """(family, training layout, rollout layout) -> version -> buckets -> every rank's parcels, by receiver."""

    @functools.cache
    def parcels(family: str, training: str, rollout: str) -> dict[int, list[list[dict[Receiver, Parcel]]]]:
        folder, train = tmp_path_factory.mktemp("packed"), TRAINING[training]
        models = [weights(family, version) for version in VERSIONS]
        run_ranks(_pack, train.world, folder, train, config(rollout), models)
        ranks = [torch.load(folder / f"sent-{rank}.pt", weights_only=False) for rank in range(train.world)]
        count = ranks[0][0]
        assert all(buckets == count > 1 for buckets, _ in ranks)
        return {
            version: [[sent[i * count + bucket] for _, sent in ranks] for bucket in range(count)]
            for i, version in enumerate(VERSIONS)
        }

    return parcels


@pytest.fixture(scope="module")
def engines() -> Iterator:
    """(family, rollout layout) -> the engine, one at a time: two cores are few."""
    alive: dict[tuple[str, str], EngineGroup] = {}

    def engine(family: str, rollout: str) -> EngineGroup:
        if (family, rollout) not in alive:
            for key in list(alive):
                alive.pop(key).close()
            alive[family, rollout] = EngineGroup(tiny.model_dir(family), config(rollout))
        return alive[family, rollout]

    yield engine
    for group in alive.values():
        group.close()


def update(host: EngineHost, buckets: list[list[Parcel]]) -> None:
    for number, parcels in enumerate(buckets):
        first, last = number == 0, number + 1 == len(buckets)
        host.call(
            lambda engine, *given: engine.update_weights(given[0], first=given[1], last=given[2]), parcels, first, last
        )


def generate(host: EngineHost, requests: list[Request]):
    return host.call(lambda engine, given: [sample for part in engine.generate(given) for sample in part], requests)


def mine(buckets: list[list[dict[Receiver, Parcel]]], rank: int) -> list[list[Parcel]]:
    """A rollout rank's share of what every training rank sends."""
    return [
        [parcel for sent in ranks for receiver, parcel in sent.items() if receiver in (None, rank)] for ranks in buckets
    ]


@pytest.mark.parametrize(("family", "training", "rollout"), CELLS)
def test_log_probabilities_after_each_of_three_hand_overs(family, training, rollout, packed, engines) -> None:
    places, group = rollout_ranks(config(rollout)), engines(family, rollout)
    lanes = places[-1].lane + 1
    # One request more than lanes divide: the ranks of a lane that has ended go on for the others.
    prompts = [np.random.default_rng(seed).integers(2, 300, 5 + 9 * seed).astype(np.int32) for seed in range(5)]
    requests = [Request(prompt, 4 + 5 * i, temperature=1.0, seed=i) for i, prompt in enumerate(prompts)]
    for version in VERSIONS:
        buckets = packed(family, training, rollout)[version]
        group.each(update, [mine(buckets, place.rank) for place in places])
        answers = group.each(generate, [requests[place.lane :: lanes] for place in places])
        reference = tiny.random_model(tiny.CONFIGS[family](), seed=version)
        for place, samples in zip(places, answers, strict=True):
            assert len(samples) == len(requests[place.lane :: lanes])
            for sample in samples:
                ids = torch.tensor(sample.trajectory.token_ids, dtype=torch.long)[None]
                with torch.no_grad():
                    expected = reference(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].numpy()
                found = sample.trajectory.logprobs[1:]
                spoken = sample.trajectory.loss_mask[1:]
                assert np.abs(found - expected)[spoken].max() <= TOLERANCE
                assert sample.trajectory.version_spans[0].version == version


@needs_capable_vllm
@pytest.mark.parametrize(
    ("fault", "complaint"), [("left out", "shards: of tensor"), ("old", "version: buffers of hand-overs")]
)
def test_a_training_rank_whose_shard_is_missing_or_old_is_found(fault, complaint, packed, engines) -> None:
    rollout = "DP 2, EP"
    places, group = rollout_ranks(config(rollout)), engines("deepseek", rollout)
    sent = packed("deepseek", "shard 2, expert 2", rollout)
    buckets = [list(ranks) for ranks in sent[2]]
    buckets[1][1] = {} if fault == "left out" else sent[1][1][1]

    def refused(host: EngineHost, mine: list[list[Parcel]]) -> str:
        with pytest.raises(HandoverError) as caught:
            update(host, mine)
        return str(caught.value)

    for message in group.each(refused, [mine(buckets, place.rank) for place in places]):
        assert message.startswith(complaint)
