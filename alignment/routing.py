"""The experts of every token: those that the sampler chose, replayed in the trainer's forward or compared with its own.

Rollout routing replay (R3; Ma et al. 2025, arXiv 2510.11370): in low precision sampler and trainer round differently, a
few tokens reach other experts, and their log-probabilities differ by far more than rounding. With replay the trainer
computes with the sampler's experts, and gradients still flow through the gate weights, recomputed from its own logits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel


class Routing:
    """Hooks on every router of a model; `routes` is set before a forward and stays until its backward has ended (where
    layers are recomputed).

    routes: [N, L, K] int64 expert ids of the micro-batch's N nodes, -1 where unknown, or None: then nothing is done.
    """

    def __init__(self, model: PreTrainedModel, *, replay: bool) -> None:
        routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
        self.layers = len(routers)
        self.replay = replay
        self.routes: torch.Tensor | None = None
        self._differs: torch.Tensor | None = None
        self._normalised: dict[int, bool] = {}
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._hook, layer))

    def start(self, routes: torch.Tensor | None) -> None:
        """Before the forward of a micro-batch. Raises ValueError for a record of another number of layers."""
        if routes is not None and routes.shape[1] != self.layers:
            raise ValueError(f"the sampler recorded {routes.shape[1]} layers of experts, the trainer has {self.layers}")
        self.routes = routes
        self._differs = None if routes is None else torch.zeros(len(routes), dtype=torch.bool, device=routes.device)

    def differing(self) -> torch.Tensor:
        """How many nodes were computed with other experts than the sampler's in any layer (unknown ones count)."""
        return torch.zeros(()) if self._differs is None else self._differs.sum()

    def _hook(self, layer: int, router: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        if self.routes is None:
            return None
        logits, gates, ids = output
        recorded = self.routes[:, layer]
        if self.replay:
            known = recorded[:, :1] >= 0
            used = torch.where(known, recorded, ids)
            output = logits, torch.where(known, self._gates(layer, router, (logits, gates, ids), used), gates), used
        self._differs |= (output[2].sort(-1).values != recorded.sort(-1).values).any(-1)
        return output

    def _gates(
        self, layer: int, router: torch.nn.Module, output: tuple[torch.Tensor, ...], ids: torch.Tensor
    ) -> torch.Tensor:
        """The gate weights [N, K] of other experts `ids`, as this router would compute them.

        Raises ValueError for a router that computes them in none of the known ways.
        """
        logits, gates, own = output
        scores = logits.float().sigmoid() if hasattr(router, "e_score_correction_bias") else logits.float().softmax(-1)
        scale = router.routed_scaling_factor if hasattr(router, "routed_scaling_factor") else 1.0
        if layer not in self._normalised:
            chosen = scores.detach().gather(-1, own)
            ways = {False: chosen * scale, True: chosen / chosen.sum(-1, keepdim=True) * scale}
            fits = [way for way, value in ways.items() if torch.allclose(value, gates.float(), rtol=1e-2, atol=1e-6)]
            if not fits:
                raise ValueError(f"{type(router).__name__} computes gate weights in a way that replay does not know")
            self._normalised[layer] = fits[0]
        chosen = scores.gather(-1, ids)
        if self._normalised[layer]:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return (chosen * scale).to(gates.dtype)
