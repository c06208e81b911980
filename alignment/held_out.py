"""The reward of a GRPO stage on prompts that it does not train on, before, within and after it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alignment.batch import rewards_PG
from alignment.grpo import moments
from alignment.metrics import write_text
from alignment.protocols import Engine
from alignment.tax import TaskResult, TaxRow, compare
from rewards.config import RewardConfig
from rewards.normalize import RewardNormalizer
from rewards.pool import RewardPool
from rollout.sampler import Sampling
from rollout.types import Prompt

BENCHMARK = "held-out reward"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """Measures it, with the same seeds every time.

    path: where each prompt's mean is kept, by step. Rewards that are normalised by a running mean are put on the scale
    that they have before the first step: every measurement of a stage then has the same one. fixed: the other scales.
    truncated: as in the stage.
    """

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
    """The reward's line of a tax table, after `step` steps against before the first; none where none was measured."""
    if not path.is_file():
        return []
    values = json.loads(path.read_text(encoding="utf-8"))["values"]
    items = tuple(f"prompt {i}" for i in range(len(values["0"])))
    results = [TaskResult(BENCHMARK, "reward", True, items, np.array(values[at])) for at in ("0", str(step))]
    return compare(results[:1], results[1:])
