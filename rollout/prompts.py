"""Prompts from rows, and a resumable, fingerprinted stream of them."""

import pickle
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

import jinja2
import numpy as np
import xxhash
from transformers import PreTrainedTokenizerBase

from rollout.types import Prompt, Text


def make_prompts(rows: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, source: str) -> list[Prompt]:
    """Tokenise each row's `prompt` as TRL's GRPOTrainer does; the other columns go along. A string is tokenised as it
    is, special tokens as the tokenizer adds them; chat messages go through the chat template with the generation
    prompt. Raises `ValueError` naming `source` and the row."""
    prompts = []
    encoded = encode_strings((row["prompt"] for row in rows), tokenizer)
    for index, row in enumerate(rows):
        where = f"{source}, row {index}, column `prompt`"
        token_ids = encode_text(row["prompt"], encoded, tokenizer, where, add_generation_prompt=True)
        if not token_ids:
            raise ValueError(f"{where}: the prompt is empty; the policy needs at least one token to start from")
        columns = {name: value for name, value in row.items() if name != "prompt"}
        prompts.append(Prompt(index, row["prompt"], np.asarray(token_ids, np.int32), columns))
    return prompts


def encode_strings(texts: Iterable[Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[int]]:
    """Token ids of the strings among `texts`, special tokens as the tokenizer adds them: one call for all of them."""
    strings = list(dict.fromkeys(text for text in texts if isinstance(text, str)))
    encoded = tokenizer(strings, return_attention_mask=False)["input_ids"] if strings else []
    return dict(zip(strings, encoded, strict=True))


def encode_text(
    text: Text, encoded: Mapping[str, list[int]], tokenizer: PreTrainedTokenizerBase, where: str, **template: Any
) -> list[int]:
    """Token ids of a string, from `encode_strings`, or of a chat (`template`: arguments of its template).

    where: the text's name in messages. Raises `ValueError` for what is neither, or has no template."""
    return encode_chat(text, tokenizer, where, **template)["input_ids"] if is_chat(text, where) else encoded[text]


def encode_chat(
    chat: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str, **template: Any
) -> Mapping[str, list[int]]:
    """`input_ids` of a chat, and what else `template` asks `apply_chat_template` for. Raises `ValueError` when there is
    no template, or it refuses the chat."""
    if tokenizer.chat_template is None and template.get("chat_template") is None:
        raise ValueError(f"{where}: chat messages, but the tokenizer has no chat template; set `model.chat_template`")
    try:
        return tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **template)
    except jinja2.TemplateError as error:
        raise ValueError(f"{where}: the chat template refuses the messages: {error}") from error


def is_chat(text: Any, where: str) -> bool:
    """True for chat messages, False for a string; `ValueError` for anything else."""
    if isinstance(text, str):
        return False
    if isinstance(text, list) and text and all(isinstance(item, dict) and "role" in item for item in text):
        return True
    raise ValueError(
        f"{where}: expected a string or a list of chat messages with `role` and `content`, got {text!r:.80}"
    )


def check_lengths(prompts: Sequence[Prompt], max_length: int, max_new_tokens: int, source: str = "prompts") -> None:
    """Raise `ValueError` naming the longest prompt if it and `max_new_tokens` do not fit `max_length` tokens."""
    if too_long := [prompt for prompt in prompts if len(prompt.token_ids) + max_new_tokens > max_length]:
        worst = max(too_long, key=lambda prompt: len(prompt.token_ids))
        raise ValueError(
            f"{source}, row {worst.index}: a prompt of {len(worst.token_ids)} tokens and {max_new_tokens} new ones "
            f"exceed the context of {max_length} ({len(too_long)} of {len(prompts)} rows do); raise "
            "`rollout.max_length`, lower `max_new_tokens`, or leave the rows out"
        )


def is_held_out(prompt: Any, share: float) -> bool:
    """Whether a prompt is among the `share` that is not trained on: the same ones in every process."""
    return xxhash.xxh64_intdigest(repr(prompt).encode()) < share * 2**64


T = TypeVar("T")


class Stream(Iterator[list[T]], Generic[T]):
    """Endless batches of items, shuffled anew in each epoch, that can be continued from a saved state. An epoch's order
    depends on (seed, epoch) alone. A batch that reaches the end of an epoch goes on into the next, so every item comes
    exactly once an epoch and none is left out (a batch may then hold an item twice)."""

    def __init__(self, items: Sequence[T], batch_size: int, seed: int) -> None:
        assert items, "a stream needs at least one item"
        self.items, self.batch_size = items, batch_size
        hasher = xxhash.xxh3_128(repr(seed).encode())
        for item in items:
            hasher.update(pickle.dumps(item))
        self.fingerprint = hasher.hexdigest()
        self._given = 0
        self._order = lru_cache(2)(lambda epoch: np.random.default_rng((seed, epoch)).permutation(len(items)))

    def __next__(self) -> list[T]:
        places = range(self._given, self._given + self.batch_size)
        self._given = places.stop
        return [self.items[self._order(place // len(self.items))[place % len(self.items)]] for place in places]

    def state(self) -> dict[str, Any]:
        """Where the next batch starts; JSON-serialisable."""
        epoch, position = divmod(self._given, len(self.items))
        return {"epoch": epoch, "position": position, "fingerprint": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from `state`. Raises `ValueError` if it belongs to other data or another seed."""
        if state["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"the dataset or the seed has changed since the checkpoint (fingerprint {state['fingerprint']} then, "
                f"{self.fingerprint} now): restore them, or start the stage anew"
            )
        self._given = state["epoch"] * len(self.items) + state["position"]
