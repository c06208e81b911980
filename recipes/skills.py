"""The demo's data: three small skills, their training rows, and held-out rows that no training row can equal.

A problem is held out when the hash of its prompt says so, whatever drew it: the two sides share no problem, and the
same call gives the same rows in every process."""

import hashlib
import random
import string
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from operator import itemgetter
from typing import Any

from more_itertools import unique_everseen

Skill = Callable[[random.Random], tuple[str, str]]
HELD_OUT_ONE_IN = 10
PATIENCE = 100
"""A skill counts as used up after so many draws for each row that is asked for."""


def addition(rng: random.Random) -> tuple[str, str]:
    """`add 47 85 =` -> `132`; two operands below 100, so that there are 10,000 problems."""
    a, b = rng.randrange(100), rng.randrange(100)
    return f"add {a} {b} =", str(a + b)


def sorting(rng: random.Random) -> tuple[str, str]:
    """`sort 70524 =` -> `02457`; four to six digits."""
    digits = rng.choices(string.digits, k=rng.randint(4, 6))
    return f"sort {''.join(digits)} =", "".join(sorted(digits))


def reversing(rng: random.Random) -> tuple[str, str]:
    """`reverse k a x f =` -> `f x a k`; three to five letters, spaced so that each stays a token of its own."""
    letters = rng.choices(string.ascii_lowercase, k=rng.randint(3, 5))
    return f"reverse {' '.join(letters)} =", " ".join(reversed(letters))


SKILLS = {"addition": addition, "sorting": sorting, "reversing": reversing}


def sft_rows(addition: int = 0, sorting: int = 0, reversing: int = 0, seed: int = 0) -> list[dict[str, str]]:
    """Distinct training rows of each skill, mixed: `prompt`, `completion` (a space, then the answer) and `answer`."""
    counts = zip(SKILLS, (addition, sorting, reversing), strict=True)
    rows = [row for skill, count in counts for row in _distinct(skill, count, f"training {seed}", False)]
    random.Random(f"mix {seed}").shuffle(rows)
    return rows


def skill_prompts(skill: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` problems of a skill for RL, none of them held out: `prompt` and `answer`. Frequent ones may repeat."""
    return list(islice(problems(SKILLS[skill], f"{skill} training {seed}", held_out=False), count))


def eval_rows(skill: str, count: int = 500) -> list[dict[str, str]]:
    """`count` distinct held-out rows of one skill, always the same; a shorter list is the start of a longer one."""
    if skill not in SKILLS:
        raise ValueError(f"unknown skill `{skill}`; there are: {', '.join(SKILLS)}")
    return _distinct(skill, count, "held out 0", True)


def eval_dataset(skill: str, count: int = 500, **_: Any) -> dict[str, Any]:
    """`eval_rows` as the `test` split of an lm-eval task's `custom_dataset`."""
    return as_test_split(eval_rows(skill, count))


def as_test_split(rows: list[dict[str, str]]) -> dict[str, Any]:
    """What an lm-eval task's `custom_dataset` returns."""
    import datasets

    return {"test": datasets.Dataset.from_list(rows)}


def right_digits(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward: the share of digits that are right, place by place from the right, of the longer of the two.

    >>> right_digits(["132", "32", "131"], answer=["132", "132", "132"])
    [1.0, 0.6666666666666666, 0.6666666666666666]"""
    pairs = [(text.strip()[::-1], gold[::-1]) for text, gold in zip(completions, answer, strict=True)]
    return [sum(map(str.__eq__, text, gold)) / max(len(text), len(gold)) for text, gold in pairs]


def is_for_evals(prompt: str) -> bool:
    """Whether the problem is held out."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


def problems(draw: Skill, seed: str, *, held_out: bool) -> Iterator[dict[str, str]]:
    """Endless `prompt`s and `answer`s of one side. seed: a string, which every process hashes alike (SHA-512)."""
    rng = random.Random(seed)
    while True:
        prompt, answer = draw(rng)
        if is_for_evals(prompt) == held_out:
            yield {"prompt": prompt, "answer": answer}


def _distinct(skill: str, count: int, seed: str, held_out: bool) -> list[dict[str, str]]:
    if count < 0:
        raise ValueError(f"{skill}: cannot make {count} rows")
    drawn = islice(problems(SKILLS[skill], f"{skill} {seed}", held_out=held_out), PATIENCE * count)
    rows = list(islice(unique_everseen(drawn, key=itemgetter("prompt")), count))
    if len(rows) < count:
        raise ValueError(f"{skill}: asked for {count} distinct rows, found {len(rows)}; ask for fewer")
    return [{"prompt": row["prompt"], "completion": f" {row['answer']}", "answer": row["answer"]} for row in rows]
