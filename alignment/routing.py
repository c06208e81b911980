"""The experts of every token: those that the sampler chose, replayed in the trainer's forward or compared with its own.

Rollout routing replay (R3; Ma et al. 2025, arXiv 2510.11370): in low precision sampler and trainer round differently, a
few tokens reach other experts, and their log-probabilities differ by far more than rounding. With replay the trainer
computes with the sampler's experts, and gradients still flow through the gate weights, recomputed from its own logits.
"""

from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from alignment.balance import Load, balance_weights, count, dropped, exempt_nodes
from alignment.config import TrainConfig
from alignment.tree import MicroBatch


def routers_of(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules that choose experts, by name, in the order of their layers."""
    modules = model.named_modules()
    return {name: module for name, module in modules if type(module).__name__.lower().endswith("topkrouter")}


class Routing:
    """Hooks on every router of a model. `start` comes before a micro-batch's forward, and what it sets stays until its
    backward has ended (where layers are recomputed)."""

    def __init__(self, model: PreTrainedModel, config: TrainConfig, capacity: float | None = None) -> None:
        """What the recipe asks of the policy's routers, and the stage with its `capacity` of a device.

        Raises ValueError for a replay or a balance that this model cannot have.
        """
        named = routers_of(model)
        given, losses = config.balance, ("expert", "device", "communication")
        alphas = {loss: given[loss] for loss in losses if given.get(loss)}
        if not named and (config.routing_replay or alphas):
            key, purpose = ("balance", "balance") if alphas else ("routing_replay", "replay")
            kind = type(model).__name__
            raise ValueError(f"train.{key}: {kind} has no routed experts to {purpose}; leave it out")
        self._devices = int(given.get("devices", 1))
        if odd := [len(router.weight) for router in named.values() if len(router.weight) % self._devices]:
            raise ValueError(f"train.balance: {self._devices} devices do not divide {odd[0]} experts")
        self.replay, self.capacity = config.routing_replay, capacity
        limits = {"devices": self._devices, "limit": int(given.get("limit", 1))}
        self.balance = partial(balance_weights, **limits, **alphas) if alphas else None
        # vLLM's own record has an entry for every decoder layer, dense ones included.
        self._layers = [next(int(part) for part in name.split(".") if part.isdigit()) for name in named]
        self._decoder_layers = model.config.get_text_config().num_hidden_layers if named else 0
        self._copies: torch.Tensor | None = None
        self._counts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._affinities: dict[int, torch.Tensor] = {}
        self._normalised: dict[int, bool] = {}
        for layer, router in enumerate(named.values()):
            router.requires_grad_(config.router == "train")
            router.register_forward_hook(partial(self._hook, layer))

    def start(self, batch: MicroBatch, device: torch.device, *, training: bool = False) -> None:
        """Raises ValueError where a record is to be replayed that has another number of layers. training: tokens may
        be dropped; `lost` [N] then says which have."""
        self._copies = torch.from_numpy(batch.copies).to(device).double()
        self._differs, self.lost = torch.zeros(2, len(batch.token_ids), dtype=torch.bool, device=device)
        self._routes = self._exempt = None
        if batch.routes is not None:
            whole = batch.routes.shape[1] == self._decoder_layers
            routes = batch.routes[:, self._layers] if whole else batch.routes
            if routes.shape[1] == len(self._layers):
                self._routes = torch.from_numpy(routes).to(device).long()
            elif self.replay:
                recorded = f"the sampler recorded {routes.shape[1]} layers of experts"
                raise ValueError(f"{recorded}, the trainer has {len(self._layers)}")
        if training and self.capacity is not None:
            self._exempt = torch.from_numpy(exempt_nodes(batch.token_ids, batch.lengths)).to(device)

    def differing(self) -> torch.Tensor | None:
        """How many nodes were computed with other experts than the sampler's in any layer (unknown ones count); None
        where nothing was sampled."""
        return None if self._routes is None else self._differs.sum()

    def load(self) -> Load | None:
        """How the micro-batch was routed; None for a dense model."""
        if not self._counts:
            return None
        chosen, sent = map(torch.stack, zip(*self._counts.values(), strict=True))
        return Load(chosen, sent, self._copies.sum())

    def affinities(self) -> torch.Tensor:
        """[L, E] float64 with gradient: affinities summed over the micro-batch's tokens (T P_i of eq. 25)."""
        return torch.stack(list(self._affinities.values()))

    def _hook(self, layer: int, router: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        if self._copies is None:
            return None
        logits, gates, ids = output
        if self._routes is not None:
            recorded = self._routes[:, layer]
            if self.replay:
                known = recorded[:, :1] >= 0
                used = torch.where(known, recorded, ids)
                gates, ids = torch.where(known, self._gates(layer, router, output, used), gates), used
            self._differs |= (ids.sort(-1).values != recorded.sort(-1).values).any(-1)
        if self._exempt is not None:
            scores = _scores(router, logits).detach()
            lost = dropped(scores, ids, self._exempt, self.capacity, self._devices)
            self.lost |= lost.any(-1)
            gates = gates.masked_fill(lost, 0)
        # Set and not added: a layer that is recomputed comes here twice.
        self._counts[layer] = count(ids, self._copies, logits.shape[-1], self._devices)
        if self.balance is not None:
            scores = _scores(router, logits)
            self._affinities[layer] = self._copies @ (scores / scores.sum(-1, keepdim=True)).double()
        return logits, gates, ids

    def _gates(
        self, layer: int, router: torch.nn.Module, output: tuple[torch.Tensor, ...], ids: torch.Tensor
    ) -> torch.Tensor:
        """The gate weights [N, K] of other experts `ids`, as this router would compute them.

        Raises ValueError for a router that computes them in none of the known ways.
        """
        logits, gates, own = output
        scores = _scores(router, logits)
        scale = router.routed_scaling_factor if hasattr(router, "routed_scaling_factor") else 1.0

        def weights(ids: torch.Tensor, normalised: bool) -> torch.Tensor:
            chosen = scores.gather(-1, ids)
            return (chosen / chosen.sum(-1, keepdim=True) if normalised else chosen) * scale

        if layer not in self._normalised:
            with torch.no_grad():  # a layer that is recomputed would save other tensors than at first
                found = {normalised: weights(own, normalised) for normalised in (False, True)}
            fits = [way for way, value in found.items() if torch.allclose(value, gates.float(), rtol=1e-2, atol=1e-6)]
            if not fits:
                raise ValueError(f"{type(router).__name__} computes gate weights in a way that replay does not know")
            if len(fits) == 1:  # else nearly all of the affinity is in the chosen ones: another batch will tell
                self._normalised[layer] = fits[0]
        return weights(ids, self._normalised.get(layer, False)).to(gates.dtype)


def _scores(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Affinities [N, E] float32 (eq. 22); sigmoids in DeepSeek-V3, whose routers have a correction bias."""
    return logits.float().sigmoid() if hasattr(router, "e_score_correction_bias") else logits.float().softmax(-1)
