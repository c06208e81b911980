"""One hand-over: every training rank's pieces into every rollout rank, bucket by bucket, verified at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ray import ObjectRef

from hybrid_engine.health import wait_all
from hybrid_engine.layout import RolloutRank
from hybrid_engine.train_worker import Sent
from rollout.weights import canary_error

CANARY_LIMIT = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest |log p_engine - log p_trainer| of a canary token, in nats, that passes; of the less precise of the two (in
bfloat16 of the median prompt)."""


class CanaryError(RuntimeError):
    """After a hand-over the engine does not compute what the trainer computes."""


@dataclass(frozen=True, slots=True)
class Parties:
    """The actors of a hand-over by name: training ranks, and rollout ranks with their `places`, in the same order."""

    training: Mapping[str, Any]
    rollout: Mapping[str, Any]
    places: Sequence[RolloutRank]

    def train(self, call: Callable[[Any], ObjectRef]) -> dict[str, ObjectRef]:
        """`call` to every training rank, not waited for."""
        return {name: call(actor) for name, actor in self.training.items()}

    def sample(self, call: Callable[[Any], ObjectRef]) -> dict[str, ObjectRef]:
        """`call` to every rollout rank, not waited for."""
        return {name: call(actor) for name, actor in self.rollout.items()}


def hand_over(
    parties: Parties, version: int, buckets: int, canary: Sequence[np.ndarray], precision: str
) -> dict[str, float]:
    """Send the weights as they are now; `handover/bytes`, `handover/canary` (the largest difference found), and the
    seconds `time/handover` and `time/canary` (what the comparison takes beyond them).

    While a bucket is loaded the next one is packed, and is published after it: at no time are there more than two.
    canary: prompts [T] whose next tokens trainer and engines compare, at the limit of `precision`.
    Raises WorkerError with the check that failed, CanaryError where an engine computes something else.
    """
    nbytes, begun = 0, time.perf_counter()
    for bucket in range(buckets):
        publishing = parties.train(lambda rank, number=bucket: rank.publish.remote(version, number))
        sent: list[Sent] = [parcel for parcels in wait_all(publishing, parties.rollout) for parcel in parcels]
        nbytes += sum(parcel.manifest.nbytes for parcel in sent)
        receiving = _deliver(parties, sent, first=bucket == 0, last=bucket + 1 == buckets)
        if bucket + 1 < buckets:
            parties.train(lambda rank, number=bucket + 1: rank.pack.remote(version, number))
        else:
            expected = parties.train(lambda rank: rank.canary.remote(canary))
            computed = parties.sample(lambda rank: rank.canary.remote(canary))
        del publishing, sent  # the references: what was loaded is freed
        wait_all(receiving, parties.training)
    loaded = time.perf_counter()
    largest = _compare(wait_all(computed, parties.training), wait_all(expected)[0], parties, version, precision)
    seconds = {"time/handover": loaded - begun, "time/canary": time.perf_counter() - loaded}
    return {"handover/bytes": float(nbytes), "handover/canary": largest} | seconds


def _deliver(parties: Parties, sent: Sequence[Sent], *, first: bool, last: bool) -> dict[str, ObjectRef]:
    """A bucket's parcels to every rollout rank that is to have them."""
    calls = {}
    for place, (name, actor) in zip(parties.places, parties.rollout.items(), strict=True):
        mine = [parcel for parcel in sent if parcel.receiver in (None, place.rank)]
        manifests = [parcel.manifest for parcel in mine]
        calls[name] = actor.receive.remote(manifests, first, last, *(parcel.buffer for parcel in mine))
    return calls


def _compare(computed: Sequence[Any], expected: np.ndarray, parties: Parties, version: int, precision: str) -> float:
    """The largest difference between an engine and the trainer; CanaryError where it is above the limit."""
    limit, largest = CANARY_LIMIT[precision], 0.0
    for name, answer in zip(parties.rollout, computed, strict=True):
        error = canary_error(answer, expected, median=precision != "float32")
        largest = max(largest, error)
        if not error <= limit:
            raise CanaryError(
                f"canary: after hand-over {version} {name} differs from the trainer by {error:.3g} nats "
                f"(limit {limit:g}): it does not hold, or does not use, the weights that were sent"
            )
    return largest
