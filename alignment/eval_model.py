"""An lm-eval model over the `Sampler` protocol, and how it turns an item into tokens."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rollout.sampler import Request, Sampler

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerBase

Pair = tuple[list[int], list[int]]
"""Token ids of a context and of what follows it."""

DEFAULT_NEW_TOKENS = 256
"""What lm-eval gives a task that does not say."""
NEW_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class SamplerLM(LM):
    """An lm-eval model over a `Sampler`: all requests of one kind go to the engines as one batch.

    seed: with task, item and repetition it seeds each request. Every method answers in the order of its requests, and
    raises `ValueError`, before anything is sampled, for a request that does not fit the context.
    """

    def __init__(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, seed: int) -> None:
        super().__init__()
        self.sampler, self.tokenizer, self.seed = sampler, tokenizer, seed

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return chat_prompt(self.tokenizer, chat_history, add_generation_prompt)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Completions as text. Arguments of a request: (context, generation_kwargs)."""
        asked: Counter[int] = Counter()
        batch = []
        for instance in requests:
            context, kwargs = instance.args
            asked[id(instance)] += 1
            until = kwargs.get("until") or ()
            batch.append(
                Request(
                    prompt=np.asarray(encode(self.tokenizer, context), np.int32),
                    max_tokens=new_tokens(kwargs),
                    temperature=temperature(kwargs),
                    seed=_seed(self.seed, instance.task_name, instance.doc_id, instance.idx, asked[id(instance)]),
                    stop=tuple(filter(None, [until] if isinstance(until, str) else until)),
                    logprobs=False,
                )
            )
        check_fits(requests, [(len(request.prompt), request.max_tokens) for request in batch], self.sampler.max_length)
        texts = {sample.index: sample.text for sample in self.sampler.generate(batch)}
        return [texts[index] for index in range(len(batch))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether each token of it is the argmax). Arguments: (context, continuation)."""
        pairs = [encode_pair(self.tokenizer, *instance.args) for instance in requests]
        check_fits(requests, [(len(context) + len(rest), 0) for context, rest in pairs], self.sampler.max_length)
        return self._score(pairs)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p of each text after the BOS (or end) token, in windows that fit the context. Arguments: (text,)."""
        documents = [self._windows(instance.args[0]) for instance in requests]
        scores = iter(self._score([window for document in documents for window in document]))
        return [math.fsum(next(scores)[0] for _ in document) for document in documents]

    def _windows(self, text: str) -> list[Pair]:
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        # lm-eval counts the tokens read, not the last one predicted: a window is one longer than it is told.
        windows = get_rolling_token_windows(tokens, _prefix(self.tokenizer), self.sampler.max_length - 1, context_len=1)
        return [make_disjoint_window(window) for window in windows]

    def _score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        scores = self.sampler.score([np.asarray(context + rest, np.int32) for context, rest in pairs])
        return [
            (math.fsum(score.logprobs[len(context) :]), bool(score.greedy[len(context) :].all()))
            for (context, _), score in zip(pairs, scores, strict=True)
        ]


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a prompt, special tokens as in training; a chat template's own BOS is not doubled."""
    bos = tokenizer.bos_token
    return tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Pair:
    """Encoded as one text, then split: white space at the context's end belongs to the continuation (lm-eval's rule).

    An empty context is the BOS (or end) token.
    """
    if not context.strip():
        return [_prefix(tokenizer)], tokenizer.encode(context + continuation, add_special_tokens=False)
    whole = encode(tokenizer, context + continuation)
    start = len(encode(tokenizer, context.rstrip()))
    return whole[:start], whole[start:]


def chat_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], add_generation_prompt: bool = True
) -> str:
    """The chat as text, ready for an answer; without `add_generation_prompt` its last message is to be continued."""
    return tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=not add_generation_prompt,
    )


def new_tokens(kwargs: Mapping[str, Any]) -> int:
    """Most new tokens that a task's `generation_kwargs` allow."""
    return int(next((kwargs[key] for key in NEW_TOKENS_KEYS if kwargs.get(key) is not None), DEFAULT_NEW_TOKENS))


def temperature(kwargs: Mapping[str, Any]) -> float:
    """Sampling temperature of a task's `generation_kwargs`: 0 (greedy) unless they ask to sample."""
    value = float(kwargs.get("temperature") or 0.0)
    return value if kwargs.get("do_sample", True) else 0.0


def _prefix(tokenizer: PreTrainedTokenizerBase) -> int:
    return tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id


def _seed(*parts: Any) -> int:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def request_lengths(instance: Instance, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, int]:
    """Tokens of a request's prompt (1 without a tokenizer), and most new ones."""
    generates = instance.request_type == "generate_until"
    new = new_tokens(instance.args[1]) if generates else 0
    if tokenizer is None or instance.request_type == "loglikelihood_rolling":  # which fits by its windows
        return 1, new
    if generates:
        return len(encode(tokenizer, instance.args[0])), new
    return sum(map(len, encode_pair(tokenizer, *instance.args))), 0


def check_fits(instances: Sequence[Instance], lengths: Sequence[tuple[int, int]], max_length: int) -> None:
    too_long = [index for index, length in enumerate(lengths) if sum(length) > max_length]
    if too_long:
        worst = max(too_long, key=lambda index: sum(lengths[index]))
        (prompt, new), instance = lengths[worst], instances[worst]
        raise ValueError(
            f"evals.tasks: `{instance.task_name}`, item {instance.doc_id}, needs {prompt} tokens for the prompt and "
            f"{new} for the answer; the context holds {max_length} ({len(too_long)} of {len(lengths)} requests need "
            "more): raise rollout.max_length, or lower evals.max_new_tokens"
        )
