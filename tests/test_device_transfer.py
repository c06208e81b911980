"""The hand-over's device paths with fakes for CUDA IPC and NCCL: ways, order, memory. `tests/gpu` has the real ones."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import count, product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from alignment.config import TrainConfig
from hybrid_engine import hand_over as hand_over_module
from hybrid_engine.hand_over import Sender, connect, hand_over, way
from hybrid_engine.layout import rollout_ranks
from hybrid_engine.rollout_worker import RolloutWorker
from hybrid_engine.train_worker import TrainWorker
from rollout.config import RolloutConfig
from rollout.weights import HandoverError, Parcel, Piece, WeightManifest, device_digests, whole_tensors

CPU = torch.device("cpu")  # stands in for a CUDA device: what is packed into a tensor is treated as if it lay on one
LAYOUT = RolloutConfig(tensor=2, expert=True, replicas=2)
HUNG = 5.0
"""Seconds after which a transfer without its other side counts as one that waits for ever."""


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """IPC handles and Ray's object store, in this process. `alive`: the exported memory that has not been freed."""
    handles: dict[int, tuple[StorageWeakRef, torch.Tensor]] = {}
    store: dict[int, Any] = {}
    numbers = count()

    def export(buffer: torch.Tensor) -> tuple[None, int]:
        meta = torch.empty(len(buffer), device="meta", dtype=torch.uint8), buffer.storage_offset()
        handles[number := next(numbers)] = StorageWeakRef(buffer.untyped_storage()), *meta
        return None, number

    def opened(handle: int) -> torch.Tensor:
        time.sleep(0.02)  # meanwhile the senders pack the next bucket
        memory, like, offset = handles.pop(handle)  # a second opening is an error
        assert not memory.expired(), "the sender has freed what this handle is for"
        storage = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
        return torch.empty(0, dtype=torch.uint8).set_(storage, offset, (len(like),))

    def put(value: Any) -> int:
        store[number := next(numbers)] = value.copy()
        return number

    monkeypatch.setattr(hand_over_module, "reduce_tensor", export)
    monkeypatch.setattr(hand_over_module, "opened", opened)
    monkeypatch.setattr(
        hand_over_module, "ray", SimpleNamespace(put=put, get=lambda refs: [store[ref] for ref in refs])
    )
    return SimpleNamespace(handles=handles, store=store)


class Net:
    """NCCL as a rendezvous: a transfer ends when its other side has come, and nobody waits longer than HUNG."""

    def __init__(self) -> None:
        self._there: dict[tuple[int, int], queue.Queue] = {}
        self._taken: dict[tuple[int, int], queue.Queue] = {}
        self._lock = threading.Lock()

    def _ends(self, pair: tuple[int, int]) -> tuple[queue.Queue, queue.Queue]:
        with self._lock:
            return self._there.setdefault(pair, queue.Queue()), self._taken.setdefault(pair, queue.Queue())

    def member(self, rank: int) -> SimpleNamespace:
        def send(buffer: torch.Tensor, to: int) -> None:
            there, taken = self._ends((rank, to))
            there.put(buffer)
            taken.get(timeout=HUNG)

        def receive(nbytes: int, sender: int) -> torch.Tensor:
            there, taken = self._ends((sender, rank))
            buffer = there.get(timeout=HUNG).clone()
            assert len(buffer) == nbytes
            taken.put(True)
            return buffer

        return SimpleNamespace(rank=rank, send=send, receive=receive)


def weights(version: int, sender: int, bucket: int, receiver: int | None) -> torch.Tensor:
    """What a rank sends: 75 bfloat16 numbers, which do not fill their last line."""
    seed = version + 100 * sender + 10_000 * bucket + 1_000_000 * (0 if receiver is None else receiver + 1)
    return torch.randn(5, 15, generator=torch.Generator().manual_seed(seed)).bfloat16()


class Packer:
    """As `WeightPacker` packs, three tensors a bucket: one for all, and an expert for each rank of an engine."""

    buckets, receivers = 4, (None, 0, 1)
    nbytes = 3 * 192

    def __init__(self, sender: int) -> None:
        self._sender = sender

    def pack(self, version: int, bucket: int, room: torch.Tensor) -> dict[int | None, Parcel]:
        parcels = {}
        for receiver, part in zip(self.receivers, room.split(192), strict=True):
            piece = Piece(f"{self._sender}/{bucket}/{receiver}", "bfloat16", (5, 15), (0, 0), (5, 15), 0, 150)
            part[:150] = weights(version, self._sender, bucket, receiver).view(torch.uint8).flatten()
            parcels[receiver] = Parcel(WeightManifest(version, (piece,), device_digests(part, [piece])), part)
        return parcels


class Trainer(TrainWorker):
    """A training rank whose device is the host's memory, under another name."""

    def canary(self, prompts):
        return np.zeros((1, 2), np.float32)


class Rollout(RolloutWorker):
    """A rollout rank whose engine notes the tensors that it gets."""

    def __init__(self, rank: int, number: int, group: Any) -> None:
        super().__init__(rank, LAYOUT)
        self.got: dict[str, torch.Tensor] = {}
        self._engine = SimpleNamespace(update_weights=self._update, canary=lambda prompts, top: [{0: 0.0}])
        self._number, self._device, self._nccl = number, "cpu", group

    def _update(self, parcels, first, last):
        self.got |= dict(whole_tensors(parcels))


class Actor:
    """Calls run one after the other in a thread of their own, and futures among the arguments are waited for."""

    def __init__(self, held: Any) -> None:
        self._held, self._thread = held, ThreadPoolExecutor(1)

    def __getattr__(self, name: str) -> Any:
        def run(*args: Any) -> Any:
            return getattr(self._held, name)(*(a.result(HUNG) if isinstance(a, Future) else a for a in args))

        return SimpleNamespace(remote=lambda *args: self._thread.submit(run, *args))


def world(ways: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Actor], dict[str, Actor], list[Rollout]]:
    """Two training ranks and the four rollout ranks of LAYOUT, with a way to each of these."""
    monkeypatch.setattr(
        hand_over_module, "wait_all", lambda calls, idle=None: [call.result(4 * HUNG) for call in calls.values()]
    )
    net, places = Net(), rollout_ranks(LAYOUT)
    engines = [Rollout(place.rank, number, net.member(number)) for number, place in enumerate(places)]
    training = {}
    for rank in range(2):
        worker = Trainer(rank, TrainConfig(shard=2), LAYOUT, "cpu")
        worker._packer = Packer(rank)
        pairs = [(place.rank, how) for place, how in zip(places, ways, strict=True)]
        worker._sender = Sender(pairs, CPU, net.member(len(places) + rank))
        training[f"training rank {rank}"] = Actor(worker)
    return training, {place.name: Actor(engine) for place, engine in zip(places, engines, strict=True)}, engines


WAYS = {
    "colocated": ["ipc"] * 4,
    "split": ["nccl"] * 4,
    "colocated on two hosts": ["ipc", "ipc", "host", "host"],
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=list(WAYS))
def test_every_rank_gets_its_own_and_two_buckets_are_the_most(
    ways: list[str], devices: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, rollout, engines = world(ways, monkeypatch)
    made: dict[int, list[StorageWeakRef]] = {0: [], 1: []}
    for rank, actor in enumerate(training.values()):
        sender = actor._held._sender

        def room(nbytes, make=sender.room, mine=made[rank]):
            found = make(nbytes)
            mine.append(StorageWeakRef(found.untyped_storage()))
            assert sum(not memory.expired() for memory in mine) <= 2
            return found

        monkeypatch.setattr(sender, "room", room)
    for version in (1, 2):
        figures = hand_over(training, rollout, version, Packer.buckets, [np.arange(3)], "float32", lambda: None)
        assert figures["handover/bytes"] == 2 * Packer.buckets * 3 * 150
        for place, engine in zip(rollout_ranks(LAYOUT), engines, strict=True):
            expected = {
                f"{sender}/{bucket}/{receiver}": weights(version, sender, bucket, receiver)
                for sender, bucket, receiver in product(range(2), range(Packer.buckets), (None, place.rank))
            }
            assert engine.got.keys() == expected.keys()
            assert all(torch.equal(engine.got[name], tensor) for name, tensor in expected.items())
            engine.got.clear()
    assert not devices.handles, "a handle that nobody opened keeps its memory for good"
    assert len(devices.store) == (2 * 2 * Packer.buckets * 3 if "host" in ways else 0), "one copy for a whole host"


def test_memory_that_is_packed_into_while_it_is_read_is_found(
    devices: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same memory for every bucket, without waiting for those who load: what two rooms are there to prevent."""
    training, rollout, _ = world(["ipc"] * 4, monkeypatch)
    for actor in training.values():
        only = torch.zeros(Packer.nbytes, dtype=torch.uint8)
        monkeypatch.setattr(actor._held._sender, "room", lambda nbytes, only=only: only)
    with pytest.raises(HandoverError, match=r"^digest: tensor ./0/.* differs"):
        hand_over(training, rollout, 1, Packer.buckets, [np.arange(3)], "float32", lambda: None)


def test_another_order_of_transfers_would_wait_for_ever(
    devices: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the fake does see what `Sender.send` is careful about: here one sender turns its receivers round."""
    monkeypatch.setattr("test_device_transfer.HUNG", 0.5)
    training, rollout, _ = world(["nccl"] * 4, monkeypatch)
    worker = training["training rank 0"]._held
    publish = worker._sender.publish

    def turned(parcels):
        sent = publish(parcels)
        worker._sender._leaving.sort(key=lambda leaving: -leaving[1])
        return sent

    monkeypatch.setattr(worker._sender, "publish", turned)
    published = [actor.publish.remote(1, 0) for actor in training.values()]
    others = [actor.receive.remote(True, True, *published) for actor in list(rollout.values())[:2]]
    sends = [actor.send.remote() for actor in training.values()]
    # Ranks 2 and 3 do not come: rank 0 and 1 must wait for a sender that waits for those.
    assert all(isinstance(call.exception(), queue.Empty) for call in (*others, *sends))


HOSTS = [("10.0.0.1", "10.0.0.1"), ("10.0.0.1", "10.0.0.2")]


def test_the_way_between_two_places() -> None:
    assert [way(*hosts, "cpu", split) for hosts in HOSTS for split in (False, True)] == ["host"] * 4
    assert [way(*hosts, "cuda", False) for hosts in HOSTS] == ["ipc", "host"]
    assert [way(*hosts, "cuda", True) for hosts in HOSTS] == ["nccl"] * 2


@pytest.mark.parametrize(("device", "split"), [("cpu", False), ("cuda", False), ("cuda", True)])
def test_ways_are_chosen_once_for_every_pair(device: str, split: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hand_over_module, "wait_all", lambda calls, idle=None: [c.result(HUNG) for c in calls.values()])
    told: dict[str, tuple] = {}

    def actor(name: str, host: str) -> Actor:
        return Actor(SimpleNamespace(address=lambda: (host, 7000), connect=lambda *args: told.update({name: args})))

    places = rollout_ranks(LAYOUT)
    training = {f"training rank {rank}": actor(f"training rank {rank}", f"host {rank}") for rank in range(2)}
    connect(training, {p.name: actor(p.name, f"host {p.engine}") for p in places}, places, device, split)
    meeting = ("host 0", 7000, 6) if split else None
    assert [told[place.name] for place in places] == [(number, device, meeting) for number in range(4)]
    near, far = {("cpu", False): ("host", "host"), ("cuda", False): ("ipc", "host")}.get((device, split), ("nccl",) * 2)
    assert told["training rank 0"] == ([(0, near), (1, near), (0, far), (1, far)], meeting)
    assert told["training rank 1"] == ([(0, far), (1, far), (0, near), (1, near)], meeting)


def test_what_a_rollout_rank_does_not_take_is_not_fetched(devices: SimpleNamespace) -> None:
    sent = Sender([(0, "ipc"), (1, "ipc")], CPU, None).publish(
        Packer(0).pack(1, 0, torch.zeros(Packer.nbytes, dtype=torch.uint8))
    )
    assert [sorted(parcel.tickets) for parcel in sent] == [[0, 1], [0], [1]]
