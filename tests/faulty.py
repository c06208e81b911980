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


class SwapsExperts(TrainWorker):
    """Sends expert 0's down projection as expert 1's, and the other way round."""

    def hand_over(self, version, canary):
        return _repacked(super().hand_over(version, canary), self._swap)

    def _swap(self, tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in tensors if name.endswith("experts.0.down_proj.weight"))
        other = name.replace("experts.0", "experts.1")
        tensors[name][:], tensors[other][:] = tensors[other].copy(), tensors[name].copy()


class SendsAStaleTensor(TrainWorker):
    """From the second hand-over on, one tensor is the first one's."""

    def hand_over(self, version, canary):
        return _repacked(super().hand_over(version, canary), self._stale)

    def _stale(self, tensors: dict[str, np.ndarray]) -> None:
        name = next(name for name in tensors if name.endswith("lm_head.weight"))
        if "_kept" not in self.__dict__:
            self._kept = tensors[name].copy()
        tensors[name][:] = self._kept


TRAIN_WORKERS = {"swap_experts": SwapsExperts, "stale_tensor": SendsAStaleTensor}


def _repacked(sent: HandOver, change) -> HandOver:
    buffer = ray.get(sent.buffer).copy()
    tensors = {spec.name: buffer[spec.offset : spec.offset + spec.nbytes] for spec in sent.manifest.tensors}
    change(tensors)
    digests = {name: digest(data) for name, data in tensors.items()}
    manifest = WeightManifest(sent.manifest.version, sent.manifest.tensors, digests)
    return HandOver(manifest, ray.put(buffer), sent.canary)


class Planted(RolloutWorker):
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
