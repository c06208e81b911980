"""The rewards that come with the project, on real GSM8K rows and on what a model may write."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rewards import math_answer
from rewards.exact_match import exact_match
from rewards.format import matches
from rewards.length import within
from rewards.math_answer import correct


@pytest.fixture(scope="module")
def gsm8k(shared_data: Path) -> list[str]:
    """Gold answers of GSM8K: 200 rows in order, and 100 rows whose answer is more than digits (1,000; -4)."""
    with open(shared_data / "gsm8k" / "train.jsonl", encoding="utf-8") as lines:
        answers = [json.loads(line)["answer"] for line in lines]
    odd = [answer for answer in answers if not answer.rpartition("#### ")[2].isdigit()]
    assert len(odd) > 50
    return answers[:200] + odd[:100]


def test_gsm8k_gold_answers_score_one(gsm8k: list[str]) -> None:
    assert correct(completions=gsm8k, answer=gsm8k) == [1.0] * len(gsm8k)


@pytest.mark.parametrize("form", ["The answer is {}.", r"Thus \boxed{{{}}}", "{}", "1 + 2 = 3\n#### {}\n\nNext: 999"])
def test_gsm8k_answers_in_other_words_score_one_and_wrong_ones_zero(gsm8k: list[str], form: str) -> None:
    values = [answer.rpartition("#### ")[2] for answer in gsm8k]
    assert correct(completions=[form.format(value) for value in values], answer=gsm8k) == [1.0] * len(gsm8k)
    wrong = [str(int(float(value.replace(",", ""))) + 1) for value in values]
    assert correct(completions=[form.format(value) for value in wrong], answer=gsm8k) == [0.0] * len(gsm8k)


def test_the_mark_counts_not_a_number_on_the_way() -> None:
    assert correct(completions=["#### 5\nno wait\n#### 7", "7 then\n#### 5"], answer=["7", "7"]) == [1.0, 0.0]


def test_answers_are_compared_as_mathematics() -> None:
    completions = [r"\boxed{\frac{1}{2}}", "$0.5$", "50%", r"\boxed{\frac{1}{3}}"]
    assert correct(completions=completions, answer=[r"$\frac{1}{2}$"] * 4) == [1.0, 1.0, 1.0, 0.0]


NONSENSE = (
    *("", " ", "####", "#### ", "\x00\ud800\u202e", "٣٫١٤ ½ ∞ −", "🦊", "1" * 5000, "(" * 3000, "$" * 999),
    *(r"\frac{" * 200, r"\boxed{" * 50, "answer is " * 500, "9**9**9", r"\boxed{9^{9^9}}", r"\boxed{(99999999!)!}"),
)


def test_whatever_a_model_writes_scores_and_never_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "LIMIT", 1)
    assert correct(completions=NONSENSE, answer=["72"] * len(NONSENSE)) == [0.0] * len(NONSENSE)


def test_an_endless_answer_is_computed_once_for_all_its_repetitions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "LIMIT", 1)
    start = time.monotonic()
    correct(completions=["10**10**10"] * 64, answer=["72"] * 64)
    assert time.monotonic() - start < 20  # 64 times two limits of a second each, were each computed


def test_a_gold_answer_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answer in the gold answer 'see above'"):
        correct(completions=["72"], answer=["see above"])


def test_exact_match_strips_and_compares() -> None:
    chat = [{"role": "assistant", "content": "Yes \n"}]
    assert exact_match(completions=["Yes", " Yes\n", "yes", "Yes.", chat], answer=["Yes"] * 5) == [1, 1, 0, 0, 1]
    assert exact_match(completions=["42"], answer=[42]) == [1.0]


def test_format_matches_the_whole_or_any_part() -> None:
    completions = ["<a>1</a>", "so <a>1</a>", "<a>1\n</a>"]
    assert matches(completions=completions, pattern="<a>.*</a>") == [1.0, 0.0, 0.0]
    assert matches(completions=completions, pattern="<a>.*</a>", search=True) == [1.0, 1.0, 0.0]
    assert matches(completions=completions, pattern="(?s)<a>.*</a>") == [1.0, 0.0, 1.0]


def test_length_falls_from_limit_to_limit_plus_margin() -> None:
    ids = [[0] * length for length in (0, 8, 9, 10, 12, 13)]
    assert within(completion_ids=ids, limit=8, margin=4) == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    with pytest.raises(ValueError, match="margin 0"):
        within(completion_ids=ids, limit=8, margin=0)
