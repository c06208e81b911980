"""One training rank's share of the policy: log-probabilities and updates of the rows that it is given."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add

import numpy as np
import torch
import torch.distributed as dist
from more_itertools import map_reduce
from transformers import PreTrainedModel

from alignment.logprobs import token_logprobs, tree_logits
from alignment.losses import k3
from alignment.protocols import Loss, LossInputs, TrainRow
from alignment.routing import Load, Routing
from alignment.tree import MicroBatch, pack, plant, silent_batch


@dataclass(slots=True)
class UpdateStats:
    """One rank's part of an update's metrics, from its micro-batches; `merge_stats` makes the step's of them.

    sums: what adds up over tokens and ranks. mismatch: float32 of tokens, trainer's old log-probability minus the
    sampler's (none where nothing was sampled; NaN where the sampler gave none, which no limit lets pass). load: how
    the tokens were routed; None if dense."""

    sums: Counter[str] = field(default_factory=Counter)
    mismatch: list[np.ndarray] = field(default_factory=list)
    load: Load | None = None
    grad_norm: float = 0.0


@dataclass(slots=True)
class RankPolicy:
    """The model on this rank. In a process group every rank must make the same calls.

    clip_grad_norm: clips all gradients of the policy to a norm and returns the norm before.
    last_micro_batch: told before each micro-batch whether it is the update's last, after which gradients are reduced.
    after_forward: called after a forward pass without a backward pass.
    outputs: what a micro-batch's tokens get: (log-probabilities, or a reward model's scores; entropies), both [C].
    step: has the optimiser step.
    keep_gradients: have their memory from update to update: the C library's heap would else be full of holes."""

    model: PreTrainedModel
    optimizer: torch.optim.Optimizer
    tokens_per_rank: int
    clip_grad_norm: Callable[[float], float]
    last_micro_batch: Callable[[bool], None]
    after_forward: Callable[[], None]
    routing: Routing
    outputs: Callable[[PreTrainedModel, MicroBatch, float], tuple[torch.Tensor, torch.Tensor]] = token_logprobs
    step: Callable[[torch.optim.Optimizer], None] = lambda optimizer: optimizer.step()
    keep_gradients: bool = False

    def update(
        self, rows: Sequence[TrainRow], loss: Loss, *, learning_rate: float, temperature: float, max_grad_norm: float
    ) -> UpdateStats:
        """One optimiser step on the sum of `loss` over the rows of all ranks."""
        batches, stats = self._micro_batches(rows), UpdateStats()
        balance_LE = self._balance_weights(batches, temperature)
        for i, batch in enumerate(batches):
            self.last_micro_batch(i == len(batches) - 1)
            logprobs_C, entropies_C = self._compute(batch, temperature, training=True)
            inputs = self._loss_inputs(rows, batch, logprobs_C)
            lost_C = self.routing.lost[torch.from_numpy(batch.sources[batch.edges]).to(logprobs_C.device)]
            if not inputs.sampler_logprobs.isnan().all():  # computed without an expert, it is not what was sampled
                mismatch_C = inputs.old_logprobs.detach() - inputs.sampler_logprobs
                stats.mismatch.append(mismatch_C[~lost_C].cpu().numpy())
                inputs = replace(inputs, weights=inputs.weights.masked_fill(lost_C, 0))
            outputs = loss(inputs)
            objective, sums = outputs.loss, {"loss": outputs.loss, "entropy": entropies_C.sum(), **outputs.sums}
            if balance_LE is not None:
                sums["balance"] = (balance_LE * self.routing.affinities()).sum()
                objective = objective + sums["balance"]
            objective.backward()
            if (differing := self.routing.differing()) is not None:
                sums["mismatch/experts"] = differing
            if self.routing.capacity is not None:
                sums["tokens/dropped"] = lost_C.sum()
            stats.sums.update({name: float(value.detach()) for name, value in sums.items()})
            stats.sums.update({"tokens/loss": len(batch.rows), "tokens/computed": len(batch.token_ids)})
            load = self.routing.load()
            stats.load = load if stats.load is None else stats.load + load
        stats.grad_norm = self.clip_grad_norm(max_grad_norm)
        for parameters in self.optimizer.param_groups:
            parameters["lr"] = learning_rate
        self.step(self.optimizer)
        self.optimizer.zero_grad(set_to_none=not self.keep_gradients)
        return stats

    @torch.no_grad()
    def _balance_weights(self, batches: Sequence[MicroBatch], temperature: float) -> torch.Tensor | None:
        """[L, E] what an expert's summed affinity weighs in this update: counts are of all ranks' whole batches, which
        a forward pass must find out first."""
        if self.routing.balance is None:
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
        return self.routing.balance(load) / load.tokens

    def _compute(
        self, batch: MicroBatch, temperature: float, *, training: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.routing.start(batch, self.model.device, training=training)
        return self.outputs(self.model, batch, temperature)

    def _loss_inputs(self, rows: Sequence[TrainRow], batch: MicroBatch, logprobs_C: torch.Tensor) -> LossInputs:
        device = logprobs_C.device
        present = batch.rows[np.flatnonzero(np.diff(batch.rows, prepend=-1))]  # a row's tokens stand side by side
        rows_C = torch.from_numpy(batch.rows).to(device)

        def of_tokens(values: Sequence[np.ndarray | None]) -> torch.Tensor | None:
            missing = [value is None for value in values]
            if all(missing):
                return None
            assert not any(missing), "some rows have these log-probabilities, others do not"
            values_C = np.concatenate([np.empty(0, np.float32), *(values[row] for row in present)])
            return torch.tensor(values_C, dtype=torch.float32, device=device)

        old_C = of_tokens([row.old_logprobs for row in rows])
        sampler_C = of_tokens([row.trajectory.logprobs[1:][row.trajectory.loss_mask[1:]] for row in rows])
        return LossInputs(
            logprobs=logprobs_C,
            old_logprobs=logprobs_C.detach() if old_C is None else old_C,
            reference_logprobs=of_tokens([row.reference_logprobs for row in rows]),
            advantages=torch.tensor([row.advantage for row in rows], dtype=torch.float32, device=device)[rows_C],
            weights=torch.tensor([row.weight for row in rows], dtype=torch.float32, device=device)[rows_C],
            sampler_logprobs=logprobs_C.detach() if sampler_C is None else sampler_C,
            rows=rows_C,
        )

    @torch.no_grad()
    def logprobs(self, rows: Sequence[TrainRow], *, temperature: float) -> list[np.ndarray]:
        """Each row's log-probabilities of its loss-carrying tokens, float32 [tokens]."""
        found: list[np.ndarray] = [np.empty(0, np.float32) for _ in rows]
        for batch in self._micro_batches(rows):
            values_C = self._compute(batch, temperature)[0].cpu().numpy()
            for row in np.unique(batch.rows):
                found[row] = values_C[batch.rows == row]
        self.after_forward()
        return found

    @torch.no_grad()
    def next_token_logprobs(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """log p(next token | prompt) at temperature 1: float32 [prompts, V]."""
        batch = silent_batch(prompts)
        self.routing.start(batch, self.model.device)
        logits = tree_logits(self.model, batch, np.cumsum(batch.lengths) - 1)
        self.after_forward()
        return torch.log_softmax(logits.float(), dim=-1).cpu().numpy()

    def _micro_batches(self, rows: Sequence[TrainRow]) -> list[MicroBatch]:
        """This rank's micro-batches; every rank gets as many as the one with the most, empty ones if need be."""
        size, by_routes = self.tokens_per_rank, self.routing.replay
        trees = []
        for members in map_reduce(range(len(rows)), lambda i: rows[i].group).values():
            trees += plant([rows[i].trajectory for i in members], members, size, by_routes=by_routes)
        batches = pack(trees, size)
        count = max(1, len(batches))
        if dist.is_initialized() and dist.get_world_size() > 1:
            most = torch.tensor(count, device=self.model.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            count = int(most)
        return batches + [silent_batch()] * (count - len(batches))


def merge_stats(ranks: Sequence[UpdateStats]) -> dict[str, float]:
    """The metrics of an update, from every rank's part.

    `loss` and the loss's own sums as they add up; `entropy` (nats, mean over tokens); `grad_norm`; `tokens/loss`,
    `tokens/computed`; `tokens/dropped` of a stage with `capacity`: loss-carrying tokens computed without some of their
    experts. Where the rows were sampled: `mismatch/k3` (KL from sampler to trainer, mean over tokens),
    `mismatch/max` and `mismatch/p99` (of |log p_trainer - log p_sampler|), `mismatch/experts` (share of the computed
    tokens whose experts differ from the sampler's). Of a MoE: `experts/*` as `Load.metrics` says."""
    names = sorted({name for rank in ranks for name in rank.sums})
    metrics = {name: sum(rank.sums[name] for rank in ranks) for name in names}
    metrics["entropy"] /= max(1, metrics["tokens/loss"])
    metrics["grad_norm"] = ranks[0].grad_norm
    if loads := [rank.load for rank in ranks if rank.load is not None]:
        metrics |= reduce(add, loads).metrics()
    if "mismatch/experts" in metrics:
        metrics["mismatch/experts"] /= metrics["tokens/computed"]
    difference = np.concatenate([np.empty(0, np.float32), *(values for rank in ranks for values in rank.mismatch)])
    if len(difference):
        metrics["mismatch/k3"] = float(k3(torch.from_numpy(difference).double()).mean())
        metrics["mismatch/max"] = float(np.abs(difference).max())
        metrics["mismatch/p99"] = float(np.percentile(np.abs(difference), 99))
    return metrics
