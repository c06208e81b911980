"""The hybrid engine: one policy that is trained in one layout and sampled in another.

    driver ──rows──> training ranks (FSDP2, expert parallel)       one process each
       ^                  │ weights: buckets (host, CUDA IPC, NCCL), digests, canary
       │                  v
       └──groups── rollout engines (vLLM: whole, TP, TP+EP, DP+EP) one process a rank

Training and rollout take turns on the same device, so each may use all of it."""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import ray
from ray.util.placement_group import PlacementGroup
from transformers import AutoConfig

from alignment.batch import split_over_ranks
from alignment.config import StageConfig, TrainConfig
from alignment.policy import merge_stats
from alignment.protocols import Loss, Phase, TrainRow
from hybrid_engine.actors import LOOK, WorkerError, describe, devices, launch, reserve, start_ray, wait_all, wait_any
from hybrid_engine.hand_over import CANARY_LIMIT, canary_prompts, connect, hand_over
from hybrid_engine.layout import misfits, rollout_ranks
from hybrid_engine.memory import Memory
from hybrid_engine.phases import Budget
from hybrid_engine.reward_worker import ModelReward, RewardWorker
from hybrid_engine.rollout_worker import Finished, ReplicaSampler, RolloutWorker
from hybrid_engine.train_worker import TrainWorker
from rewards.config import RewardConfig
from rewards.pool import RewardPool
from rollout.config import RolloutConfig
from rollout.sampler import Sampling
from rollout.types import Group, Handle, Prompt, Scores
from rollout.vllm.environment import environment, installed


class HybridEngine:
    """Implements `alignment.protocols.Engine` and `Policy`. Start it once a run; `load` begins each stage."""

    def __init__(
        self, model_dir: Path, train: TrainConfig, rollout: RolloutConfig, *, seed: int,
        ray_address: str | None = None, budget: Budget | None = None,
    ) -> None:  # fmt: skip
        self._train_config, self._rollout_config = train, rollout
        self._metrics: dict[str, float] = defaultdict(float)
        self._version = 0
        self._handed_over = -1
        self._looked = time.monotonic()
        self._ranks: dict[str, Any] = {}
        self._replicas: dict[str, Any] = {}
        self._group: PlacementGroup | None = None
        self._judges: list[ModelReward] = []
        self._turn = threading.Lock()
        self._memory = Memory(budget)
        self._device = installed().device
        self._lends = self._device == "cuda" or self._memory.on  # memory to reward models, while it is their turn
        self._model = AutoConfig.from_pretrained(model_dir).get_text_config()
        for section, key, problem in misfits(train, rollout, self._model.to_dict()):
            raise ValueError(f"{section}.{key}: {problem}")
        self._started_ray = start_ray(ray_address)
        try:
            self._start(model_dir, train, rollout, seed)
        except BaseException:
            self.close()
            raise

    def _start(self, model_dir: Path, train: TrainConfig, rollout: RolloutConfig, seed: int) -> None:
        self._places, device, env = rollout_ranks(rollout), self._device, self._memory.env
        training, sampling = devices(train, rollout)
        group = self._group = reserve(len({*training, *sampling})) if device == "cuda" else None
        share = 1.0 if rollout.placement == "split" else 0.5
        for rank, at in enumerate(training):
            arguments = rank, train, rollout, device
            self._ranks[f"training rank {rank}"] = launch(TrainWorker, arguments, train.world, env, group, at, share)
        for place, at in zip(self._places, sampling, strict=True):
            arguments, variables = (place.rank, rollout), environment(rollout, place.rank)
            self._replicas[place.name] = launch(RolloutWorker, arguments, len(sampling), variables, group, at, share)
        leaders = [next(iter(self._ranks)), *(place.name for place in self._places if place.rank == 0)]
        meet, *meets = wait_all({name: (self._ranks | self._replicas)[name].address.remote() for name in leaders})
        joining = {name: rank.join.remote(meet) for name, rank in self._ranks.items()}
        how = model_dir, seed, train.routing_replay, self._memory.on
        starting = {p.name: self._replicas[p.name].start.remote(meets[p.engine], *how) for p in self._places}
        length = wait_all(joining | starting)[-1]
        connect(self._ranks, self._replicas, self._places, device, rollout.placement == "split")
        self._memory.start(device, self._ranks, self._replicas)
        self._sampler = ReplicaSampler(self._replicas, self._places, self._ranks, length)
        self._canary = canary_prompts(self._model.vocab_size, length, 2 if self.precision == "float32" else 9)

    # -- a stage -----------------------------------------------------------------------------------------------

    def load(self, model_dir: Path, tokenizer_dir: Path, stage: StageConfig, reference_dir: Path | None = None) -> None:
        """Begin a stage from the weights in `model_dir`, with a new optimiser."""
        what = model_dir, tokenizer_dir, stage, reference_dir
        self._judges.clear()
        self._memory.before_load()
        self._buckets = self._call_ranks(lambda rank: rank.load.remote(*what))[0]
        self._memory.loaded(stage, self._train_config, self._rollout_config, self._model)
        self._version += 1

    def save_checkpoint(self, path: Path, extra: dict[str, Any]) -> None:
        """Begin to write what a resumed stage needs, `extra` included, atomically; training may go on meanwhile. Of
        the checkpoints beside it the newest stays."""
        self._move(lambda memory: memory.checkpoint())
        with self._timed("checkpoint"):
            self._call_ranks(lambda rank: rank.save_checkpoint.remote(path, extra))

    def finish_checkpoint(self) -> None:
        """Wait until the last checkpoint is written."""
        with self._timed("checkpoint"):
            self._call_ranks(lambda rank: rank.finish_checkpoint.remote())

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """Restore a checkpoint of the loaded stage; its `extra`."""
        self.finish_checkpoint()
        self._move(lambda memory: memory.checkpoint(changed=True))
        extra = self._call_ranks(lambda rank: rank.load_checkpoint.remote(path))[0]
        self._version += 1
        return extra

    def save_final(self, path: Path) -> None:
        """Write the policy as a Transformers directory."""
        self._move(lambda memory: memory.bring("checkpoint", ("parameters",)))
        self._call_ranks(lambda rank: rank.save_final.remote(path))

    # -- what a step asks for ----------------------------------------------------------------------------------

    @property
    def precision(self) -> str:
        """As `Engine.precision`."""
        return max(self._train_config.dtype, self._rollout_config.dtype, key=CANARY_LIMIT.__getitem__)

    @property
    def sampler(self) -> ReplicaSampler:
        """The live engines with the newest weights."""
        if self._handed_over != self._version:
            self._hand_over()
        self._enter("generate")
        return self._sampler

    @contextmanager
    def phase(self, name: Phase) -> Iterator[Self]:
        """Bring what a phase needs, and time it. Without a budget all stays but, on CUDA, reward models."""
        self._enter(name)
        with self._timed(name):
            for judge in self._judges if name == "score" else ():
                judge.allow()
            yield self
            for judge in self._judges if name == "score" else ():
                judge.hold() if self._memory.on else judge.release()
        self._memory.left(name)

    def _enter(self, phase: str) -> None:
        self._move(lambda memory: memory.enter(phase))

    def _move(self, moves: Callable[[Memory], bool]) -> None:
        if self._memory.on:
            with self._timed("offload"):
                if moves(self._memory):  # an engine has lost what it needs to sample
                    self._handed_over = -1

    def reward_model(self, config: RewardConfig, path: str) -> ModelReward:
        """Start an actor with the classifier in `path`; whoever scores with it closes it."""
        arguments = path, self._lends, self._train_config.tokens_per_rank
        judge = ModelReward(config, launch(RewardWorker, arguments, 1, {}, self._group, 0, 0.0), self._turn)
        self._memory.judge(config.label, judge)
        self._judges.append(judge)
        return judge

    def rollouts(
        self, batches: Iterable[tuple[int, Sequence[Prompt]]], sampling: Sampling, scorer: RewardPool
    ) -> Iterator[list[Group]]:
        """For each (step, prompts): newest weights in, sampled, scored as they finish; groups in prompt order. Weights
        go in at every step, also where the last one changed none: a run that resumes here does so too."""
        for step, prompts in batches:
            self._hand_over()
            with self.phase("generate"):
                pending = list(self._sample(step, prompts, sampling, scorer))
            with self.phase("score"):
                scored = [pair for groups, future in pending for pair in zip(groups, future.result(), strict=True)]
            placed = {place: replace(group, scores=scores) for (place, group), scores in scored}
            yield [placed[place] for place in range(len(prompts))]

    def _sample(
        self, step: int, prompts: Sequence[Prompt], sampling: Sampling, scorer: RewardPool
    ) -> Iterator[tuple[list[tuple[int, Group]], Future[list[Scores]]]]:
        """Groups (with their place in the batch) as they are complete, each with its scores to come."""
        streams, lanes = {}, self._sampler.lanes
        for place in self._places:
            sample = self._replicas[place.name].sample.options(num_returns="streaming")
            own, places = prompts[place.lane :: lanes], range(place.lane, len(prompts), lanes)
            streams[sample.remote(own, places, sampling, step)] = place.name
        while streams:
            stream = wait_any(streams, self._ranks)
            try:
                finished: Finished = ray.get(next(stream))
            except StopIteration:
                del streams[stream]
                continue
            except ray.exceptions.RayError as error:
                raise WorkerError(f"{streams[stream]}: {describe(error)}") from error
            groups = [(place, Group(prompts[place], completions)) for place, completions in finished.groups()]
            yield groups, scorer.submit([group for _, group in groups], {"global_step": step - 1})

    def update(
        self, rows: Sequence[TrainRow], loss: Loss, *, learning_rate: float, temperature: float, max_grad_norm: float
    ) -> dict[str, float]:
        """One optimiser step on the summed loss of `rows`."""
        shares = [[rows[i] for i in part] for part in split_over_ranks(rows, len(self._ranks))]
        how = {"learning_rate": learning_rate, "temperature": temperature, "max_grad_norm": max_grad_norm}
        stats = self._call_ranks(lambda rank, own: rank.update.remote(own, loss, **how), shares)
        self._version += 1
        if time.monotonic() - self._looked > LOOK:  # a death is noticed as soon as while a long update is waited for
            wait_all({name: replica.pid.remote() for name, replica in self._replicas.items()})
            self._looked = time.monotonic()
        return merge_stats(stats)

    def logprobs(self, rows: Sequence[TrainRow], *, temperature: float, reference: bool = False) -> list[Handle]:
        """Handles to the log-probabilities of each row's loss-carrying tokens."""
        parts = split_over_ranks(rows, len(self._ranks))
        shares = [[rows[i] for i in part] for part in parts]
        results = self._call_ranks(lambda rank, own: rank.logprobs.remote(own, temperature, reference), shares)
        placed = dict(zip(chain.from_iterable(parts), chain.from_iterable(results), strict=True))
        return [placed[i] for i in range(len(rows))]

    def scores(self, rows: Sequence[TrainRow]) -> np.ndarray:
        """A reward model's score of each row: float32 [rows]."""
        handles = self.logprobs(rows, temperature=1.0)
        found = {ref: ray.get(ref) for ref in {handle.ref for handle in handles}}
        return np.concatenate([found[handle.ref][handle.index] for handle in handles])

    def take_metrics(self) -> dict[str, float]:
        """`time/*` seconds, `handover/*` and `memory/*` since the last call."""
        taken, self._metrics = dict(self._metrics), defaultdict(float)
        return taken | self._memory.take_metrics()

    def close(self) -> None:
        """Kill every actor, and Ray where this process started it. Safe to call twice."""
        self._memory.close()
        if ray.is_initialized():
            for worker in (*self._ranks.values(), *self._replicas.values()):
                ray.kill(worker)
            if self._group is not None:
                ray.util.remove_placement_group(self._group)
        if self._started_ray:
            ray.shutdown()

    def _hand_over(self) -> None:
        """Bring the newest weights into every engine, verified."""
        self._enter("handover")
        what = self._version, self._buckets, self._canary, self.precision, lambda: self._enter("generate")
        for name, value in hand_over(self._ranks, self._replicas, *what).items():
            before = self._metrics[name]
            self._metrics[name] = before + value if name.startswith("time/") else max(before, value)
        self._handed_over = self._version

    def _call_ranks(self, call: Any, *shares: Sequence[Any]) -> list[Any]:
        """`call(rank, its share of each)` for every rank, waited for."""
        named = zip(self._ranks.items(), *shares, strict=True)
        return wait_all({name: call(rank, *own) for (name, rank), *own in named}, self._replicas)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._metrics[f"time/{name}"] += time.perf_counter() - start
