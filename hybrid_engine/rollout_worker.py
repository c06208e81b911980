"""One rank of a rollout engine: an actor that holds vLLM in its own process; and the sampler that all of them make."""

import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from more_itertools import batched

from hybrid_engine.actors import Worker, wait_all
from hybrid_engine.hand_over import Meeting, Sent, join, received
from hybrid_engine.layout import RolloutRank
from hybrid_engine.offload import Place
from rollout.config import RolloutConfig
from rollout.sampler import Request, Sample, Sampling, TokenScores, group_requests
from rollout.types import Completion, Handle, Packed, Prompt

CANARY_TOP = 20
"""Tokens per canary prompt whose log-probabilities are compared."""


@dataclass(frozen=True, slots=True)
class Finished:
    """Groups that are complete: each is the prompt's place in the batch, and its G completions follow each other, as
    (text, token ids, finish reason). The trajectories lie behind `ref`, in the same order."""

    places: tuple[int, ...]
    said: Packed
    ref: ray.ObjectRef

    def groups(self) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """(place, completions) of each group."""
        completions = (Completion(*said, Handle(self.ref, index)) for index, said in enumerate(self.said))
        return zip(self.places, batched(completions, len(self.said) // len(self.places)), strict=True)


class RolloutWorker(Worker):
    """Calls run one after the other; weights must have arrived before the first sample. Every rank of an engine gets
    the same calls; of those with the same requests only the first answers, the others with nothing."""

    def __init__(self, rank: int, config: RolloutConfig) -> None:
        self._config, self._answers = config, rank % config.tensor == 0
        # References inside a yielded value are not safe from Ray's reference counting until all have fetched them
        # (ReferenceCountingAssertionError after some sixty steps, Ray 2.60): their owner keeps those of two batches.
        self._published: deque[list[ray.ObjectRef]] = deque(maxlen=2)

    def start(self, address: tuple[str, int], model_dir: Path, seed: int, routes: bool, sleeps: bool) -> int:
        """Start the engine, together with its other ranks, which meet at `address`; its `max_length`."""
        os.environ |= {"MASTER_ADDR": address[0], "MASTER_PORT": str(address[1])}
        # The import takes seconds and reads environment variables that the actor starts with.
        from rollout.vllm.engine import VllmEngine

        self._engine = VllmEngine(model_dir, self._config, seed=seed, dummy=True, routes=routes, sleeps=sleeps)
        return self._engine.max_length

    def give_up(self) -> dict[str, int]:
        """As `VllmEngine.give_up`."""
        self._held: set[str] = set()
        return self._engine.give_up()

    def place(self, places: Sequence[Place]) -> None:
        """Give memory up, or take it again."""
        dropped = {place.component for place in places if not place.tiers}
        self._held = (self._held | {place.component for place in places}) - dropped
        self._engine.hold(self._held)

    def connect(self, number: int, device: str, meeting: Meeting | None) -> None:
        """Learn how weights come. number: this rank's among those of all engines."""
        self._number, self._device, self._nccl = number, None if device == "cpu" else device, join(meeting, number)

    def receive(self, first: bool, last: bool, *published: list[Sent]) -> None:
        """Take a bucket of weights in, verified: what every training rank sends to this one."""
        parcels = received(published, self._number, self._device, self._nccl)
        self._engine.update_weights(parcels, first=first, last=last)

    def canary(self, prompts: Sequence[np.ndarray]) -> list[dict[int, float]]:
        """Each prompt's most likely next tokens and their log-probabilities, as the engine now computes them."""
        return self._engine.canary(prompts, CANARY_TOP)

    def sample(
        self, prompts: Sequence[Prompt], places: Sequence[int], sampling: Sampling, step: int
    ) -> Iterator[Finished]:
        """Sample the prompts, which stand at `places` of the batch; yield groups, several at a time, once complete."""
        requests = group_requests(prompts, places, sampling, step)
        held: list[ray.ObjectRef] = []
        self._published.append(held)
        waiting: dict[int, list[Sample]] = {slot: [] for slot in range(len(prompts))}
        complete: list[tuple[int, list[Sample]]] = []
        at_least = max(1, len(prompts) // 8)  # a message costs about as much as a step of the engine
        for samples in self._engine.generate(requests):
            for sample in samples if self._answers else ():
                slot = sample.index // sampling.completions
                waiting[slot].append(sample)
                if len(waiting[slot]) == sampling.completions:
                    complete.append((places[slot], waiting.pop(slot)))
            if len(complete) >= at_least:
                yield _publish(complete, held)
                complete = []
        if complete:
            yield _publish(complete, held)

    def generate(self, requests: Sequence[Request]) -> list[Sample]:
        """Sample single requests (evals)."""
        samples = [sample for samples in self._engine.generate(requests) for sample in samples]
        return samples if self._answers else []

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        """Log-probabilities of given sequences (evals)."""
        scores = self._engine.score(sequences)
        return scores if self._answers else []


def _publish(groups: list[tuple[int, list[Sample]]], held: list[ray.ObjectRef]) -> Finished:
    """Trajectories go to the object store, once for all these groups (`held` gets the reference); the rest is small."""
    samples = [sample for _, found in groups for sample in sorted(found, key=lambda sample: sample.index)]
    said = Packed((s.text, s.trajectory.token_ids[s.trajectory.loss_mask], s.trajectory.finish_reason) for s in samples)
    held.append(ray.put(Packed(sample.trajectory for sample in samples)))
    return Finished(tuple(place for place, _ in groups), said, held[-1])


@dataclass(frozen=True, slots=True)
class ReplicaSampler:
    """A `Sampler` over all live engines. Request i goes to lane i modulo their number, so that a run repeats exactly;
    samples come once all are done. replicas: the rollout ranks by name. idle: actors that only wait meanwhile."""

    replicas: Mapping[str, Any]
    places: Sequence[RolloutRank]
    idle: Mapping[str, Any]
    max_length: int

    @property
    def lanes(self) -> int:
        """How many sets of requests the ranks work on at once."""
        return self.places[-1].lane + 1

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        for lane, samples in enumerate(self._ask(requests, lambda actor, own: actor.generate.remote(own))):
            for sample in samples:
                yield replace(sample, index=sample.index * self.lanes + lane)

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        answers = self._ask(sequences, lambda actor, own: actor.score.remote(own))
        return [answers[i % self.lanes][i // self.lanes] for i in range(len(sequences))]

    def _ask(self, values: Sequence[Any], call: Any) -> list[Any]:
        """Each lane's answer to `call(actor, its share of the values)`."""
        calls = {p.name: call(self.replicas[p.name], values[p.lane :: self.lanes]) for p in self.places}
        answers = wait_all(calls, self.idle)
        return [answer for place, answer in zip(self.places, answers, strict=True) if place.answers]
