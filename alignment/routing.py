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

from alignment.balance import Balance, Load, count
from alignment.config import TrainConfig
from alignment.dropping import Dropping, exempt_nodes
from alignment.tree import MicroBatch


def make_routing(model: PreTrainedModel, config: TrainConfig, capacity: float | None = None) -> Routing:
    """What the recipe asks of the policy's routers, and the stage with its `capacity` of a device."""
    given = config.balance
    dropping = None if capacity is None else Dropping(capacity, int(given.get("devices", 1)))
    balance = Balance(
        *(given.get(loss, 0.0) for loss in ("expert", "device", "communication")),
        devices=int(given.get("devices", 1)),
        limit=int(given.get("limit", 1)),
    )
    for router in routers_of(model).values():
        router.requires_grad_(config.router == "train")
    losses = any(given.get(loss) for loss in ("expert", "device", "communication"))
    return Routing(model, replay=config.routing_replay, balance=balance if losses else None, dropping=dropping)


def routers_of(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """The modules that choose experts, by name, in the order of their layers."""
    modules = model.named_modules()
    return {name: module for name, module in modules if type(module).__name__.lower().endswith("topkrouter")}


class Routing:
    """Hooks on every router of a model. `start` comes before a micro-batch's forward, and what it sets stays until its
    backward has ended (where layers are recomputed); `stop` before a forward that is none of the policy's batches."""

    def __init__(
        self, model: PreTrainedModel, *, replay: bool, balance: Balance | None = None, dropping: Dropping | None = None
    ) -> None:
        """Raises ValueError for a replay or a balance that this model cannot have."""
        named = routers_of(model)
        routers = list(named.values())
        if replay and not routers:
            raise ValueError(
                f"train.routing_replay: {type(model).__name__} has no routers that are known; leave it out"
            )
        if balance is not None and not routers:
            raise ValueError(f"train.balance: {type(model).__name__} has no routed experts to balance; leave it out")
        for devices in (asked.devices for asked in (balance, dropping) if asked is not None):
            if odd := [len(router.weight) for router in routers if len(router.weight) % devices]:
                raise ValueError(f"train.balance: {devices} devices do not divide {odd[0]} experts")
        self.replay, self.balance, self.drops, self._dropping = replay, balance, dropping is not None, dropping
        self._layers = len(routers)
        # vLLM's own record has an entry for every decoder layer, dense ones included.
        self._numbers = [next(int(part) for part in name.split(".") if part.isdigit()) for name in named]
        self._decoder_layers = model.config.get_text_config().num_hidden_layers if routers else 0
        self._batch: tuple[torch.Tensor | None, torch.Tensor] | None = None
        self._differs: torch.Tensor | None = None
        self._exempt: torch.Tensor | None = None
        self.lost = torch.empty(0, dtype=torch.bool)
        self._counts: list[tuple[torch.Tensor, torch.Tensor]] = [(torch.empty(0), torch.empty(0))] * self._layers
        self._affinities: list[torch.Tensor] = [torch.empty(0)] * self._layers
        self._normalised: dict[int, bool] = {}
        for layer, router in enumerate(routers):
            router.register_forward_hook(partial(self._hook, layer))

    def start(self, batch: MicroBatch, device: torch.device, *, training: bool = False) -> None:
        """Raises ValueError where a record is to be replayed that has another number of layers. training: tokens may
        be dropped; `lost` [N] then says which have."""
        routes = None if batch.routes is None else torch.from_numpy(batch.routes).to(device).long()
        if routes is not None and routes.shape[1] == self._decoder_layers:
            routes = routes[:, self._numbers]
        if routes is not None and routes.shape[1] != self._layers:
            if self.replay:
                recorded = f"the sampler recorded {routes.shape[1]} layers of experts"
                raise ValueError(f"{recorded}, the trainer has {self._layers}")
            routes = None
        self._batch = routes, torch.from_numpy(batch.copies).to(device).double()
        self._differs = None if routes is None else torch.zeros(len(routes), dtype=torch.bool, device=device)
        self._exempt = None
        if training and self._dropping is not None:
            self._exempt = torch.from_numpy(exempt_nodes(batch.token_ids, batch.lengths)).to(device)
        self.lost = torch.zeros(len(batch.token_ids), dtype=torch.bool, device=device)

    def stop(self) -> None:
        """Leave the forward passes that follow alone."""
        self._batch = None

    def differing(self) -> torch.Tensor | None:
        """How many nodes were computed with other experts than the sampler's in any layer (unknown ones count); None
        where nothing was sampled."""
        return None if self._differs is None else self._differs.sum()

    def load(self) -> Load | None:
        """How the micro-batch was routed; None for a dense model."""
        if not self._layers:
            return None
        chosen, sent = (torch.stack(counts) for counts in zip(*self._counts, strict=True))
        return Load(chosen, sent, self._batch[1].sum())

    def affinities(self) -> torch.Tensor:
        """[L, E] float64 with gradient: affinities summed over the micro-batch's tokens (T P_i of eq. 25)."""
        return torch.stack(self._affinities)

    def _hook(self, layer: int, router: torch.nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> Any:
        if self._batch is None:
            return None
        routes, copies = self._batch
        logits, gates, ids = output
        if routes is not None:
            recorded = routes[:, layer]
            if self.replay:
                known = recorded[:, :1] >= 0
                used = torch.where(known, recorded, ids)
                output = logits, torch.where(known, self._gates(layer, router, output, used), gates), used
            self._differs |= (output[2].sort(-1).values != recorded.sort(-1).values).any(-1)
        if self._exempt is not None:
            lost = self._dropping.dropped(_scores(router, logits).detach(), output[2], self._exempt)
            self.lost |= lost.any(-1)
            output = logits, output[1].masked_fill(lost, 0), output[2]
        # Set and not added: a layer that is recomputed comes here twice.
        self._counts[layer] = count(output[2], copies, logits.shape[-1], self.balance.devices if self.balance else 1)
        if self.balance is not None:
            scores = _scores(router, logits)
            self._affinities[layer] = copies @ (scores / scores.sum(-1, keepdim=True)).double()
        return output

    def _gates(
        self, layer: int, router: torch.nn.Module, output: tuple[torch.Tensor, ...], ids: torch.Tensor
    ) -> torch.Tensor:
        """The gate weights [N, K] of other experts `ids`, as this router would compute them.

        Raises ValueError for a router that computes them in none of the known ways.
        """
        logits, gates, own = output
        scores = _scores(router, logits)
        scale = router.routed_scaling_factor if hasattr(router, "routed_scaling_factor") else 1.0
        if layer not in self._normalised:
            chosen = scores.detach().gather(-1, own)
            ways = {False: chosen * scale, True: chosen / chosen.sum(-1, keepdim=True) * scale}
            fits = [way for way, value in ways.items() if torch.allclose(value, gates.float(), rtol=1e-2, atol=1e-6)]
            if len(fits) == 2:  # nearly all of the affinity is in the chosen ones: another batch will tell
                return (scores.gather(-1, ids) * scale).to(gates.dtype)
            if not fits:
                raise ValueError(f"{type(router).__name__} computes gate weights in a way that replay does not know")
            self._normalised[layer] = fits[0]
        chosen = scores.gather(-1, ids)
        if self._normalised[layer]:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return (chosen * scale).to(gates.dtype)


def _scores(router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
    """Affinities [N, E] float32 (eq. 22); sigmoids in DeepSeek-V3, whose routers have a correction bias."""
    return logits.float().sigmoid() if hasattr(router, "e_score_correction_bias") else logits.float().softmax(-1)
