"""Training and rollout workers with a planted fault, importable by Ray's processes."""

from __future__ import annotations

import importlib
import os
import time

import numpy as np
import ray

from hybrid_engine.rollout_worker import RolloutWorker
from hybrid_engine.train_worker import HandOver, TrainWorker
from rollout.weights import WeightManifest, digest


class PlantedTrainer(TrainWorker):
    """A rank whose `hand_over` goes wrong in the way that `plant` named last; the digests are right all the same."""

    def plant(self, fault: str | None) -> None:
        self._fault = fault

    def hand_over(self, version):
        changes = {"swap_experts": self._swap, "stale_tensor": self._stale}
        change = changes.get(self.__dict__.get("_fault"), self._keep)
        return change(super().hand_over(version))

    def _keep(self, sent: HandOver) -> HandOver:
        self._kept = ray.get(sent.buffer).copy()
        return sent

    def _swap(self, sent: HandOver) -> HandOver:
        """Expert 0's down projection as expert 1's, and the other way round."""
        return _repacked(sent, _swap_experts)

    def _stale(self, sent: HandOver) -> HandOver:
        """One tensor is that of the last good hand-over."""
        spec = next(spec for spec in sent.manifest.tensors if spec.name.endswith("o_proj.weight"))

        def change(tensors: dict[str, np.ndarray]) -> None:
            tensors[spec.name][:] = self._kept[spec.offset : spec.offset + spec.nbytes]

        return _repacked(sent, change)


def _swap_experts(tensors: dict[str, np.ndarray]) -> None:
    name = next(name for name in tensors if name.endswith("experts.0.down_proj.weight"))
    other = name.replace("experts.0", "experts.1")
    tensors[name][:], tensors[other][:] = tensors[other].copy(), tensors[name].copy()


def _repacked(sent: HandOver, change) -> HandOver:
    buffer = ray.get(sent.buffer).copy()
    tensors = {spec.name: buffer[spec.offset : spec.offset + spec.nbytes] for spec in sent.manifest.tensors}
    change(tensors)
    digests = {name: digest(data) for name, data in tensors.items()}
    manifest = WeightManifest(sent.manifest.version, sent.manifest.tensors, digests)
    return HandOver(manifest, ray.put(buffer))


class PlantedEngine(RolloutWorker):
    """An engine whose `receive` goes wrong in the way that `plant` named last."""

    def plant(self, fault: str | None) -> None:
        faults = importlib.reload(importlib.import_module("rollout.vllm.faults"))
        self._fault = fault
        if fault in ("repack_experts", "forget_prefixes"):
            setattr(faults, fault, lambda *_: None)

    def receive(self, manifest, buffer, canary):
        fault = self.__dict__.get("_fault")
        if fault == "lose_tensor":
            manifest = WeightManifest(manifest.version, manifest.tensors[1:], manifest.digests)
        if fault == "old_tensor":
            spec, buffer = manifest.tensors[0], buffer.copy()
            buffer[spec.offset : spec.offset + spec.nbytes] = self._buffer[spec.offset : spec.offset + spec.nbytes]
        self._buffer = buffer
        return super().receive(manifest, buffer, canary)


class Sleeper:
    """An actor that does nothing for long."""

    def __init__(self, fault: str = "") -> None:
        if fault:
            raise ValueError(f"1 error of it\n  {fault}\n    For further information see elsewhere")

    def pid(self) -> int:
        return os.getpid()

    def sleep(self) -> None:
        time.sleep(100)
