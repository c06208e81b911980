"""One training rank's share of the policy: log-probabilities and updates of the rows that it is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from alignment.balance import Load
from alignment.logprobs import TokenLogprobs, token_logprobs, tree_logits
from alignment.losses import k3
from alignment.protocols import Loss, LossInputs
from alignment.routing import Routing
from alignment.tree import MicroBatch, empty_micro_batch, pack, plant
from rollout.types import Trajectory


@dataclass(frozen=True, slots=True)
class RankRow:
    """A `TrainRow` whose handles are resolved: what it says there, with arrays in their place."""

    trajectory: Trajectory
    group: int
    advantage: float
    weight: float
    old_logprobs: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """One rank's part of an update's metrics; `merge_stats` makes the step's of them.

    sums: sums over tokens that add up over ranks. tokens: loss-carrying tokens. nodes: tokens computed.
    mismatch: [tokens] float32, trainer's old log-probability minus the sampler's (empty when nothing was sampled; NaN
    where the sampler gave none, which no limit lets pass). load: how the rank's tokens were routed; None if dense.
    """

    sums: Mapping[str, float]
    tokens: int
    nodes: int
    mismatch: np.ndarray
    grad_norm: float = 0.0
    load: Load | None = None


@dataclass(slots=True)
class RankPolicy:
    """The model on this rank. In a process group every rank must make the same calls.

    clip_grad_norm: clips all gradients of the policy to a norm and returns the norm before.
    last_micro_batch: told before each micro-batch whether it is the update's last, after which gradients are reduced.
    after_forward: called after a forward pass without a backward pass.
    outputs: what a micro-batch's tokens get: log-probabilities, or a reward model's scores.
    routing: replays the sampler's experts, or compares them with the trainer's own; None where that is not asked for.
    """

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    tokens_per_rank: int
    clip_grad_norm: Callable[[float], float]
    last_micro_batch: Callable[[bool], None]
    after_forward: Callable[[], None]
    outputs: Callable[[PreTrainedModel, MicroBatch, float], TokenLogprobs] = token_logprobs
    routing: Routing | None = None
    _sums: dict[str, float] = field(default_factory=dict)
    _balance: torch.Tensor | None = None
    _load: Load | None = None

    def update(
        self,
        rows: Sequence[RankRow],
        loss: Loss,
        *,
        learning_rate: float,
        temperature: float,
        max_grad_norm: float,
    ) -> UpdateStats:
        """One optimiser step on the sum of `loss` over the rows of all ranks."""
        batches = self._micro_batches(rows)
        self._sums = {"loss": 0.0, "entropy": 0.0}
        self._balance = self._balance_weights(batches, temperature)
        self._load = None
        mismatch = []
        for i, batch in enumerate(batches):
            self.last_micro_batch(i == len(batches) - 1)
            mismatch.append(self._backward(rows, batch, loss, temperature))
        grad_norm = self.clip_grad_norm(max_grad_norm)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return UpdateStats(
            sums=self._sums,
            tokens=sum(len(batch.rows) for batch in batches),
            nodes=sum(len(batch.token_ids) for batch in batches),
            mismatch=np.concatenate(mismatch),
            grad_norm=grad_norm,
            load=self._load,
        )

    @torch.no_grad()
    def _balance_weights(self, batches: Sequence[MicroBatch], temperature: float) -> torch.Tensor | None:
        """[L, E] what an expert's summed affinity weighs in this update: counts are of all ranks' whole batches, which
        a forward pass must find out first."""
        if self.routing is None or self.routing.balance is None:
            return None
        loads = []
        for batch in batches:
            self._compute(batch, temperature, training=True)
            loads.append(self.routing.load())
        self.after_forward()
        load = reduce(add, loads)
        if dist.is_initialized():
            for tensor in (load.chosen, load.sent, load.tokens):
                dist.all_reduce(tensor)
        return self.routing.balance.weights(load) / load.tokens

    def _backward(self, rows: Sequence[RankRow], batch: MicroBatch, loss: Loss, temperature: float) -> np.ndarray:
        computed = self._compute(batch, temperature, training=True)
        inputs, sampler_C = self._loss_inputs(rows, batch, computed.logprobs)
        sampled, lost_C = not np.isnan(sampler_C).all(), self._lost(batch)
        if sampled and lost_C is not None:  # computed without some of its experts, it is not what was sampled
            inputs = replace(inputs, weights=inputs.weights.masked_fill(lost_C, 0))
        outputs = loss(inputs)
        objective = outputs.loss
        if self._balance is not None:
            balance = (self._balance * self.routing.affinities()).sum()
            objective = objective + balance
            self._add("balance", balance)
        objective.backward()
        self._add("loss", outputs.loss)
        self._add("entropy", computed.entropies.sum())
        if self.routing is not None:
            load, differing = self.routing.load(), self.routing.differing()
            self._load = load if self._load is None else self._load + load
            if differing is not None:
                self._add("mismatch/experts", differing)
        for name, value in outputs.sums.items():
            self._add(name, value)
        if not sampled:
            return np.empty(0, np.float32)
        mismatch_C = inputs.old_logprobs.detach().cpu().numpy() - sampler_C
        return mismatch_C if lost_C is None else mismatch_C[~lost_C.cpu().numpy()]

    def _lost(self, batch: MicroBatch) -> torch.Tensor | None:
        """[C] bool: the token was computed with an expert dropped; None where nothing is."""
        if self.routing is None or not self.routing.drops:
            return None
        lost_C = self.routing.lost[torch.from_numpy(batch.sources[batch.edges]).to(self.model.device)]
        self._add("tokens/dropped", lost_C.sum())
        return lost_C

    def _compute(self, batch: MicroBatch, temperature: float, *, training: bool = False) -> TokenLogprobs:
        if self.routing is not None:
            self.routing.start(batch, self.model.device, training=training)
        return self.outputs(self.model, batch, temperature)

    def _add(self, name: str, value: torch.Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + float(value.detach())

    def _loss_inputs(
        self, rows: Sequence[RankRow], batch: MicroBatch, logprobs_C: torch.Tensor
    ) -> tuple[LossInputs, np.ndarray]:
        device, rows_C = logprobs_C.device, batch.rows
        sampler = [row.trajectory.logprobs[1:][row.trajectory.loss_mask[1:]] for row in rows]
        counts = np.array([len(values) for values in sampler], np.int64)
        starts = np.flatnonzero(np.diff(rows_C, prepend=-1))  # a row's tokens stand side by side
        position_C = np.arange(len(rows_C)) - np.repeat(starts, np.diff([*starts, len(rows_C)]))
        place_C = (np.cumsum(counts) - counts)[rows_C] + position_C  # among the tokens of all rows

        def of_tokens(values: Sequence[np.ndarray | None]) -> torch.Tensor | None:
            present = [value for value in values if value is not None]
            if not present:
                return None
            assert len(present) == len(values), "some rows have these log-probabilities, others do not"
            return torch.from_numpy(np.concatenate(present).astype(np.float32)[place_C]).to(device)

        def of_rows(values: Sequence[float]) -> torch.Tensor:
            return torch.from_numpy(np.array(values, np.float32)[rows_C]).to(device)

        old_C, sampler_C = of_tokens([row.old_logprobs for row in rows]), of_tokens(sampler)
        inputs = LossInputs(
            logprobs=logprobs_C,
            old_logprobs=logprobs_C.detach() if old_C is None else old_C,
            reference_logprobs=of_tokens([row.reference_logprobs for row in rows]),
            advantages=of_rows([row.advantage for row in rows]),
            weights=of_rows([row.weight for row in rows]),
            sampler_logprobs=logprobs_C.detach() if sampler_C is None else sampler_C,
            rows=torch.from_numpy(rows_C).to(device),
        )
        return inputs, np.empty(0, np.float32) if sampler_C is None else sampler_C.cpu().numpy()

    @torch.no_grad()
    def logprobs(self, rows: Sequence[RankRow], *, temperature: float) -> list[np.ndarray]:
        """Each row's log-probabilities of its loss-carrying tokens, float32 [tokens]."""
        found: list[np.ndarray] = [np.empty(0, np.float32) for _ in rows]
        for batch in self._micro_batches(rows):
            values_C = self._compute(batch, temperature).logprobs.cpu().numpy()
            for row in np.unique(batch.rows):
                found[row] = values_C[batch.rows == row]
        self.after_forward()
        return found

    @torch.no_grad()
    def next_token_logprobs(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """log p(next token | prompt) at temperature 1: float32 [prompts, V]."""
        if self.routing is not None:
            self.routing.stop()
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        last = np.cumsum(lengths) - 1
        batch = replace(
            empty_micro_batch(),
            token_ids=np.concatenate(prompts).astype(np.int64),
            positions=np.concatenate([np.arange(n) for n in lengths]),
            ends=np.repeat(last + 1, lengths),
            lengths=lengths,
        )
        logprobs = torch.log_softmax(tree_logits(self.model, batch, last).float(), dim=-1).cpu().numpy()
        self.after_forward()
        return logprobs

    def _micro_batches(self, rows: Sequence[RankRow]) -> list[MicroBatch]:
        """This rank's micro-batches; every rank gets as many as the one with the most, empty ones if need be."""
        by_routes = self.routing is not None and self.routing.replay
        groups: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            groups.setdefault(row.group, []).append(i)
        trees = [
            tree
            for members in groups.values()
            for tree in plant([rows[i].trajectory for i in members], members, self.tokens_per_rank, by_routes=by_routes)
        ]
        batches = pack(trees, self.tokens_per_rank)
        count = max(1, len(batches))
        if dist.is_initialized() and dist.get_world_size() > 1:
            most = torch.tensor(count, device=self.model.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            count = int(most)
        return batches + [empty_micro_batch()] * (count - len(batches))


def merge_stats(ranks: Sequence[UpdateStats]) -> dict[str, float]:
    """The metrics of an update, from every rank's part.

    `loss` and the loss's own sums as they add up; `entropy` (nats, mean over tokens); `grad_norm`; `tokens/loss`,
    `tokens/computed`; `tokens/dropped` of a stage with `capacity`: loss-carrying tokens computed without some of their
    experts. Where the rows were sampled: `mismatch/k3` (KL from sampler to trainer, mean over tokens),
    `mismatch/max` and `mismatch/p99` (of |log p_trainer - log p_sampler|), `mismatch/experts` (share of the computed
    tokens whose experts differ from the sampler's). Of a MoE: `experts/*` as `Load.metrics` says.
    """
    names = {name for rank in ranks for name in rank.sums}
    metrics = {name: sum(rank.sums[name] for rank in ranks if name in rank.sums) for name in sorted(names)}
    tokens = sum(rank.tokens for rank in ranks)
    metrics["entropy"] /= max(1, tokens)
    metrics["grad_norm"] = ranks[0].grad_norm
    metrics["tokens/loss"] = tokens
    metrics["tokens/computed"] = sum(rank.nodes for rank in ranks)
    loads = [rank.load for rank in ranks if rank.load is not None]
    if loads:
        metrics |= reduce(add, loads).metrics()
    if "mismatch/experts" in metrics:
        metrics["mismatch/experts"] /= metrics["tokens/computed"]
    difference = np.concatenate([rank.mismatch for rank in ranks])
    if len(difference):
        metrics["mismatch/k3"] = float(k3(torch.from_numpy(difference).double()).mean())
        metrics["mismatch/max"] = float(np.abs(difference).max())
        metrics["mismatch/p99"] = float(np.percentile(np.abs(difference), 99))
    return metrics
