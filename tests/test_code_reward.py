"""Programs are scored by their tests, apart from them, in a sandbox that they cannot leave and whose end they do not
survive. Where no sandbox works these tests fail: set-up installs one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from adversaries import FOOLS, HARM, OPEN
from eval_fakes import BigramSampler, Characters
from test_evals import RECIPES, run

from alignment.config import EvalConfig
from alignment.evals import check_tasks
from rewards import code
from rewards.code import PYTHON, passes_tests
from rewards.config import RewardConfig, check_reward

TESTS = "assert answer() == 4321 and answer() != 1234"
ROOT = Path(__file__).resolve().parent.parent
HUMANEVAL = EvalConfig(tasks=("tasks/humaneval.yaml",))


@pytest.fixture(scope="module")
def humaneval(shared_data: Path) -> list[dict[str, str]]:
    with open(shared_data / "humaneval" / "test.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def score(program: str, tests: Any = TESTS, **args: Any) -> float:
    return passes_tests(completions=[program], tests=[tests], **args)[0]


def score_all(rows: list[dict[str, str]], completions: list[Any], **args: Any) -> list[float]:
    columns = {"tests": [row["test"] for row in rows], "entry_point": [row["entry_point"] for row in rows]}
    return passes_tests(completions=completions, prompts=[row["prompt"] for row in rows], **columns, **args)


def with_last_line(solution: str, line: str) -> str:
    *before, last = solution.rstrip().splitlines()
    return "\n".join([*before, last[: len(last) - len(last.lstrip())] + line])


def test_humanevals_own_solutions_pass(humaneval: list[dict[str, str]]) -> None:
    solutions = [row["canonical_solution"] for row in humaneval]
    assert score_all(humaneval, solutions, prefix="prompts", seconds=30) == [1.0] * 164


def test_with_a_broken_last_line_they_fail(humaneval: list[dict[str, str]]) -> None:
    broken = [with_last_line(row["canonical_solution"], "return None") for row in humaneval]
    assert score_all(humaneval, broken, prefix="prompts", seconds=30) == [0.0] * 164


def test_a_completion_may_be_a_whole_program_in_a_fence_or_a_chat(humaneval: list[dict[str, str]]) -> None:
    row = humaneval[0]
    program = row["prompt"] + row["canonical_solution"]
    fenced = f"First\n```python\nraise SystemExit\n```\nbetter:\n```python\n{program}```\nIt works."
    chat = [{"role": "assistant", "content": fenced}]
    assert score_all([row] * 4, [program, fenced, chat, fenced.replace("True", "False")]) == [1, 1, 1, 0]
    assert score_all([row] * 2, [chat, "```\n" + row["canonical_solution"]], prefix="prompts") == [1, 1]


def test_what_the_prompt_defines_is_not_the_programs_to_change(humaneval: list[dict[str, str]]) -> None:
    row = humaneval[32]
    assert "assert math.fabs(poly(coeffs, solution)) < 1e-4" in row["test"]
    assert score_all([row], ["    return 0.0\ndef poly(xs, x):\n    return 0.0\n"], prefix="prompts") == [0.0]


PLAIN = "[None, True, -3, 10**5000, 0.1, float('-inf'), 2+1j, 'ä\\ud800', b'\\0', (1, [2]), {1: {2}, (3,): {}}, set()]"


def test_plain_data_cross_both_ways_as_they_are() -> None:
    tests = f"x = {PLAIN}\nassert f(*x, last={{'k': frozenset((1,))}}) == (x, {{'last': {{'k': frozenset((1,))}}}})"
    exact = "assert repr(f(1, 1.0, True)[0]) == '[1, 1.0, True]' and f(float('nan'))[0][0] != 0"
    assert score("def f(*args, **kwargs): return list(args), kwargs", [tests, exact]) == 1.0


def test_tests_may_call_several_functions_print_and_expect_exceptions() -> None:
    program = """class MyError(KeyError): ...
def double(x):
    print(x)
    return 2 * x
def fails(x):
    raise MyError(x)"""
    tests = [
        "print('fine')\nassert double(double(2)) == 8",
        "try:\n    fails('why')\nexcept KeyError as e:\n    why = e",
    ]
    assert score(program, tests) == 1.0
    assert score(program, [*tests, "assert double(2) == 5"]) == 0.0
    assert score(program, [*tests, "missing(2)"]) == 0.0


def test_arguments_are_copies_so_that_a_program_cannot_change_what_it_is_compared_with() -> None:
    assert score("def f(x):\n    x.clear()\n    return []", "x = [2, 1]\nassert f(x) == sorted(x)") == 0.0


NO_PROGRAMS = ("", "def answer(:", "\0", "\ud800", "import torch", "answer = 4321", "raise ValueError", "(" * 10_000)


def test_what_is_no_program_scores_zero() -> None:
    assert passes_tests(completions=NO_PROGRAMS, tests=[TESTS] * len(NO_PROGRAMS)) == [0.0] * len(NO_PROGRAMS)


def test_tests_that_are_no_python_are_an_error() -> None:
    with pytest.raises(SyntaxError):
        score("def f(): return 1", "assert f( == 1")
    with pytest.raises(KeyError, match="entry_point"):
        score("def f(): return 1", "def check(candidate):\n    assert candidate() == 1")


@pytest.mark.parametrize(
    ("command", "program", "expected"),
    [
        ("/usr/bin/env bash -c", 'read a b; echo "$((a + b))"', [1.0, 1.0, 0.0]),
        ("/usr/bin/env bash -c", "echo 5", [1.0, 0.0, 0.0]),
        (" ".join(PYTHON), "print(sum(map(int, input().split())))", [1.0, 1.0, 0.0]),
    ],
)
def test_another_language_reads_input_and_prints(command: str, program: str, expected: list[float]) -> None:
    cases = [{"input": "2 3\n", "output": "5"}, {"input": "4 5", "output": "9\n"}, {"input": "1 1", "output": "3"}]
    tests = [cases[:1], cases[:2], cases]
    assert passes_tests(completions=[program] * 3, tests=tests, command=command) == expected


def test_compiler_that_the_sandbox_lacks_is_an_error_and_no_score() -> None:
    with pytest.raises(RuntimeError, match="cannot run 'no-such-compiler'"):
        passes_tests(completions=["1"], tests=[[{"input": "", "output": ""}]], command="no-such-compiler")


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """A word in the command line of every process that a program or its tests start."""
    word = f"mark{time.monotonic_ns()}"
    monkeypatch.setattr(code, "SIDE", (*code.SIDE[:-1], f"{code.SIDE[-1]}\n# {word}"))
    return word


def gone(mark: str, seconds: float = 3.0) -> bool:
    """No process of ours is left, a moment later; none of the files that programs tried to write is there."""
    end = time.monotonic() + seconds
    while any(mark in " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return not any(os.path.exists(f"{folder}/{mark}") for folder in ("", "/tmp", "/usr", "/dev", "/dev/shm", "/etc"))


@pytest.mark.parametrize("name", FOOLS)
def test_a_program_that_fools_a_scorer_in_its_own_process_does_not_fool_this_one(name: str, mark: str) -> None:
    both = subprocess.run([*PYTHON, f"{FOOLS[name]}\n{TESTS}"], capture_output=True, timeout=60)
    assert both.returncode == 0, "no adversary at all"
    assert score(FOOLS[name]) == 0.0 and gone(mark)


@pytest.mark.parametrize("name", OPEN)
def test_what_a_program_can_do_with_its_users_rights_it_cannot_in_the_sandbox(
    name: str, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLANTED", "secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        body = OPEN[name].replace("PORT", str(server.getsockname()[1])).replace("HOST", str(os.getpid()))
        program = f"import mmap, os, socket\ndef answer():\n    return 4321 if {body.replace('MARK', mark)} else 0"
        assert score(program) == 0.0 and gone(mark)
        assert score(program, sandbox="none") == 1.0, "no adversary at all"
    Path(f"/tmp/{mark}").unlink(missing_ok=True)


@pytest.mark.parametrize("name", HARM)
def test_what_would_harm_the_machine_is_stopped_in_time_and_leaves_nothing(name: str, mark: str) -> None:
    compile(HARM[name], name, "exec")
    start = time.monotonic()
    assert score(HARM[name].replace("MARK", mark), seconds=3) == 0.0
    assert time.monotonic() - start < 15 and gone(mark)


def test_processes_are_limited_for_root_as_well() -> None:
    program = """import os, time
def answer():
    for number in range(50):
        try:
            if os.fork() == 0:
                time.sleep(99)
        except OSError:
            return number"""
    assert score(program, "assert 0 < answer() < 5", processes=5) == 1.0


def test_a_program_sees_the_system_alone() -> None:
    program = "import os\ndef seen(): return os.listdir('/'), os.listdir('/tmp'), os.listdir('/dev'), dict(os.environ)"
    own = Path(os.path.realpath(sys.base_prefix)).parts[1]
    tests = f"""root, tmp, dev, environment = seen()
assert set(root) <= {{'bin', 'dev', 'lib', 'lib64', 'tmp', 'usr', {own!r}}} and not tmp and dev == ['null']
assert set(environment) <= {{'PATH', 'HOME', 'LANG', 'PWD', 'LC_CTYPE'}}"""
    assert score(program, tests) == 1.0


def test_nothing_survives_the_process_that_scores() -> None:
    mark = f"mark{time.monotonic_ns()}"
    script = f"""from rewards import code
code.SIDE = (*code.SIDE[:-1], code.SIDE[-1] + "\\n# {mark}")
code.passes_tests(completions=["import os, time\\nos.fork()\\ntime.sleep(99)"], tests=["f()"], seconds=99)"""
    # This script, two processes of bubblewrap for each side, the tests', their timeout's, the program's, and its child.
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT) as scorer:
        while sum(mark in " ".join(p.info["cmdline"] or ()) for p in psutil.process_iter(["cmdline"])) < 9:
            time.sleep(0.05)
            assert scorer.poll() is None
        scorer.kill()
    assert gone(mark)


@pytest.fixture
def no_bubblewrap(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["no-such-bwrap" if part == "bwrap" else part for part in command], **options)

    monkeypatch.setattr(code, "Popen", start)


def test_without_a_sandbox_a_recipe_is_refused_unless_it_says_none(no_bubblewrap: None, shared_data: Path) -> None:
    config = RewardConfig(function="rewards.code:passes_tests")
    with pytest.raises(ValueError, match=r"needs bubblewrap .`apt-get install bubblewrap`.*no-such-bwrap"):
        check_reward(config, Path("."), {"prompt", "tests"})
    check_reward(config.model_copy(update={"args": {"sandbox": "none"}}), Path("."), {"prompt", "tests"})
    with pytest.raises(ValueError, match="apt-get install bubblewrap"):
        check_tasks(HUMANEVAL, RECIPES, 4096, Characters(), data_dir=shared_data)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="no sandbox came up"):
        score("def answer(): return 4321")
    assert score("def answer(): return 4321", sandbox="none") == 1.0


def test_with_a_sandbox_it_passes_its_check() -> None:
    check_reward(RewardConfig(function="rewards.code:passes_tests"), Path("."), {"prompt", "tests"})
    with pytest.raises(ValueError, match="needs 'tests'"):
        check_reward(RewardConfig(function="rewards.code:passes_tests"), Path("."), {"prompt"})


def test_humaneval_is_an_eval_on_the_real_file(humaneval: list[dict[str, str]], shared_data: Path) -> None:
    """A model that knows every other answer; those of over 256 tokens, here letters, are cut."""
    assert HUMANEVAL.tasks[0] in yaml.safe_load((RECIPES / "gsm8k_bbh.yaml").read_text())["evals"]["tasks"]
    known = {row["prompt"]: row["canonical_solution"] for row in humaneval[:16:2]}
    sampler = BigramSampler(lambda prompt, request: known.get(prompt, "    return None\n") + "\ndef more(): ...")
    (result,), _ = run(sampler, RECIPES, *HUMANEVAL.tasks, data_dir=shared_data, limit=16)
    expected = [float(row["prompt"] in known and len(row["canonical_solution"]) < 256) for row in humaneval[:16]]
    assert (result.task, result.metric, result.values.tolist()) == ("humaneval", "pass@1", expected)
    assert 4 < sum(expected) <= 8
