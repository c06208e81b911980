"""Configuration of models, optimisers, stages and evals. No torch, Ray or vLLM here."""

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from rewards.config import RewardConfig
from rollout.config import Config, DataConfig

TrackerKind = Literal["tensorboard", "wandb"]
"""Where metrics go besides the run folder; the recipe's `trackers: [tensorboard]`."""


class InitConfig(Config):
    """A model from scratch."""

    preset: Literal["deepseek-v2-nano", "deepseek-v2-lite", "deepseek-v2"] = "deepseek-v2-nano"
    """Which DeepSeek-V2 dimensions."""
    vocab_size: int = Field(512, ge=260)
    """Most entries of the byte-level BPE tokenizer that is trained on the recipe's own data."""


class ModelConfig(Config):
    """The policy: exactly one of `path` and `init`."""

    one_of = ("path", "init")

    path: str | None = None
    """A Transformers directory (read from the recipe's folder) or a hub name."""
    init: InitConfig | None = None
    """Start from random weights."""
    chat_template: str | None = None
    """File with a Jinja chat template that replaces the tokenizer's own."""


class TrainConfig(Config):
    """The training ranks."""

    replicate: int = Field(1, ge=1)
    """Copies of the sharded policy; replicate x shard ranks train it."""
    shard: int = Field(1, ge=1)
    """Ranks of a copy; each holds one FSDP2 shard of parameters, gradients and optimiser states."""
    expert: int = Field(1, ge=1)
    """Ranks, out of the same ones, that share the routed experts among them; 1 shards experts like the rest."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of compute; parameters and optimiser states stay float32."""
    tokens_per_rank: int = Field(8192, ge=1)
    """Most tokens in one micro-batch of a rank."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward pass, and gather it for every micro-batch, to save memory."""
    routing_replay: bool = False
    """Compute each sampled token with the experts that the sampler chose for it (R3)."""
    router: Literal["train", "freeze"] = "train"
    """Whether the routers' own weights are trained."""
    balance: dict[Literal["expert", "device", "communication", "devices", "limit"], float] = Field(default_factory=dict)
    """DeepSeek-V2's losses, e.g. {expert: 0.003, device: 0.05, communication: 0.02, devices: 4, limit: 2} (D, M)."""

    @property
    def world(self) -> int:
        """Number of training ranks."""
        return self.replicate * self.shard

    @model_validator(mode="after")
    def _experts_lie_over_ranks(self) -> Self:
        if self.balance.keys() & {"device", "communication"} and not {"devices", "limit"} <= self.balance.keys():
            raise ValueError("`balance` by device or communication needs `devices` (D) and `limit` (M)")
        if any(value < 0 for value in self.balance.values()):
            raise ValueError("`balance` must not be negative")
        expert, shard, world = self.expert, self.shard, self.world
        if world % expert:
            raise ValueError(f"`expert` ({expert}) does not divide the {world} ranks of `replicate` x `shard`")
        if shard % expert and expert % shard:
            raise ValueError(f"of `expert` ({expert}) and `shard` ({shard}) one must divide the other")
        return self


CorrectionKind = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
Moment = Annotated[float, Field(ge=0, lt=1)]
Epsilon = Annotated[float, Field(gt=0, lt=1)]


class StageConfig(Config):
    """What every stage has: AdamW and its schedule, and what goes before, beside and after its steps."""

    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up; linear and cosine would reach 0 one step after the last."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    decay_steps: int | None = Field(None, ge=1)
    """Decay over the last N steps only, constant before (default: from the warm-up on)."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    betas: tuple[Moment, Moment] = (0.9, 0.999)
    """AdamW's moment coefficients."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are clipped to this norm."""
    name: str = Field("", pattern=r"^[A-Za-z0-9_\-]*$")
    """Name of the stage; its kind (`sft`, `reward_model`, ...) by default."""
    from_: str | None = Field(None, alias="from")
    """Stage whose final weights this one starts from (default: the last policy stage, else the model)."""
    capacity: float | None = Field(None, gt=0)
    """Drop tokens above this share of a device's mean load in training (paper: 1.0); needs `train.balance.devices`."""
    keep: Literal["stop", "rollback", "warn"] = "stop"
    """A broken limit of `evals.keep`: end the run with exit code 3, go back to what keeps it, or only say so."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints from which the run can resume; the newest is kept until the stage has ended."""

    def check_schedule(self, steps: int) -> None:
        """Raise ValueError when warm-up and decay do not fit into `steps` optimiser steps."""
        needed = self.warmup_steps + (self.decay_steps or 0)
        if needed > steps:
            raise ValueError(f"`warmup_steps` + `decay_steps` are {needed}, more than the {steps} optimiser steps")

    def rate(self, step: int, total_steps: int) -> float:
        """Learning rate of update `step` (from 0) of `total_steps`. Linear warm-up over `warmup_steps` (the first
        update already learns), then constant, then the decay over the last `decay_steps` updates (all after the warm-up
        by default), which would reach 0 one update after the last."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        left = min(1.0, (total_steps - step) / (self.decay_steps or total_steps - self.warmup_steps))
        if self.schedule == "linear":
            return self.learning_rate * left
        return self.learning_rate * 0.5 * (1 - math.cos(math.pi * left))

    @model_validator(mode="after")
    def _decay_has_a_schedule(self) -> Self:
        if self.decay_steps is not None and self.schedule == "constant":
            raise ValueError("`decay_steps` needs `schedule: linear` or `cosine`: a constant rate does not decay")
        return self


class DatasetStageConfig(StageConfig):
    """What a stage has that trains on a dataset."""

    one_of = ("epochs", "steps")

    data: DataConfig
    """Its rows, in TRL's formats."""
    epochs: float | None = Field(None, gt=0)
    """Passes over the data; exactly one of `epochs` and `steps`."""
    steps: int | None = Field(None, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(32, ge=1)
    """Rows of one optimiser step, over all ranks."""
    max_length: int = Field(1024, ge=2)
    """Most tokens: longer SFT rows are cut, longer rows of a reward model left out; both are counted."""

    def total_steps(self, rows: int) -> int:
        """Optimiser steps of the stage on a dataset of `rows` rows."""
        return self.steps or math.ceil(self.epochs * rows / self.batch_size)

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.steps is not None:
            self.check_schedule(self.steps)
        return self


class SFTConfig(DatasetStageConfig):
    """Supervised fine-tuning on `prompt` and `completion`, or on chat `messages`."""

    completion_only: bool = True
    """Loss on completions (assistant turns) alone, not on prompts."""


class RewardModelConfig(DatasetStageConfig):
    """A reward model: the policy with one score in place of its next-token logits."""

    loss: Literal["pairwise", "pointwise"] = "pairwise"
    """On `chosen`, `rejected` (Bradley-Terry), or the `label` or `score` of a completion (logistic if all are 0, 1)."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the prompts kept for measuring accuracy and calibration at the end."""
    on_error: Literal["stop", "drop"] = "stop"
    """A row without an answer, or whose two sides are equal: end the run, or leave the row out and count it."""


class RolloutStageConfig(StageConfig):
    """What a stage has that samples and scores completions."""

    prompts: DataConfig
    """Rows with `prompt`; their other columns go to the reward functions."""
    rewards: tuple[RewardConfig, ...] = Field(min_length=1)
    """Reward functions and models, summed with their weights."""
    prompts_per_step: int = Field(32, ge=1)
    """Prompts of one batch."""
    completions: int = Field(8, ge=2)
    """Completions per prompt: the group size G."""
    max_new_tokens: int = Field(256, ge=1)
    """Length limit of a completion."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; the trainer's logits are divided by it too."""

    @model_validator(mode="after")
    def _rewards_have_names(self) -> Self:
        names = [reward.label for reward in self.rewards]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rewards are called `{twice[0]}`: give each its own `name`")
        if taken := sorted({"mean", "std", "masked"} & set(names)):
            raise ValueError(f"a reward cannot be called `{taken[0]}`, a metric of the batch: give it another `name`")
        return self


class SampleConfig(RolloutStageConfig):
    """Completions of every prompt, scored and written as rows and as preference pairs; nothing is trained."""

    @model_validator(mode="after")
    def _trains_nothing(self) -> Self:
        trained = StageConfig.model_fields.keys() - {"name", "from_"}
        plain = StageConfig().model_dump()
        if unused := sorted(key for key in trained if self.model_dump()[key] != plain[key]):
            raise ValueError(f"a `sample` stage trains nothing: remove `{unused[0]}`")
        if any(reward.normalize == "running" for reward in self.rewards):
            raise ValueError("scores of a `sample` stage would depend on the batches before: no `normalize: running`")
        return self


class GRPOConfig(RolloutStageConfig):
    """Online GRPO (DeepSeek-V2, eq. 32-34)."""

    steps: int = Field(ge=1)
    """Batches to sample; each gives `updates_per_batch` optimiser steps."""
    updates_per_batch: int = Field(1, ge=1)
    """Optimiser steps per batch; must divide `prompts_per_step`."""
    clip: Epsilon | tuple[Epsilon, Annotated[float, Field(gt=0)]] = 0.2
    """epsilon of the clipped ratio; [lower, upper] where they differ (DAPO's clip-higher)."""
    kl: float = Field(0.0, ge=0)
    """beta, coefficient of the k3 KL to the reference; 0 loads no reference model."""
    reference: str | None = None
    """Stage whose final weights are the reference (default: this stage's start)."""
    normalize: Literal["token", "sequence"] = "token"
    """Loss per token of the whole batch (TRL's dapo) or mean per completion first (TRL's grpo)."""
    scale_advantages: bool = True
    """Divide advantages by the group's standard deviation (eq. 34); False subtracts the mean alone."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of the prompts that is not trained on; at most 128 of them measure the reward before, within and after."""
    truncated: Literal["train", "mask", "zero"] = "train"
    """Completions cut at the length limit: train on them, mask them out of the loss, or reward them 0."""
    mismatch_limit: float | None = Field(None, gt=0)
    """Stop when the k3 KL between sampler and trainer exceeds this (default 1e-7 in float32, 0.1 in bfloat16)."""
    correction: dict[CorrectionKind, tuple[float, float]] = Field(default_factory=dict, max_length=1)
    """Importance correction, {token_truncate: [0, 3]} (TIS), {token_mask: [0.5, 5]} (IcePop), also for a sequence."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self.check_schedule(self.steps * self.updates_per_batch)
        if self.prompts_per_step % self.updates_per_batch:
            updates, prompts = self.updates_per_batch, self.prompts_per_step
            raise ValueError(f"`updates_per_batch` ({updates}) does not divide `prompts_per_step` ({prompts})")
        if any(not 0 <= low < high for low, high in self.correction.values()):
            raise ValueError("the bounds in `correction` must be [low, high] with 0 <= low < high")
        if self.reference is not None and self.kl == 0:
            raise ValueError("`reference` has no effect while `kl` is 0")
        return self


class EvalConfig(Config):
    """Benchmarks, measured before the first and after every policy stage."""

    tasks: tuple[str, ...] | dict[str, tuple[str, ...]] = ()
    """lm-eval task names, or YAML files (from the recipe's folder); {reasoning: [...], ...} puts them in groups."""
    keep: dict[str, float] = Field(default_factory=dict)
    """Benchmark or group -> the least difference that a stage may make to it, e.g. {bbh: -0.02}."""
    during: dict[Literal["every", "items"], Annotated[int, Field(gt=0)]] = Field(default_factory=dict)
    """Evals within a stage too, e.g. {every: 50, items: 100}: every 50 steps on the first 100 items of each task."""
    limit: int | None = Field(None, gt=0)
    """Use only the first N items of each task."""
    chat_template: bool = False
    """Wrap each item in the tokenizer's chat template."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Replaces the tasks' own `max_gen_toks`."""

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> its tasks; "" where the recipe names none."""
        return self.tasks if isinstance(self.tasks, dict) else {"": self.tasks}

    @model_validator(mode="after")
    def _during_has_a_period(self) -> Self:
        if self.keep and not self.tasks:
            raise ValueError("`keep` limits benchmarks: it needs `tasks`")
        if self.during and "every" not in self.during:
            raise ValueError("`during` needs `every`, the steps between two evals")
        return self
