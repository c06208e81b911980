"""One hand-over: every training rank's pieces into every rollout rank, bucket by bucket, verified at the end."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hybrid_engine.health import wait_all
from hybrid_engine.layout import RolloutRank
from hybrid_engine.transport import Sent, way
from rollout.weights import canary_error

CANARY_LIMIT = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest |log p_engine - log p_trainer| of a canary token, in nats, that passes; of the less precise of the two (in
bfloat16 of the median prompt)."""

Actors = Mapping[str, Any]  # Ray actors by the name that messages give them


class CanaryError(RuntimeError):
    """After a hand-over the engine does not compute what the trainer computes."""


def connect(training: Actors, rollout: Actors, places: Sequence[RolloutRank], device: str, split: bool) -> None:
    """Choose, once, the way between every training and every rollout rank, and tell them."""
    actors = {**training, **rollout}
    found = dict(zip(actors, wait_all({name: a.address.remote() for name, a in actors.items()}), strict=True))
    meeting = (*found[places[0].name], len(actors)) if device == "cuda" and split else None
    calls = {place.name: rollout[place.name].connect.remote(n, device, meeting) for n, place in enumerate(places)}
    for name, rank in training.items():
        ways = [(place.rank, way(found[name][0], found[place.name][0], device, split)) for place in places]
        calls[name] = rank.connect.remote(ways, meeting)
    wait_all(calls)


def hand_over(
    training: Actors, rollout: Actors, version: int, buckets: int, canary: Sequence[np.ndarray], precision: str,
    loaded: Callable[[], None],
) -> dict[str, float]:  # fmt: skip
    """Send the weights as they are now; `handover/bytes`, `handover/canary` (the largest difference found), and the
    seconds `time/handover` and `time/canary` (what the comparison takes beyond them).

    While a bucket is loaded the next one is packed, and is published after it: the sender holds two at most.
    canary: prompts [T] whose next tokens trainer and engines compare, at the limit of `precision`. loaded: called when
    the weights are in and the trainer has been asked about the canary; then the engines are.
    Raises WorkerError with the check that failed, CanaryError where an engine computes something else.
    """
    nbytes, begun = 0, time.perf_counter()
    for bucket in range(buckets):
        first, last = bucket == 0, bucket + 1 == buckets
        publishing = {name: rank.publish.remote(version, bucket) for name, rank in training.items()}
        receiving = {name: rank.receive.remote(first, last, *publishing.values()) for name, rank in rollout.items()}
        sent: list[Sent] = [parcel for parcels in wait_all(publishing) for parcel in parcels]
        if any(chosen == "nccl" for parcel in sent for chosen, _ in parcel.tickets.values()):
            receiving |= {name: rank.send.remote() for name, rank in training.items()}
        nbytes += sum(parcel.manifest.nbytes for parcel in sent)
        for rank in () if last else training.values():
            rank.pack.remote(version, bucket + 1)
        del publishing, sent  # the references: what was loaded is freed
        wait_all(receiving, training)
    arrived, largest = time.perf_counter(), 0.0
    expected = {name: rank.canary.remote(canary) for name, rank in training.items()}
    loaded()
    checked = time.perf_counter()
    computed = {name: rank.canary.remote(canary) for name, rank in rollout.items()}
    trainer_V = wait_all(expected, rollout)[0]
    for name, answer in zip(rollout, wait_all(computed, training), strict=True):
        error = canary_error(answer, trainer_V, median=precision != "float32")
        largest = max(largest, error)
        if not error <= CANARY_LIMIT[precision]:
            raise CanaryError(
                f"canary: after hand-over {version} {name} differs from the trainer by {error:.3g} nats "
                f"(limit {CANARY_LIMIT[precision]:g}): it does not hold, or does not use, the weights that were sent"
            )
    seconds = {"time/handover": arrived - begun, "time/canary": time.perf_counter() - checked}
    return {"handover/bytes": float(nbytes), "handover/canary": largest} | seconds


def canary_prompts(vocabulary: int, max_length: int, count: int) -> list[np.ndarray]:
    """Fixed random prompts [T] int32, longer than a block of the prefix cache: stale prefixes then show, too."""
    return list(np.random.default_rng(0).integers(0, vocabulary, (count, min(40, max_length - 1))).astype(np.int32))
