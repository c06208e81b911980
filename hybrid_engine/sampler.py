"""The `Sampler` protocol over all live rollout engines."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hybrid_engine.health import wait_all
from hybrid_engine.layout import RolloutRank
from rollout.sampler import Request, Sample, TokenScores


@dataclass(frozen=True, slots=True)
class ReplicaSampler:
    """Request i goes to lane i modulo their number, so that a run repeats exactly; samples come once all are done.

    replicas: the rollout ranks by name, in the order of `places`. idle: actors that only wait meanwhile, by name.
    max_length: most tokens of a sequence, prompt and completion together.
    """

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
        named = zip(self.places, self.replicas.items(), strict=True)
        calls = {name: call(actor, values[place.lane :: self.lanes]) for place, (name, actor) in named}
        answers = wait_all(calls, self.idle)
        return [answer for place, answer in zip(self.places, answers, strict=True) if place.answers]
