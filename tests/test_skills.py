"""The demo's data: right answers, no held-out problem in training, the same rows in every process."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import skills

ROOT = Path(__file__).resolve().parent.parent


def right_answer(prompt: str) -> str:
    """Worked out from the text alone."""
    skill, *operands, equals = prompt.split(" ")
    assert equals == "="
    if skill == "add":
        return str(sum(int(operand) for operand in operands))
    if skill == "sort":
        (digits,) = operands
        return "".join(digit * digits.count(digit) for digit in "0123456789")
    assert skill == "reverse"
    return " ".join(operands[::-1])


def test_every_answer_is_right():
    rows = skills.sft_rows(300, 300, 300) + [row for skill in skills.SKILLS for row in skills.eval_rows(skill, 200)]
    rows += skills.skill_prompts("addition", 300)
    for row in rows:
        assert row["answer"] == right_answer(row["prompt"])
        assert row.get("completion", " " + row["answer"]) == " " + row["answer"]


def test_rows_are_as_many_as_asked_distinct_and_mixed():
    rows = skills.sft_rows(addition=700, sorting=400, reversing=300)
    kinds = [row["prompt"].split()[0] for row in rows]
    assert (kinds.count("add"), kinds.count("sort"), kinds.count("reverse")) == (700, 400, 300)
    assert len({row["prompt"] for row in rows}) == 1400
    assert set(kinds[:20]) == {"add", "sort", "reverse"}
    assert [len(skills.eval_rows(skill)) for skill in skills.SKILLS] == [500, 500, 500]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_held_out_problems_are_never_trained_on(seed: int):
    trained = {
        row["prompt"] for row in skills.sft_rows(5000, 4000, 4000, seed) + skills.skill_prompts("addition", 20000, seed)
    }
    held_out = [row["prompt"] for skill in skills.SKILLS for row in skills.eval_rows(skill, 500)]
    assert len(set(held_out)) == 1500
    assert trained.isdisjoint(held_out)


def test_the_split_is_by_the_problem_and_not_by_the_draw(monkeypatch):
    """Were training and held-out rows only drawn with different seeds, they would meet."""
    monkeypatch.setattr(skills, "is_for_evals", lambda prompt: False)
    trained = {row["prompt"] for row in skills.skill_prompts("addition", 20000)}
    monkeypatch.setattr(skills, "is_for_evals", lambda prompt: True)
    assert not trained.isdisjoint(row["prompt"] for row in skills.eval_rows("addition"))


def test_rl_draws_from_every_problem_that_is_not_held_out():
    prompts = {row["prompt"] for row in skills.skill_prompts("addition", 20000)}
    problems = {f"add {a} {b} =" for a in range(100) for b in range(100)}
    assert prompts <= problems and len(prompts) > 8000
    assert 8900 < sum(not skills.is_for_evals(problem) for problem in problems) < 9100


def test_seeds_change_training_rows_and_leave_held_out_ones():
    assert skills.sft_rows(50, 50, 50, seed=0) == skills.sft_rows(50, 50, 50)
    assert skills.sft_rows(50, 50, 50, seed=0) != skills.sft_rows(50, 50, 50, seed=1)
    assert skills.eval_rows("sorting", 20) == skills.eval_rows("sorting", 100)[:20]


def test_global_random_state_is_neither_read_nor_changed():
    random.seed(5)
    before, rows = random.getstate(), skills.sft_rows(20, 20, 20)
    assert random.getstate() == before
    random.seed(6)
    assert skills.sft_rows(20, 20, 20) == rows


def test_other_processes_make_the_same_rows():
    code = "import json, recipes.skills as s; print(json.dumps([s.sft_rows(9, 9, 9), s.eval_rows('addition', 9)]))"
    here = [skills.sft_rows(9, 9, 9), skills.eval_rows("addition", 9)]
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed}
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == here


def test_published_held_out_items_do_not_change():
    """Results in benchmarks/results/ were measured on these items: a change here makes them incomparable."""
    text = json.dumps([skills.eval_rows(skill) for skill in skills.SKILLS])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "4e97e871541a124e"


def test_completions_are_short_and_digits_and_letters_are_tokens_of_their_own():
    from alignment.config import InitConfig
    from alignment.model import train_tokenizer

    rows = skills.sft_rows(700, 4000, 4000)
    tokenizer = train_tokenizer(InitConfig(), [row["prompt"] + row["completion"] for row in rows])
    assert tokenizer.tokenize("add 47 85 =")[-6:] == ["4", "7", "Ġ", "8", "5", "Ġ="]
    assert tokenizer.tokenize(" x q j") == ["Ġx", "Ġq", "Ġj"]
    lengths = [len(tokenizer(row["completion"])["input_ids"]) for row in rows]
    assert max(lengths) <= 7 and sum(lengths) / len(lengths) < 6


def test_right_digits_are_counted_from_the_right():
    said = [" 132", "32", "131", "1320", "", "x"]
    assert skills.right_digits(said, answer=["132"] * 6, prompts=said) == [1, 2 / 3, 2 / 3, 0, 0, 0]


def test_impossible_requests_say_what_is_wrong(monkeypatch):
    with pytest.raises(ValueError, match="unknown skill `sums`; there are: addition, sorting, reversing"):
        skills.eval_rows("sums")
    with pytest.raises(ValueError, match="cannot make -1 rows"):
        skills.sft_rows(-1, 0, 0)
    monkeypatch.setitem(skills.SKILLS, "sorting", lambda rng: (f"sort {rng.randrange(30)} =", ""))
    with pytest.raises(ValueError, match=r"sorting: asked for 100 distinct rows, found \d+; ask for fewer"):
        skills.sft_rows(0, 100, 0)
