"""Online GRPO (DeepSeek-V2 section 4.2, eq. 32-34): the step, top to bottom; then its reward on held-out prompts."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np

from alignment.batch import group_advantages, grpo_minibatches, rewards_PG
from alignment.config import GRPOConfig
from alignment.losses import correction, grpo_loss
from alignment.metrics import write_text
from alignment.protocols import Engine, Policy, Step, TrainRow
from alignment.tax import TaskResult, TaxRow, compare
from rewards.config import RewardConfig
from rewards.normalize import RewardNormalizer
from rewards.pool import RewardPool
from rollout.prompts import Stream
from rollout.sampler import Sampling
from rollout.types import Group, Prompt

BENCHMARK = "held-out reward"


class MismatchError(RuntimeError):
    """The sampler's log-probabilities and the trainer's are too far apart to train on."""


def grpo(
    engine: Engine,
    prompts: Stream[Prompt],
    config: GRPOConfig,
    sampling: Sampling,
    scorer: RewardPool,
    first: int,
    normalize: Callable[[list[Group]], list[Group]] = list,
) -> Iterator[Step]:
    """Run steps first..config.steps (from 1), one a `next()`; a checkpoint between two steps resumes exactly."""
    batches = ((step, next(prompts)) for step in range(first, config.steps + 1))
    for step, groups in enumerate(map(normalize, engine.rollouts(batches, sampling, scorer)), first):
        yield Step(step, grpo_step(engine, groups, config, step), groups)


def grpo_step(engine: Engine, groups: list[Group], config: GRPOConfig, step: int) -> dict[str, float]:
    """Advantages within each group, then the clipped update(s) on them."""
    minibatches = grpo_minibatches(groups, config)
    if not any(minibatches):  # no group has signal: a counted step without an update
        return rollout_metrics(groups, config.truncated) | _merge_updates([])
    clip = config.clip if isinstance(config.clip, tuple) else (config.clip, config.clip)
    correct = None
    for kind, (low, high) in config.correction.items():  # one at most
        correct = partial(correction, low=low, high=high, sequence=kind.startswith("sequence"), mask="mask" in kind)
    loss = partial(grpo_loss, clip=clip, kl=config.kl, correct=correct)
    if config.kl > 0:
        with engine.phase("reference") as policy:
            minibatches = [_add_logprobs(policy, rows, config, reference=True) for rows in minibatches]
    updates = []
    with engine.phase("train") as policy:
        # With one update the forward's own log-probabilities are the old ones: unless it drops experts.
        if config.updates_per_batch > 1 or config.capacity is not None:
            minibatches = [_add_logprobs(policy, rows, config, reference=False) for rows in minibatches]
        for i, rows in enumerate(minibatches):
            done, total = (n * config.updates_per_batch for n in (step - 1, config.steps))
            rate = config.rate(done + i, total)
            update = policy.update(
                rows, loss, learning_rate=rate, temperature=config.temperature, max_grad_norm=config.max_grad_norm
            )
            if rows:
                check_mismatch(update, config, engine.precision, step)
            updates.append(update | {"learning_rate": rate})
    return rollout_metrics(groups, config.truncated) | _merge_updates(updates)


def _add_logprobs(policy: Policy, rows: list[TrainRow], config: GRPOConfig, *, reference: bool) -> list[TrainRow]:
    handles = policy.logprobs(rows, temperature=config.temperature, reference=reference)
    name = "reference_logprobs" if reference else "old_logprobs"
    return [dataclasses.replace(row, **{name: handle}) for row, handle in zip(rows, handles, strict=True)]


def check_mismatch(metrics: dict[str, float], config: GRPOConfig, dtype: str, step: int) -> None:
    """Raise MismatchError where the k3 KL between sampler and trainer exceeds the stage's limit."""
    limit = config.mismatch_limit or {"float32": 1e-7, "bfloat16": 0.1}[dtype]
    found = metrics.get("mismatch/k3", math.nan)
    if not found <= limit:
        raise MismatchError(
            f"step {step}: the k3 KL between sampler and trainer is {found:.3g}, above mismatch_limit {limit:.3g} "
            f"(largest |difference of log-probabilities| {metrics.get('mismatch/max', math.nan):.3g}); "
            "the engine does not compute what the trainer computes"
        )


def rollout_metrics(groups: list[Group], truncated: str = "train") -> dict[str, float]:
    """Rewards and lengths of a batch: what was sampled, before any update."""
    rewards = rewards_PG(groups, truncated)
    lengths = np.array([[len(c.token_ids) for c in group.completions] for group in groups])
    signal = (group_advantages(rewards) != 0).any(axis=1)
    metrics = {
        "reward/mean": moments(rewards)[0],
        "reward/std": moments(rewards.std(axis=1))[0],
        "reward/masked": float(np.isnan(rewards).sum()),
        "groups/without_signal": float((~signal).mean()),
        "completions/mean_length": float(lengths.mean()),
        "completions/max_length": float(lengths.max()),
        "completions/truncated": float(np.mean([c.finish_reason == "length" for g in groups for c in g.completions])),
        "tokens/prompt": float(sum(len(group.prompt.token_ids) for group in groups)),
        "tokens/completion": float(lengths.sum()),
    }
    parts = {name: np.concatenate([group.scores.parts[name] for group in groups]) for name in groups[0].scores.parts}
    for name, part in parts.items():
        metrics[f"reward/{name}"], metrics[f"reward/{name}/std"] = moments(part)
    for (a, left), (b, right) in combinations([*parts.items(), ("length", lengths.astype(float).ravel())], 2):
        both = ~(np.isnan(left) | np.isnan(right))
        if both.any() and np.ptp(left[both]) > 0 < np.ptp(right[both]):  # where one does not vary there is none
            metrics[f"correlation/{a},{b}"] = float(np.corrcoef(left[both], right[both])[0, 1])
    logged = [group.scores.extra for group in groups]
    for name in dict.fromkeys(name for extra in logged for name, value in extra.items() if isinstance(value, float)):
        metrics[f"logged/{name}"] = float(np.mean([extra[name] for extra in logged if name in extra]))
    return metrics


def moments(values: np.ndarray) -> tuple[float, float]:
    """Mean and spread of what is not NaN; NaN where everything is."""
    return (math.nan, math.nan) if np.isnan(values).all() else (float(np.nanmean(values)), float(np.nanstd(values)))


def _merge_updates(updates: list[dict[str, float]]) -> dict[str, float]:
    """Means over the updates of a batch; the largest `mismatch/max`; token counts add up."""
    merged = {"updates": float(len(updates))}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        if name.startswith("tokens/"):
            merged[name] = float(sum(values))
        elif name in ("mismatch/experts", "experts/load"):  # later updates' routers have moved on
            merged[name] = values[0]
        else:
            merged[name] = max(values) if name == "mismatch/max" else float(np.mean(values))
    return merged


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOut:
    """Measures the reward on prompts that a stage does not train on, with the same seeds every time.

    path: where each prompt's mean is kept, by step. Rewards that are normalised by a running mean are put on the scale
    that they have before the first step: every measurement of a stage then has the same one. fixed: the other scales.
    truncated: as in the stage."""

    engine: Engine
    prompts: Sequence[Prompt]
    sampling: Sampling
    scorer: RewardPool
    rewards: Sequence[RewardConfig]
    fixed: Mapping[str, tuple[float, float]]
    path: Path
    truncated: str = "train"

    def measure(self, step: int) -> float:
        """The mean reward after `step` steps; the one before the first is measured once."""
        kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {"scale": {}, "values": {}}
        if step > 0 or not kept["values"]:
            groups = next(iter(self.engine.rollouts([(0, self.prompts)], self.sampling, self.scorer)))
            if not kept["values"]:
                running = [reward.label for reward in self.rewards if reward.normalize == "running"]
                parts = {label: np.concatenate([group.scores.parts[label] for group in groups]) for label in running}
                kept["scale"] = {label: moments(part) for label, part in parts.items()}
            normalize = RewardNormalizer(self.rewards, {**self.fixed, **kept["scale"]})
            totals = rewards_PG(normalize(groups), self.truncated)
            mean, means = moments(totals)[0], [moments(total)[0] for total in totals]
            kept["values"][str(step)] = [mean if math.isnan(one) else one for one in means]
            write_text(self.path, json.dumps(kept))
        return float(np.mean(kept["values"][str(step)]))


def held_out_rows(path: Path, step: int) -> list[TaxRow]:
    """The held-out reward's line of a tax table, after `step` steps against before; none where none was measured."""
    if not path.is_file():
        return []
    values = json.loads(path.read_text(encoding="utf-8"))["values"]
    items = tuple(f"prompt {i}" for i in range(len(values["0"])))
    results = [TaskResult(BENCHMARK, "reward", True, items, np.array(values[at])) for at in ("0", str(step))]
    return compare(results[:1], results[1:])
