"""The demo's data: three small skills, their training rows, and held-out rows that no training row can equal.

A problem is held out when the hash of its prompt says so, whatever drew it: the two sides share no problem, and the
same call gives the same rows in every process.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import datasets

HELD_OUT_ONE_IN = 10
PATIENCE = 1_000
"""So many repeated problems in a row, and a skill counts as used up."""


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


def sft_rows(addition: int, sorting: int, reversing: int, seed: int = 0) -> list[dict[str, str]]:
    """Distinct training rows of each skill, mixed: `prompt`, `completion` (a space, then the answer) and `answer`."""
    counts = {"addition": addition, "sorting": sorting, "reversing": reversing}
    rows = [row for skill, count in counts.items() for row in _rows(skill, count, seed, held_out=False)]
    random.Random(f"mix {seed}").shuffle(rows)
    return rows


def addition_prompts(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`skill_prompts` of addition."""
    return skill_prompts("addition", count, seed)


def skill_prompts(skill: str, count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` problems of a skill for RL, none of them held out: `prompt` and `answer`. Frequent ones may repeat."""
    rows = _rows(skill, count, seed, held_out=False, distinct=False)
    return [{"prompt": row["prompt"], "answer": row["answer"]} for row in rows]


def eval_rows(skill: str, count: int = 500) -> list[dict[str, str]]:
    """`count` distinct held-out rows of one skill, always the same; a shorter list is the start of a longer one."""
    if skill not in SKILLS:
        raise ValueError(f"unknown skill `{skill}`; there are: {', '.join(SKILLS)}")
    return _rows(skill, count, 0, held_out=True)


def eval_dataset(skill: str, count: int = 500, **_: Any) -> dict[str, datasets.Dataset]:
    """`eval_rows` as the `test` split of an lm-eval task's `custom_dataset`."""
    import datasets

    return {"test": datasets.Dataset.from_list(eval_rows(skill, count))}


def right_digits(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """Reward: the share of digits that are right, place by place from the right, of the longer of the two.

    >>> right_digits(["132", "32", "131"], answer=["132", "132", "132"])
    [1.0, 0.6666666666666666, 0.6666666666666666]
    """
    pairs = [(text.strip()[::-1], gold[::-1]) for text, gold in zip(completions, answer, strict=True)]
    return [sum(map(str.__eq__, text, gold)) / max(len(text), len(gold)) for text, gold in pairs]


def is_held_out(prompt: str) -> bool:
    """Whether the problem is for evals alone."""
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % HELD_OUT_ONE_IN == 0


def _rows(skill: str, count: int, seed: int, *, held_out: bool, distinct: bool = True) -> list[dict[str, str]]:
    """Rows of one side; seeded by a string, which Python hashes with SHA-512, the same in every process."""
    if count < 0:
        raise ValueError(f"{skill}: cannot make {count} rows")
    rng = random.Random(f"{skill} {'held out' if held_out else 'training'} {seed}")
    rows, seen, repeats = [], set[str](), 0
    while len(rows) < count:
        prompt, answer = SKILLS[skill](rng)
        if is_held_out(prompt) != held_out:
            continue
        repeats = repeats + 1 if distinct and prompt in seen else 0
        if repeats == PATIENCE:
            raise ValueError(f"{skill}: asked for {count} distinct rows, found {len(rows)}; ask for fewer")
        if not repeats:
            seen.add(prompt)
            rows.append({"prompt": prompt, "completion": f" {answer}", "answer": answer})
    return rows
