"""Trained models as rewards: any Transformers sequence classifier with one output, in an actor of its own."""

import math
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from alignment.reward_model import judged_text
from hybrid_engine.actors import Worker, describe
from rewards.config import RewardConfig
from rewards.pool import RewardError
from rewards.worker import Batch, Reply
from rollout.prompts import encode_strings, encode_text
from rollout.types import Text
from rollout.vllm.sleep import trim


class RewardWorker(Worker):
    """Scores texts. On CUDA the model lies over as many devices as it needs."""

    def __init__(self, path: str, lent: bool, tokens: int) -> None:
        """lent: memory is, for a scoring phase: the model is loaded in it, and freed by `release`. tokens: most in one
        forward pass, padding included."""
        self._path, self._tokens, self._lent, self._model = path, tokens, lent, None
        self._tokenizer = AutoTokenizer.from_pretrained(path)
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        if not lent:
            self._load()

    def _load(self) -> None:
        place = "auto" if torch.cuda.is_available() else None
        load = AutoModelForSequenceClassification.from_pretrained
        self._model = load(self._path, dtype="auto", device_map=place, pad_token_id=self._tokenizer.pad_token_id).eval()

    @torch.inference_mode()
    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float]:
        """One score per completion. Raises ValueError for a text that is longer than the model's context."""
        if self._model is None:
            self._load()
        texts = [judged_text(*both, self._tokenizer) for both in zip(prompts, completions, strict=True)]
        strings = encode_strings(texts, self._tokenizer)
        encoded = [encode_text(text, strings, self._tokenizer, "the text") for text in texts]
        longest, context = max(map(len, encoded)), self._model.config.get_text_config().max_position_embeddings
        if longest > context:
            raise ValueError(f"a text has {longest} tokens, the reward model's context is {context}")
        scores: dict[int, float] = {}
        for chosen in batches([len(ids) for ids in encoded], self._tokens):
            rows = {"input_ids": [encoded[i] for i in chosen]}
            inputs = self._tokenizer.pad(rows, padding_side="right", return_tensors="pt").to(self._model.device)
            scores |= zip(chosen, self._model(**inputs).logits[:, 0].tolist(), strict=True)
        return [scores[i] for i in range(len(encoded))]

    def release(self) -> None:
        """Free the model's memory until the next `score`."""
        if self._lent:
            self._model = None
            trim(torch.cuda.is_available())

    def nbytes(self) -> int:
        """Bytes of the model, without loading it."""
        config = AutoConfig.from_pretrained(self._path)
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, dtype=config.dtype)
        return sum(parameter.nbytes for parameter in model.parameters())


def batches(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices of sequences of similar length, at most `tokens` with padding (a longer one goes alone)."""
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not found or (len(found[-1]) + 1) * lengths[found[-1][0]] > tokens:
            found.append([])
        found[-1].append(i)
    return found


class ModelReward:
    """A `rewards.pool.RewardSource` whose answers come from a `RewardWorker`, between `allow` and `release` alone.

    turn: of the reward models that share processors or devices; one of them scores at a time."""

    def __init__(self, config: RewardConfig, worker: Any, turn: threading.Lock) -> None:
        self.config, self.worker, self._turn = config, worker, turn
        self.thread = ThreadPoolExecutor(1)
        self._allowed = threading.Event()
        self._closed = False

    def allow(self) -> None:
        """The devices have room for the model."""
        self._allowed.set()

    def release(self) -> None:
        """They need it for something else."""
        self.hold()
        if not self._closed:
            self._get(self.worker.release.remote())

    def hold(self) -> None:
        """It is no longer the model's turn."""
        self._allowed.clear()

    def nbytes(self) -> int:
        """Bytes of the model."""
        return self._get(self.worker.nbytes.remote())

    def ready(self) -> None:
        """Wait until the tokenizer, and on the CPU the model, is loaded."""
        self._get(self.worker.pid.remote())

    def call(self, batch: Batch) -> Reply:
        """The model's scores of a batch's texts: text is passed on, for its tokens may be others than the policy's."""
        self._allowed.wait()
        try:
            with self._turn:
                scores = self._get(self.worker.score.remote(batch.columns["prompts"], batch.columns["completions"]))
            return Reply(values=[score if math.isfinite(score) else f"returned {score}" for score in scores])
        except ray.exceptions.RayTaskError as error:
            return Reply(failure=describe(error))

    def close(self) -> None:
        """End the actor."""
        self._closed = True
        ray.kill(self.worker)
        self._allowed.set()
        self.thread.shutdown()

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except ray.exceptions.RayActorError as error:
            raise RewardError(f"reward model {self.config.source!r}: {describe(error)}") from error
