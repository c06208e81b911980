"""One hand-over: every training rank's pieces into every rollout rank, bucket by bucket, verified at the end. A bucket
travels through the host, by CUDA IPC, or over NCCL."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import ray
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from hybrid_engine.actors import wait_all
from hybrid_engine.layout import RolloutRank
from hybrid_engine.weight_sync import Receiver
from rollout.weights import ALIGNMENT, Parcel, WeightManifest, canary_error

CANARY_LIMIT = {"float32": 1e-4, "bfloat16": 0.5}
"""Largest |log p_engine - log p_trainer| of a canary token, in nats, that passes; of the less precise of the two (in
bfloat16 of the median prompt)."""
Actors = Mapping[str, Any]  # Ray actors by the name that messages give them
Way = Literal["host", "ipc", "nccl"]
Meeting = tuple[str, int, int]  # host, port and size of the NCCL group: every rollout rank, then every training rank
Nccl = Any  # a `NcclGroup`, or None where nothing goes over NCCL: its module takes seconds in a training rank


class CanaryError(RuntimeError):
    """After a hand-over the engine does not compute what the trainer computes."""


def way(sender: str, receiver: str, device: str, split: bool) -> Way:
    """The way between two ranks, by their hosts' addresses. NCCL needs a device for each. Where ranks share them, one
    opens the other's memory (of another device by peer access), but only within a host."""
    if device == "cpu" or not (split or sender == receiver):
        return "host"
    return "nccl" if split else "ipc"


@dataclass(frozen=True, slots=True)
class Sent:
    """A parcel on its way. tickets: number of a rollout rank -> way, and Ray's reference, IPC handle, or NCCL rank."""

    manifest: WeightManifest
    tickets: Mapping[int, tuple[Way, Any]]


class Sender:
    """A training rank's end. ways: each rollout rank's rank in its engine, and the way to it. device: where buckets are
    packed; None: on the host."""

    def __init__(self, ways: Sequence[tuple[int, Way]], device: torch.device | None, group: Nccl) -> None:
        self._ways, self._device, self._group = ways, device, group
        self._rooms: list[torch.Tensor] = []

    def room(self, nbytes: int) -> torch.Tensor | None:
        """Device memory for a bucket (uint8 [nbytes], zeros). The one before stays, for it may still be read; whoever
        asks knows that those before were loaded."""
        if self._device is None:
            return None
        del self._rooms[:-1]
        # Not the same again, but what torch has cached of it: each export of a tensor adds to what is freed with it.
        self._rooms.append(torch.zeros(nbytes, dtype=torch.uint8, device=self._device))
        return self._rooms[-1]

    def publish(self, parcels: Mapping[Receiver, Parcel]) -> list[Sent]:
        """Tickets to a bucket's parcels: copies of those on the host; those on a device must stay until loaded."""
        self._leaving, sent = [], []
        for receiver, parcel in parcels.items():
            ways = {number: how for number, (rank, how) in enumerate(self._ways) if receiver in (None, rank)}
            ref, tickets = None, {}
            if "host" in ways.values():
                ref = ray.put(parcel.buffer if isinstance(parcel.buffer, np.ndarray) else parcel.buffer.cpu().numpy())
            for number, how in ways.items():
                if how == "nccl":
                    self._leaving.append((parcel.buffer, number))
                    tickets[number] = how, self._group.rank
                else:  # a handle each: torch counts who has closed it
                    tickets[number] = how, reduce_tensor(parcel.buffer)[1] if how == "ipc" else ref
            sent.append(Sent(parcel.manifest, tickets))
        return sent

    def send(self) -> None:
        """Send over NCCL what was published last. All ranks keep one order of transfers, by sender, parcel, receiver:
        the first that is not done finds both its ends free, so none waits for ever."""
        for buffer, number in self._leaving:
            self._group.send(buffer, number)


def received(published: Sequence[list[Sent]], number: int, device: str | None, group: Nccl) -> list[Parcel]:
    """The parcels of a rollout rank out of what each training rank published, in memory of their own (vLLM keeps
    tensors of a layer until it is complete), on `device` or, with None, on the host."""
    mine = [(sent.manifest, *sent.tickets[number]) for sents in published for sent in sents if number in sent.tickets]
    hosted = iter(ray.get([what for _, how, what in mine if how == "host"]))
    parcels = []
    for manifest, how, what in mine:
        if how == "nccl":
            buffer = group.receive(-(-manifest.nbytes // ALIGNMENT) * ALIGNMENT, what)
        elif how == "ipc":
            buffer = opened(what).clone()
        else:
            buffer = next(hosted) if device is None else torch.as_tensor(next(hosted)).to(device)
        parcels.append(Parcel(manifest, buffer))
    return parcels


def opened(handle: tuple[Any, ...]) -> torch.Tensor:
    """Another process's device memory, as if it were of this one's device; it is closed with the tensor."""
    # Its device has another number here, if any. Its event need not be waited for: a digest ended the writing.
    return rebuild_cuda_tensor(*handle[:6], torch.cuda.current_device(), *handle[7:-1], False)


def join(meeting: Meeting | None, rank: int) -> Nccl:
    """Form the NCCL group, where there is one, with all others at the same time."""
    if meeting is None:
        return None
    from rollout.vllm.nccl import NcclGroup

    return NcclGroup(*meeting, rank)


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
    Raises WorkerError with the check that failed, CanaryError where an engine computes something else."""
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
