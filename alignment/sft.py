"""Supervised fine-tuning on the same engine, rows and losses' form as every other objective."""

from collections.abc import Iterator, Sequence

from alignment.config import DatasetStageConfig, SFTConfig
from alignment.losses import sft_loss
from alignment.protocols import Engine, Loss, Step, TrainRow
from alignment.schedule import learning_rate
from rollout.prompts import Stream
from rollout.types import Handle, Trajectory


def sft(engine: Engine, rows: Stream[Trajectory], config: SFTConfig, steps: int, first: int) -> Iterator[Step]:
    """Run steps first..steps (from 1), one a `next()`; a checkpoint between two steps resumes exactly."""
    for step in range(first, steps + 1):
        yield Step(step, sft_step(engine, next(rows), config, step, steps))


def sft_step(engine: Engine, batch: Sequence[Trajectory], config: SFTConfig, step: int, steps: int) -> dict[str, float]:
    """One update on the mean negative log-likelihood over the batch's loss-carrying tokens."""
    total = sum(int(row.loss_mask[1:].sum()) for row in batch)
    rows = [TrainRow(Handle(batch, i), i, len(row.token_ids), 1.0, 1 / max(1, total)) for i, row in enumerate(batch)]
    return supervised_step(engine, rows, sft_loss, config, step, steps)


def supervised_step(
    engine: Engine, rows: Sequence[TrainRow], loss: Loss, config: DatasetStageConfig, step: int, steps: int
) -> dict[str, float]:
    """The update of step `step` (from 1) of a stage on a dataset."""
    rate = learning_rate(config, step - 1, steps)
    with engine.phase("train") as policy:
        metrics = policy.update(rows, loss, learning_rate=rate, temperature=1.0, max_grad_norm=config.max_grad_norm)
    return metrics | {"learning_rate": rate, "tokens/total": float(sum(row.length for row in rows))}
