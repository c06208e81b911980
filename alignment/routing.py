"""The experts of every token: the sampler's, replayed in the trainer's forward or compared with its own; the balance of
their load, and what is dropped of it (DeepSeek-V2 section 2.2).

Rollout routing replay (R3; Ma et al. 2025, arXiv 2510.11370): in low precision sampler and trainer round differently, a
few tokens reach other experts, and their log-probabilities differ by far more than rounding. With replay the trainer
computes with the sampler's experts, and gradients still flow through the gate weights, recomputed from its own logits.

Balance: each of the paper's three losses (eq. 23-31) is a sum over experts of (how much they are chosen) x (their mean
affinity), and the affinity alone has a gradient. So all three together are one weight per expert, made of counts over
the whole batch, times its mean affinity over the whole batch: micro-batches and ranks add up.

Letters: L layers, E routed experts, D devices (groups of E / D experts), T tokens of the batch, K experts of a token.
"""

import zlib
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignment.config import TrainConfig
from alignment.tree import MicroBatch

EXEMPT = 0.1
"""Share of sequences that lose no token: evaluation drops none, and should meet nothing new (the paper's 10%)."""


@dataclass(frozen=True, slots=True)
class Load:
    """How a batch was routed. chosen: [L, E] tokens that chose each expert. sent: [L, D] tokens with an expert on each
    device. tokens: T. All float64, and they add up over micro-batches and ranks."""

    chosen: Tensor
    sent: Tensor
    tokens: Tensor

    def __add__(self, other: Self) -> Self:
        return Load(self.chosen + other.chosen, self.sent + other.sent, self.tokens + other.tokens)

    def metrics(self) -> dict[str, Any]:
        """`experts/load`: [L, E] each expert's load in percent of its layer's mean; `experts/max_load`: the most loaded
        expert of any layer over the mean; `experts/entropy`: of the load, over its maximum, mean over layers;
        `experts/dead`: share of experts that no token chose."""
        share_LE = self.chosen / self.chosen.sum(-1, keepdim=True).clamp(min=1)
        entropy_L = torch.special.entr(share_LE).sum(-1)
        experts = share_LE.shape[-1]
        return {
            "experts/load": (100 * experts * share_LE).round().int().tolist(),
            "experts/max_load": float(share_LE.max() * experts),
            "experts/entropy": float(entropy_L.mean() / torch.tensor(float(experts)).log()),
            "experts/dead": float((self.chosen == 0).double().mean()),
        }


class Routing:
    """Hooks on every router of a model. `start` comes before a micro-batch's forward, and what it sets stays until its
    backward has ended (where layers are recomputed)."""

    def __init__(self, model: PreTrainedModel, config: TrainConfig, capacity: float | None = None) -> None:
        """What the recipe asks of the policy's routers, and the stage with its `capacity` of a device. Raises
        ValueError for a replay or a balance that this model cannot have."""
        modules = model.named_modules()
        named = {name: module for name, module in modules if type(module).__name__.lower().endswith("topkrouter")}
        given, losses = config.balance, ("expert", "device", "communication")
        alphas = {loss: given[loss] for loss in losses if given.get(loss)}
        if not named and (config.routing_replay or alphas):
            key, purpose = ("balance", "balance") if alphas else ("routing_replay", "replay")
            raise ValueError(f"train.{key}: {type(model).__name__} has no routed experts to {purpose}; leave it out")
        self._devices = int(given.get("devices", 1))
        if odd := [len(router.weight) for router in named.values() if len(router.weight) % self._devices]:
            raise ValueError(f"train.balance: {self._devices} devices do not divide {odd[0]} experts")
        self.replay, self.capacity = config.routing_replay, capacity
        limits = {"devices": self._devices, "limit": int(given.get("limit", 1))}
        self.balance = partial(balance_weights, **limits, **alphas) if alphas else None
        # vLLM's own record has an entry for every decoder layer, dense ones included.
        self._layers = [next(int(part) for part in name.split(".") if part.isdigit()) for name in named]
        self._decoder_layers = model.config.get_text_config().num_hidden_layers if named else 0
        self._copies: Tensor | None = None
        self._counts: dict[int, tuple[Tensor, Tensor]] = {}
        self._affinities: dict[int, Tensor] = {}
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

    def differing(self) -> Tensor | None:
        """How many nodes were computed with other experts than the sampler's in any layer (unknown ones count); None
        where nothing was sampled."""
        return None if self._routes is None else self._differs.sum()

    def load(self) -> Load | None:
        """How the micro-batch was routed; None for a dense model."""
        if not self._counts:
            return None
        chosen, sent = map(torch.stack, zip(*self._counts.values(), strict=True))
        return Load(chosen, sent, self._copies.sum())

    def affinities(self) -> Tensor:
        """[L, E] float64 with gradient: affinities summed over the micro-batch's tokens (T P_i of eq. 25)."""
        return torch.stack(list(self._affinities.values()))

    def _hook(self, layer: int, router: torch.nn.Module, args: Any, output: tuple[Tensor, ...]) -> Any:
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

    def _gates(self, layer: int, router: torch.nn.Module, output: tuple[Tensor, ...], ids: Tensor) -> Tensor:
        """The gate weights [N, K] of other experts `ids`, as this router would compute them. Raises ValueError for a
        router that computes them in none of the known ways."""
        logits, gates, own = output
        scores = _scores(router, logits)
        scale = router.routed_scaling_factor if hasattr(router, "routed_scaling_factor") else 1.0

        def weights(ids: Tensor, normalised: bool) -> Tensor:
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


def _scores(router: torch.nn.Module, logits: Tensor) -> Tensor:
    """Affinities [N, E] float32 (eq. 22); sigmoids in DeepSeek-V3, whose routers have a correction bias."""
    return logits.float().sigmoid() if hasattr(router, "e_score_correction_bias") else logits.float().softmax(-1)


def balance_weights(
    load: Load, *, devices: int, limit: int, expert: float = 0.0, device: float = 0.0, communication: float = 0.0
) -> Tensor:
    """[L, E] float64: the losses are the sum of these times the mean affinities P_i of the same tokens.

    devices: D. limit: M, the most devices of a token. expert, device, communication: alpha_1, alpha_2, alpha_3."""
    layers, experts = load.chosen.shape
    f = load.chosen * experts / load.chosen.sum(-1, keepdim=True)  # eq. 24; the sum is K_r T
    per_device = device * f.view(layers, devices, -1).mean(-1)  # eq. 27
    per_device = per_device + communication * devices / (limit * load.tokens) * load.sent  # eq. 30
    return expert * f + per_device.repeat_interleave(experts // devices, -1)


def count(ids_NK: Tensor, copies_N: Tensor, experts: int, devices: int) -> tuple[Tensor, Tensor]:
    """One layer's chosen [E] and sent [D] of N nodes, each standing for `copies_N` tokens."""
    chosen = copies_N.new_zeros(experts).index_add_(0, ids_NK.reshape(-1), copies_N.repeat_interleave(ids_NK.shape[1]))
    there_ND = torch.zeros(len(ids_NK), devices, dtype=torch.bool, device=ids_NK.device)
    there_ND.scatter_(1, ids_NK // (experts // devices), True)
    return chosen, copies_N @ there_ND.to(copies_N.dtype)


def dropped(scores_NE: Tensor, ids_NK: Tensor, exempt_N: Tensor, capacity: float, devices: int) -> Tensor:
    """[N, K] bool: the slots of a layer that are dropped, by affinities and experts of a forward's tokens. A slot is
    one of a token's K experts. A device with more than `capacity` times the mean of all drops those of the lowest
    affinity: they are routed and counted as before, and weigh nothing. Exempt tokens lose none."""
    device_NK = ids_NK // (scores_NE.shape[1] // devices)
    affinities = scores_NE.gather(-1, ids_NK).flatten()
    lost = torch.zeros_like(affinities, dtype=torch.bool)
    for device in range(devices):
        here_NK = device_NK == device
        excess = int(here_NK.sum()) - int(capacity * ids_NK.numel() / devices)
        candidates = (here_NK & ~exempt_N[:, None]).flatten().nonzero()[:, 0]
        lost[candidates[affinities[candidates].argsort(stable=True)[: max(0, excess)]]] = True
    return lost.view_as(ids_NK)


def exempt_nodes(token_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """[N] bool of packed trees of `lengths` tokens: whether a node's tree is exempt, by what it says."""
    trees = np.split(token_ids, np.cumsum(lengths)[:-1])
    exempt = [zlib.crc32(np.ascontiguousarray(tree, np.int64)) < EXEMPT * 2**32 for tree in trees]
    return np.repeat(exempt, lengths)
