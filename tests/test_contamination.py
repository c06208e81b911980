"""Eval items in training rows: a brute-force oracle, planted copies in other dress, and what must not be flagged."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from recipes.contamination import Overlap, normal_words, overlaps, summary

ROOT = Path(__file__).resolve().parent.parent
QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. "
    "How many clips did Natalia sell altogether in April and May?"
)


def tuples(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def oracle(items, rows, n) -> set[tuple[str, int, str, int]]:
    """The definition, by intersecting sets of tuples, item by item and row by row."""
    found = set()
    for task, pairs in items.items():
        words = [[text.lower().split() for text in pair] for pair in pairs]
        grams = [set().union(*(tuples(text, n) for text in pair)) for pair in words]
        common = Counter(gram for item in grams for gram in item)
        template = {gram for gram, count in common.items() if count > 10 and count > len(pairs) // 2}
        for item, (question, _) in enumerate(words):
            for source, number, text in rows:
                row = text.lower().split()
                whole = 0 < len(question) < n and question == row
                if whole or (grams[item] - template) & tuples(row, n):
                    found.add((task, item, source, number))
    return found


def places(found: list[Overlap]) -> set[tuple[str, int, str, int]]:
    assert len({(one.task, one.item, one.source, one.row) for one in found}) == len(found), "a row twice"
    return {(one.task, one.item, one.source, one.row) for one in found}


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(6))
def test_random_texts_agree_with_brute_force(n: int, seed: int):
    draw = random.Random(seed)

    def text(most: int) -> str:
        return " ".join(draw.choices("abcdefg", k=draw.randint(0, most)))

    items = {task: [(text(9), text(6)) for _ in range(draw.randint(0, 30))] for task in ("x", "y", "z")}
    rows = [(draw.choice("rs"), number, text(12)) for number in range(700)]
    found = overlaps(items, iter(rows), n)
    assert places(found) == oracle(items, rows, n) and (found or n == 5)
    for one in found:
        row = next(text for source, number, text in rows if (source, number) == (one.source, one.row))
        assert f" {one.words} " in f" {row} " and len(one.words.split()) <= n


DRESSES = {
    "case": QUESTION.upper(),
    "punctuation": QUESTION.replace(" ", " -- ").replace("?", "!?").replace(".", "…"),
    "white space": QUESTION.replace(" ", "\n\t\u00a0 "),
    "inside a longer text": f"Here is a problem. {QUESTION} Solve it.",
    "only thirteen words of it": " ".join(QUESTION.split()[4:17]),
    "quotes and markup": "<p>«" + QUESTION.replace(" clips ", " **clips** ") + "»</p>",
    "full-width letters": "".join(chr(ord(c) + 0xFEE0) if c.isalpha() else c for c in QUESTION),
}


@pytest.mark.parametrize("dress", DRESSES)
def test_a_copy_in_another_dress_is_found(dress: str):
    rows = [("sft", 0, "nothing to see"), ("sft", 1, DRESSES[dress]), ("sft", 2, QUESTION[:40])]
    (found,) = overlaps({"gsm8k": [("Something else", ""), (QUESTION, "#### 72")]}, rows)
    assert (found.task, found.item, found.source, found.row) == ("gsm8k", 1, "sft", 1)
    assert len(found.words.split()) == 13 and found.words in " ".join(normal_words(QUESTION))


def test_twelve_words_or_thirteen_that_are_not_on_end_are_no_overlap():
    words = QUESTION.split()
    for text in (" ".join(words[:12]), " ".join([*words[:12], "x", *words[12:24]]), " ".join(reversed(words))):
        assert overlaps({"gsm8k": [(QUESTION, "")]}, [("sft", 0, text)]) == []
    halves = [("sft", 0, " ".join(words[:12])), ("sft", 1, " ".join(words[12:]))]
    assert all(one.row == 1 for one in overlaps({"gsm8k": [(QUESTION, "")]}, halves)), "rows are not joined"
    split = overlaps({"gsm8k": [(" ".join(words[:8]), " ".join(words[8:16]))]}, [("sft", 0, QUESTION)])
    assert split == [], "question and answer are not joined"


def test_a_short_question_counts_as_a_whole_text_and_a_short_answer_never():
    items = {"sums": [("12 plus 30 =", "42"), ("", "42"), ("?!", "7")]}
    texts = ["12 Plus 30", "so 12 plus 30", "42", "", "!", "12 plus 30 ="]
    found = overlaps(items, [("sft", number, text) for number, text in enumerate(texts)])
    assert [(one.item, one.row, one.words) for one in found] == [(0, 0, "12 plus 30"), (0, 5, "12 plus 30")]


def test_a_long_reference_answer_counts():
    answer = "Natalia sold 48 / 2 = 24 clips in May and 48 + 24 = 72 clips altogether"
    assert len(overlaps({"gsm8k": [("Who?", answer)]}, [("sft", 3, f"Well: {answer}.")])) == 1


def test_words_of_most_items_are_the_tasks_template():
    stem = "answer the following question with the name of one colour and nothing else please"
    items = {"colours": [(f"{stem} object number {i} of this long list", "") for i in range(30)]}
    rows = [("grpo", 0, f"{stem} what colour is grass"), ("grpo", 1, f"{stem} object number 7 of this long list")]
    assert [(one.item, one.row) for one in overlaps(items, rows)] == [(7, 1)]
    few = {"colours": items["colours"][:10]}
    assert len(overlaps(few, rows[:1])) == 10, "ten questions on one passage are no template"


def test_other_scripts():
    assert normal_words("Été, e\u0301te\u0301; STRASSE straße") == ["été", "été", "strasse", "strasse"]
    chinese = "小明有三个苹果他又买了五个苹果请问现在一共有几个"
    found = overlaps({"c-eval": [(chinese, "")]}, [("sft", 0, f"题目：{chinese[4:18]}。"), ("sft", 1, chinese[:9])])
    assert [one.row for one in found] == [0]
    russian = "Сколько яблок осталось у Маши если она отдала два яблока брату и ещё три яблока сестре"
    assert len(overlaps({"ru": [(russian, "")]}, [("sft", 0, russian.upper())])) == 1


def test_nothing_to_compare():
    assert overlaps({}, [("sft", 0, QUESTION)]) == [] and overlaps({"a": []}, [("sft", 0, QUESTION)]) == []
    assert overlaps({"a": [(QUESTION, "")]}, []) == []


def test_summary_counts_items_and_names_the_first_rows():
    items = {"a": [(QUESTION, "")] * 2 + [("one two", "")], "b": [("three", "")]}
    rows = [("sft", number, QUESTION) for number in (9, 4, 5, 6, 7, 8)] + [("rl", 1, "Three!"), ("sft", 2, "One, two")]
    lines = summary(overlaps(items, rows), items)
    assert [tuple(line.values())[:4] for line in lines] == [
        ("sft", "a", 3, 3),
        ("rl", "b", 1, 1),
    ]
    assert lines[0]["rows"] == [2, 4, 5, 6, 7] and lines[0]["words"] == "one two"
    assert json.loads(json.dumps(lines)) == lines


@pytest.mark.slow
def test_a_million_rows_take_less_than_two_minutes():
    done = subprocess.run(
        [sys.executable, "benchmarks/contamination.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    seconds = float(done.stdout.split(" s, ")[0].split()[-1])
    assert seconds < 120 and "1,000 rows found, 1,000 planted" in done.stdout, done.stdout + done.stderr
