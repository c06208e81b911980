"""Which experts vLLM chose for every token, on devices where vLLM does not return them itself (the CPU build, 0.32)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.fused_moe.routed_experts_capturer import bind_routed_experts_capturer

UNKNOWN = -1  # in place of the experts of a token that no forward pass was seen for


class RouteRecorder:
    """Listens to the routers of a model runner in this process; one record for all requests that run at once. runner:
    vLLM's, with the model loaded. block: tokens of one block of the prefix cache; tokens of a prompt that came from the
    cache have the experts of the request that computed them."""

    def __init__(self, runner: Any, block: int) -> None:
        self._runner, self._block = runner, block
        self._layers: dict[int, torch.Tensor] = {}
        self._blocks: dict[bytes, np.ndarray] = {}
        self.end()
        model = runner.get_model()
        bind_routed_experts_capturer(model, self)
        model.register_forward_hook(self._after_forward, with_kwargs=True)

    def capture(self, layer: int, ids: torch.Tensor) -> None:
        """Called by each layer's router: expert ids [tokens, K]."""
        self._layers[layer] = ids.to(torch.int16)

    def begin(self, prompts: Sequence[np.ndarray], max_tokens: Sequence[int]) -> None:
        """New requests, numbered in this order, start from an empty record."""
        self.end()
        self._prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        room = np.array([len(prompt) + most for prompt, most in zip(prompts, max_tokens, strict=True)], np.int64)
        self._starts, self._size = np.cumsum(room) - room, int(room.sum())

    def take(self, request: int, length: int) -> np.ndarray:
        """[length - 1, L, K] int16 of a finished request of `length` tokens, the last of which was never read."""
        start, prompt = self._starts[request], self._prompts[request]
        routes = self._routes[start : start + length - 1].copy()
        for end in range(self._block, len(prompt) + 1, self._block):
            if routes[end - self._block, 0, 0] != UNKNOWN:
                break
            if (known := self._blocks.get(prompt[:end].tobytes())) is not None:
                routes[end - self._block : end] = known
        return routes

    def end(self) -> None:
        """The requests have ended: nothing is recorded until the next begin."""
        self._starts, self._routes = np.empty(0, np.int64), np.empty((0, 0, 0), np.int16)

    def forget(self) -> None:
        """The weights have changed, and the prefix cache is empty."""
        self._blocks.clear()

    def _after_forward(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        batch = self._runner.input_batch
        if not batch.req_ids or not len(self._starts):  # vLLM measures its memory with a batch of no requests
            return
        bounds = self._runner.query_start_loc.np[: len(batch.req_ids) + 1]
        requests = np.array([int(name.split("-")[0]) for name in batch.req_ids])
        counts, total = np.diff(bounds), int(bounds[-1])
        read = np.asarray(batch.num_computed_tokens_cpu[: len(requests)])
        routes = torch.stack([self._layers[layer] for layer in sorted(self._layers)], dim=1)[:total].numpy()
        if len(routes) < total:  # an empty step of a data-parallel engine, beside requests that have ended
            return
        if not self._routes.size:
            self._routes = np.full((self._size, *routes.shape[1:]), UNKNOWN, np.int16)
        offset = np.arange(total) - np.repeat(bounds[:-1], counts)
        self._routes[np.repeat(self._starts[requests] + read, counts) + offset] = routes
        for row in np.flatnonzero(counts >= self._block):  # later requests may find whole blocks in the cache
            prompt, start, first = self._prompts[requests[row]], self._starts[requests[row]], int(read[row])
            last = min(first + counts[row], len(prompt))
            for end in range(-(-first // self._block) * self._block + self._block, last + 1, self._block):
                self._blocks[prompt[:end].tobytes()] = self._routes[start + end - self._block : start + end].copy()
