"""How a bucket gets from a training rank to the rollout ranks: through the host, by CUDA IPC, or over NCCL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import ray
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from hybrid_engine.weight_sync import Receiver
from rollout.weights import ALIGNMENT, Parcel, WeightManifest

if TYPE_CHECKING:
    from rollout.vllm.nccl import NcclGroup

Way = Literal["host", "ipc", "nccl"]
Meeting = tuple[str, int, int]  # host, port and size of the NCCL group: every rollout rank, then every training rank


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

    def __init__(self, ways: Sequence[tuple[int, Way]], device: torch.device | None, group: NcclGroup | None) -> None:
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


def received(published: Sequence[list[Sent]], number: int, device: str | None, group: NcclGroup | None) -> list[Parcel]:
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


def join(meeting: Meeting | None, rank: int) -> NcclGroup | None:
    """Form the NCCL group, where there is one, with all others at the same time."""
    if meeting is None:
        return None
    from rollout.vllm.nccl import NcclGroup  # takes seconds in a training rank

    return NcclGroup(*meeting, rank)
