"""Learning-rate schedules."""

import math

from alignment.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Learning rate of update `step` (from 0) of `total_steps`.

    Linear warm-up over `warmup_steps` (the first update already learns), then constant, then the decay over the last
    `decay_steps` updates (all after the warm-up by default); the decay would reach 0 one update after the last.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.learning_rate
    decay_steps = config.decay_steps or total_steps - config.warmup_steps
    left = min(1.0, (total_steps - step) / decay_steps)
    if config.schedule == "linear":
        return config.learning_rate * left
    return config.learning_rate * 0.5 * (1 - math.cos(math.pi * left))
