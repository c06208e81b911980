"""An lm-eval model over the `Sampler` protocol, and how it turns an item into tokens."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from rollout.sampler import Request, Sampler

Tokens = tuple[list[int], list[int], int]
"""Token ids of a request's context and continuation, and most new tokens."""


class SamplerLM(LM):
    """An lm-eval model over a `Sampler`: all requests of one kind go to the engines as one batch.

    sampler: None where only `tokens` are wanted. seed: with its place in the batch it seeds each request. Every method
    answers in the order of its requests, and raises `ValueError`, before anything is sampled, for a request that does
    not fit the context."""

    def __init__(self, sampler: Sampler | None, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__()
        self.sampler, self.tokenizer, self.seed = sampler, tokenizer, seed
        self._prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The chat as text, ready for an answer; without `add_generation_prompt` its last message is continued."""
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **ending)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Completions as text. Arguments of a request: (context, generation_kwargs)."""
        batch = []
        for index, (context, _, new) in enumerate(self.tokens(requests, self.sampler.max_length)):
            kwargs = generation(requests[index].args[1])
            request = Request(
                prompt=np.asarray(context, np.int32),
                max_tokens=new,
                temperature=float(kwargs["temperature"]),
                seed=(self.seed * 1_000_003 + index) % 2**32,
                stop=tuple(filter(None, kwargs["until"])),
                logprobs=False,
            )
            batch.append(request)
        return [sample.text for sample in sorted(self.sampler.generate(batch), key=lambda sample: sample.index)]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether each token of it is the argmax). Arguments: (context, continuation)."""
        return self._score([(context, rest) for context, rest, _ in self.tokens(requests, self.sampler.max_length)])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each text after the BOS (or end) token, in windows that fit the context. Arguments: (text,)."""
        documents = []
        for instance in requests:
            tokens = self.tokenizer.encode(instance.args[0], add_special_tokens=False)
            # lm-eval counts the tokens read, not the last one predicted: a window is one longer than it is told.
            length = self.sampler.max_length - 1
            windows = get_rolling_token_windows(tokens, self._prefix, length, context_len=1)
            documents.append([make_disjoint_window(window) for window in windows])
        scores = iter(self._score([window for document in documents for window in document]))
        return [math.fsum(next(scores)[0] for _ in document) for document in documents]

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        scores = self.sampler.score([np.asarray(context + rest, np.int32) for context, rest in pairs])
        return [
            (math.fsum(score.logprobs[len(context) :]), bool(score.greedy[len(context) :].all()))
            for (context, _), score in zip(pairs, scores, strict=True)
        ]

    def tokens(self, requests: Sequence[Instance], max_length: int) -> list[Tokens]:
        """What each request asks for. Raises `ValueError` naming the longest if it does not fit `max_length` tokens.
        Context and continuation are encoded as one text, then split: white space at the context's end belongs to the
        continuation (lm-eval's rule). An empty context is the BOS (or end) token."""
        tokens = [self._tokens(instance) for instance in requests]
        needs = [len(context) + len(rest) + new for context, rest, new in tokens]
        worst = needs.index(max(needs))
        if needs[worst] > max_length:
            instance, new = requests[worst], tokens[worst][2]
            raise ValueError(
                f"evals.tasks: `{instance.task_name}`, item {instance.doc_id}, needs {needs[worst] - new} tokens for "
                f"the prompt and {new} for the answer; the context holds {max_length}: raise rollout.max_length, or "
                "lower evals.max_new_tokens"
            )
        return tokens

    def _tokens(self, instance: Instance) -> Tokens:
        if instance.request_type == "loglikelihood_rolling":  # fits, by its windows
            return [], [], 0
        context, rest = instance.args
        if instance.request_type == "generate_until":
            return self._encode(context), [], generation(rest)["max_gen_toks"]
        if not context.strip():
            return [self._prefix], self.tokenizer.encode(context + rest, add_special_tokens=False), 0
        whole = self._encode(context + rest)
        start = len(self._encode(context.rstrip()))
        return whole[:start], whole[start:], 0

    def _encode(self, text: str) -> list[int]:
        """Token ids of a prompt, special tokens as in training; a chat template's own BOS is not doubled."""
        bos = self.tokenizer.bos_token
        return self.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))


def generation(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """A task's `generation_kwargs` as lm-eval reads them: `temperature` 0 (greedy) unless they ask to sample, `until` a
    list, `max_gen_toks` 256 unless they say otherwise under one of its names."""
    given = {key: value for key, value in kwargs.items() if value is not None}
    return {"temperature": 0.0, **normalize_gen_kwargs(given)}
