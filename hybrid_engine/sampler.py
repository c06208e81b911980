"""The `Sampler` protocol over all live rollout replicas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hybrid_engine.health import wait_all
from rollout.sampler import Request, Sample, TokenScores


@dataclass(frozen=True, slots=True)
class ReplicaSampler:
    """Request i goes to replica i modulo their number, so that a run repeats exactly.

    replicas: the actors by name. idle: actors that only wait meanwhile, by name.
    """

    replicas: Mapping[str, Any]
    idle: Mapping[str, Any]
    length: int

    @property
    def max_length(self) -> int:
        """Most tokens of a sequence, prompt and completion together."""
        return self.length

    def generate(self, requests: Sequence[Request]) -> Iterator[Sample]:
        """Every request's sample, once all are done."""
        count = len(self.replicas)
        actors = enumerate(self.replicas.items())
        results = wait_all({name: actor.generate.remote(requests[r::count]) for r, (name, actor) in actors}, self.idle)
        for r, samples in enumerate(results):
            for sample in samples:
                yield replace(sample, index=sample.index * count + r)

    def score(self, sequences: Sequence[np.ndarray]) -> list[TokenScores]:
        """Log-probabilities of given token sequences, in their order."""
        count = len(self.replicas)
        actors = enumerate(self.replicas.items())
        results = wait_all({name: actor.score.remote(sequences[r::count]) for r, (name, actor) in actors}, self.idle)
        return [results[i % count][i // count] for i in range(len(sequences))]
