"""Training and rollout workers with a planted fault, importable by Ray's processes."""

from __future__ import annotations

import importlib
import os
import time

import ray

from hybrid_engine.hand_over import Sent
from hybrid_engine.rollout_worker import RolloutWorker
from hybrid_engine.train_worker import TrainWorker
from rollout.weights import Parcel, Piece, WeightManifest, digest


class PlantedTrainer(TrainWorker):
    """A rank that packs wrongly, in the way that `plant` named last; the digests are right all the same."""

    def plant(self, fault: str | None) -> None:
        self._fault = fault

    def pack(self, version, bucket):
        super().pack(version, bucket)
        changes = {"swap_experts": _swap_experts, "stale_tensor": self._stale}
        change = changes.get(self.__dict__.get("_fault"), self._keep)
        which, parcels = self._packed
        self._packed = which, {key: change(Parcel(p.manifest, p.buffer.copy())) for key, p in parcels.items()}

    def _keep(self, sent: Parcel) -> Parcel:
        self._kept = sent.buffer
        return sent

    def _stale(self, sent: Parcel) -> Parcel:
        """One tensor is that of the last good hand-over."""
        piece = next(piece for piece in sent.manifest.pieces if piece.name.endswith("o_proj.weight"))
        sent.buffer[span(piece)] = self._kept[span(piece)]
        return _signed(sent)


def span(piece: Piece) -> slice:
    return slice(piece.offset, piece.offset + piece.nbytes)


def _swap_experts(sent: Parcel) -> Parcel:
    """Expert 0's down projection as expert 1's, and the other way round."""
    pieces = {piece.name: piece for piece in sent.manifest.pieces}
    name = next(name for name in pieces if name.endswith("experts.0.down_proj.weight"))
    one, other = span(pieces[name]), span(pieces[name.replace("experts.0", "experts.1")])
    sent.buffer[one], sent.buffer[other] = sent.buffer[other].copy(), sent.buffer[one].copy()
    return _signed(sent)


def _signed(sent: Parcel) -> Parcel:
    digests = {piece.name: digest(sent.buffer[span(piece)]) for piece in sent.manifest.pieces}
    return Parcel(WeightManifest(sent.manifest.version, sent.manifest.pieces, digests), sent.buffer)


class PlantedEngine(RolloutWorker):
    """An engine whose `receive` goes wrong in the way that `plant` named last."""

    def plant(self, fault: str | None) -> None:
        faults = importlib.reload(importlib.import_module("rollout.vllm.faults"))
        self._fault = fault
        if fault in ("repack_experts", "forget_prefixes"):
            setattr(faults, fault, lambda *_: None)

    def receive(self, first, last, published):
        (sent,), fault = published, self.__dict__.get("_fault")
        manifest, buffer = sent.manifest, ray.get(sent.tickets[0][1])
        if fault == "lose_tensor":
            manifest = WeightManifest(manifest.version, manifest.pieces[1:], manifest.digests)
        if fault == "old_tensor":
            piece, buffer = manifest.pieces[0], buffer.copy()
            buffer[span(piece)] = self._buffer[span(piece)]
        self._buffer = buffer
        return super().receive(first, last, [Sent(manifest, {0: ("host", ray.put(buffer))})])


class Sleeper:
    """An actor that does nothing for long."""

    def __init__(self, fault: str = "") -> None:
        if fault:
            raise ValueError(f"1 error of it\n  {fault}\n    For further information see elsewhere")

    def pid(self) -> int:
        return os.getpid()

    def sleep(self) -> None:
        time.sleep(100)
