"""Scoring in real worker processes: the arithmetic, TRL's convention, and everything that can go wrong."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rewards.base import RewardError
from rewards.config import RewardConfig
from rewards.pool import RewardPool
from rollout.types import Completion, Group, Handle, Prompt, Scores

ROOT = Path(__file__).resolve().parent.parent

TRL_FILE = '''
"""Rewards as TRL's documentation writes them."""
import asyncio
import re

def reward_len(completions, **kwargs):
    return [float(len(completion)) for completion in completions]

def reward_ids(completion_ids, **kwargs):
    return [float(sum(ids)) for ids in completion_ids]

def format_reward_func(completions, **kwargs):
    """Reward function that checks if the completion has a specific format."""
    pattern = r"^<think>.*?</think><answer>.*?</answer>$"
    completion_contents = [completion[0]["content"] for completion in completions]
    matches = [re.match(pattern, content) for content in completion_contents]
    return [1.0 if match else 0.0 for match in matches]

def reward_func(completions, ground_truth, **kwargs):
    matches = [re.search(r"\\\\boxed\\{(.*?)\\}", completion) for completion in completions]
    contents = [match.group(1) if match else "" for match in matches]
    return [1.0 if c == gt else 0.0 for c, gt in zip(contents, ground_truth)]

def math_reward_func(prompts, completions, task, **kwargs):
    return [float(len(c)) if t == "math" else None for t, c in zip(task, completions)]

def reward_by_progress(completions, trainer_state, log_extra, log_metric, **kwargs):
    log_extra("half", [len(c) / 2 for c in completions])
    log_metric("progress", trainer_state.global_step / trainer_state.max_steps)
    return [float(trainer_state.global_step)] * len(completions)

async def async_reward(prompts, completions, **kwargs):
    await asyncio.sleep(0.01)
    return [float(p + c == "ab") for p, c in zip(prompts, completions)]
'''

BAD_FILE = """
import os, re, sys, time
import numpy as np

def raises(completions, **kwargs):
    print("to standard output")
    return [1 / (len(c) - 3) for c in completions]

def hangs(completions, **kwargs):
    for c in completions:
        if c == "bad":
            re.match("(a+)+b", "a" * 60)  # in C, with the interpreter's lock held
    return [1.0] * len(completions)

def slow(completions, **kwargs):
    time.sleep(0.1 * len(completions))
    return [1.0] * len(completions)

def dies(completions, **kwargs):
    if "bad" in completions:
        os._exit(3)
    return [1.0] * len(completions)

def exits(completions, **kwargs):
    if "bad" in completions:
        sys.exit("gone")
    return [1.0] * len(completions)

def segfaults(completions, **kwargs):
    if "bad" in completions:
        os.kill(os.getpid(), 11)
    return [1.0] * len(completions)

def odd(completions, bad, **kwargs):
    values = {"nan": float("nan"), "inf": float("inf"), "string": "1.0", "list": [1.0]}
    values |= {"huge": 10**400, "array": np.ones(2)}
    return [values[bad[0]] if c == "bad" else 1.0 for c in completions]

def short(completions, **kwargs):
    return [1.0 for c in completions if c != "bad"]

def nothing(completions, **kwargs):
    pass

def only_whole_batches_fail(completions, **kwargs):
    if len(completions) > 1:
        raise RuntimeError("too many")
    return [1.0]

def best_of_batch(completions, **kwargs):
    if "bad" in completions:
        raise ValueError("cannot read 'bad'")
    return [float(len(c) == max(map(len, completions))) for c in completions]

def unequal_log(completions, log_extra, **kwargs):
    log_extra("x", completions[1:])
    return [1.0] * len(completions)

def numbers(completions, **kwargs):
    return [True, 2, np.float32(0.5), np.int64(3), np.bool_(False), None][: len(completions)]

count = 0
def counts(completions, **kwargs):
    global count
    count += 1
    return [float(count)] * len(completions)

def mutates(prompts, completions, tags, **kwargs):
    for prompt, completion, tag in zip(prompts, completions, tags):
        prompt.append(completion[0])
        tag.append(1)
    return [float(len(prompt) + 10 * len(tag)) for prompt, tag in zip(prompts, tags)]

def pids(completions, pid_file, **kwargs):
    with open(pid_file, "a") as file:
        print(os.getpid(), file=file)
    hangs(completions=["bad"])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards")
    (path / "trl_style.py").write_text(TRL_FILE)
    (path / "bad.py").write_text(BAD_FILE)
    return path


def group(index: int, text: Any, completions: Sequence[str], **columns: Any) -> Group:
    """A group whose completions' token ids are the code points of their text."""
    made = (Completion(c, np.array([ord(x) for x in c], np.int32), "stop", Handle(None, 0)) for c in completions)
    return Group(Prompt(index, text, np.zeros(1, np.int32), columns), tuple(made))


def score(folder: Path, rewards: Sequence[Mapping[str, Any]], groups: Sequence[Group], **state: Any) -> list[Scores]:
    with RewardPool([RewardConfig(**reward) for reward in rewards], folder) as pool:
        return pool.submit(groups, state).result(timeout=60)


SOME = [group(11, "p", ["ok", "good"]), group(17, "q", ["fine", "bad", "ok"])]
"""The completion "bad" is number 1 of dataset row 17, number 3 of the batch."""


def test_a_reward_file_written_for_trl_runs_unchanged(folder: Path) -> None:
    names = ("reward_len", "reward_ids", "reward_func", "math_reward_func", "reward_by_progress", "async_reward")
    groups = [
        group(0, "a", ["b", r"\boxed{4}"], ground_truth="4", task="math"),
        group(1, "x", ["b", r"\boxed{4}"], ground_truth="5", task="code"),
    ]
    rewards = [{"function": f"trl_style.py:{name}"} for name in names]
    first, second = score(folder, rewards, groups, global_step=3, max_steps=12)
    ids = float(sum(map(ord, r"\boxed{4}")))
    parts = {"reward_len": [1, 9], "reward_ids": [98, ids], "reward_func": [0, 1], "math_reward_func": [1, 9],
             "reward_by_progress": [3, 3], "async_reward": [1, 0]}  # fmt: skip
    assert {name: values.tolist() for name, values in first.parts.items()} == parts
    assert first.total.tolist() == [1 + 98 + 0 + 1 + 3 + 1, 9 + ids + 1 + 9 + 3 + 0]
    assert np.isnan(second.parts["math_reward_func"]).all()  # None: not applicable
    assert second.total.tolist() == [1 + 98 + 0 + 3 + 0, 9 + ids + 0 + 3 + 0]
    assert first.extra == {"half": [0.5, 4.5], "progress": 0.25, "not_applicable": 0}
    assert first.total.dtype == np.float64


def test_trls_own_rewards_run_unchanged_on_conversations(folder: Path) -> None:
    chat = [{"role": "user", "content": "1/3?"}]
    completions = [r"<think>easy</think>It is \boxed{\frac{1}{3}}.", r"\boxed{\frac{1}{2}}"]
    rewards = [{"function": "trl.rewards:accuracy_reward"}, {"function": "trl.rewards:think_format_reward"}]
    rewards.append({"function": "trl_style.py:format_reward_func"})
    (scores,) = score(folder, rewards, [group(0, chat, completions, solution=r"$\frac{1}{3}$")])
    assert scores.parts["accuracy_reward"].tolist() == [1.0, 0.0]
    assert scores.parts["think_format_reward"].tolist() == [1.0, 0.0]
    assert scores.parts["format_reward_func"].tolist() == [0.0, 0.0]
    assert scores.extra["solution"] == [r"$\frac{1}{3}$"] * 2


def test_the_weighted_sum_leaves_out_what_does_not_apply(folder: Path) -> None:
    groups = [group(0, "p", ["abc"], task="math"), group(1, "p", ["abcd"], task="code")]
    lengths = {"function": "trl_style.py:reward_len", "weight": 0.5, "name": "length"}
    sometimes = {"function": "trl_style.py:math_reward_func", "weight": -2.0}
    first, second = score(folder, [lengths, sometimes], groups)
    assert first.total.tolist() == [0.5 * 3 - 2.0 * 3]
    assert second.total.tolist() == [0.5 * 4]
    assert first.parts["length"].tolist() == [3.0]
    _, alone = score(folder, [sometimes], groups)
    assert math.isnan(alone.total[0]) and alone.extra == {"not_applicable": 1}


def test_every_kind_of_number_is_a_reward(folder: Path) -> None:
    (scores,) = score(folder, [{"function": "bad.py:numbers"}], [group(0, "p", list("abcdef"))])
    assert scores.parts["numbers"].tolist()[:5] == [1.0, 2.0, 0.5, 3.0, 0.0]
    assert math.isnan(scores.parts["numbers"][5])


@pytest.mark.parametrize(
    ("function", "cause"),
    [
        ("raises", r"ZeroDivisionError: division by zero \(bad.py, line 7: return \[1 / \(len\(c\) - 3\)"),
        ("hangs", "gave no answer within 1 s"),
        ("dies", "its process ended with exit code 3"),
        ("segfaults", "its process was killed by SIGSEGV"),
        ("exits", r"SystemExit: gone \(bad.py, line 26"),
        ("short", "returned 0 rewards for 1 completions; the call with all 5 completions: returned 4 rewards for 5"),
    ],
)
def test_a_failing_call_is_an_error_that_names_function_row_and_cause(folder: Path, function: str, cause: str) -> None:
    with pytest.raises(RewardError, match=cause) as caught:
        score(folder, [{"function": f"bad.py:{function}", "timeout": 1.0}], SOME)
    where = f"reward '{function}' (bad.py:{function}), dataset row 17 (counted from 0), completion 1 of its group: "
    assert str(caught.value).startswith(where)


NONSENSE = {
    "nan": "returned nan",
    "inf": "returned inf",
    "string": "returned '1.0', not a number",
    "list": "returned [1.0], not a number",
    "huge": "returned int, not one number",
    "array": "returned ndarray, not one number",
}


def test_what_is_not_a_number_is_an_error_that_names_function_row_and_cause(folder: Path) -> None:
    with RewardPool([RewardConfig(function="bad.py:odd")], folder) as pool:
        for bad, cause in NONSENSE.items():
            groups = [group(11, "p", ["ok"], bad=bad), group(17, "q", ["fine", "bad"], bad=bad)]
            with pytest.raises(RewardError) as caught:
                pool.submit(groups, {}).result(60)
            where = "reward 'odd' (bad.py:odd), dataset row 17 (counted from 0), completion 1 of its group: "
            assert str(caught.value).startswith(where + cause)


def test_a_failure_that_no_single_completion_shows_is_said_to_be_one(folder: Path) -> None:
    said = "call with all 5 completions failed: RuntimeError: too many .*every completion passed"
    with pytest.raises(RewardError, match=said):
        score(folder, [{"function": "bad.py:only_whole_batches_fail"}], SOME)
    with pytest.raises(RewardError, match="it returned None, not a list of rewards"):
        score(folder, [{"function": "bad.py:nothing"}], SOME)
    with pytest.raises(RewardError, match=r"log_extra\('x', ...\) got 4 values for 5 completions"):
        score(folder, [{"function": "bad.py:unequal_log"}], SOME)


def test_a_batch_that_is_merely_slow_is_said_to_be_so_in_bounded_time(folder: Path) -> None:
    groups = [group(0, "p", [str(number) for number in range(30)])]
    start = time.monotonic()
    with pytest.raises(
        RewardError, match=r"gave no answer within 1 s; called .* the first \d+ passed, no time for the"
    ):
        score(folder, [{"function": "bad.py:slow", "timeout": 1.0}], groups)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize("function", ["raises", "hangs", "dies", "short"])
def test_masking_leaves_the_culprit_out_and_counts_it(folder: Path, function: str) -> None:
    reward = {"function": f"bad.py:{function}", "timeout": 1.0, "on_error": "mask"}
    lengths = {"function": "trl_style.py:reward_len"}
    first, second = score(folder, [reward, lengths], SOME)
    bonus = {"raises": {"ok": -1.0, "good": 1.0, "fine": 1.0}}.get(function, {"ok": 1.0, "good": 1.0, "fine": 1.0})
    assert first.total.tolist() == [bonus["ok"] + 2, bonus["good"] + 4]
    assert second.total[[0, 2]].tolist() == [bonus["fine"] + 4, bonus["ok"] + 2]
    assert np.isnan(second.total).tolist() == [False, True, False]
    assert np.isnan(second.parts[function]).tolist() == [False, True, False]
    assert second.parts["reward_len"].tolist() == [4.0, 3.0, 2.0]
    assert (first.extra[f"masked/{function}"], second.extra[f"masked/{function}"]) == (0, 1)
    assert second.extra["not_applicable"] == 0


def test_masked_nonsense_leaves_the_other_values_of_the_same_call(folder: Path) -> None:
    groups = [group(17, "q", ["fine", "bad", "ok"], bad="nan")]
    (scores,) = score(folder, [{"function": "bad.py:odd", "on_error": "mask"}], groups)
    assert scores.parts["odd"][[0, 2]].tolist() == [1.0, 1.0] and math.isnan(scores.total[1])
    assert scores.extra == {"masked/odd": 1, "not_applicable": 0}


def test_masked_rewards_of_a_function_that_compares_come_from_one_call(folder: Path) -> None:
    """With one completion at a time each would be the longest, and score 1."""
    _, second = score(folder, [{"function": "bad.py:best_of_batch", "on_error": "mask"}], SOME)
    assert second.total[[0, 2]].tolist() == [1.0, 0.0]


def test_a_call_that_fails_for_no_single_completion_masks_them_all(folder: Path) -> None:
    first, second = score(folder, [{"function": "bad.py:only_whole_batches_fail", "on_error": "mask"}], SOME)
    assert np.isnan(first.total).all() and np.isnan(second.total).all()
    assert second.extra == {"masked/only_whole_batches_fail": 3, "not_applicable": 0}


@pytest.fixture(scope="module")
def pool(folder: Path) -> Iterator[RewardPool]:
    configs = [RewardConfig(function="bad.py:counts"), RewardConfig(function="bad.py:mutates")]
    with RewardPool(configs, folder) as pool:
        yield pool


def test_a_worker_keeps_state_and_serves_submissions_in_order(pool: RewardPool) -> None:
    groups = [group(0, [{"role": "user", "content": "?"}], ["a"], tags=[])]
    futures = [pool.submit(groups, {}) for _ in range(20)]
    assert [future.result(60)[0].parts["counts"][0] for future in futures] == list(range(1, 21))


def test_values_changed_in_place_are_the_completions_own(pool: RewardPool) -> None:
    prompt = [{"role": "user", "content": "?"}]
    (scores,) = pool.submit([group(0, prompt, ["a", "b", "c"], tags=[])], {}).result(60)
    assert scores.parts["mutates"].tolist() == [2 + 10 * 1] * 3
    assert len(prompt) == 1


def test_a_column_that_some_rows_lack_is_none_there(folder: Path) -> None:
    groups = [group(0, "p", ["abc"], task="math"), group(1, "p", ["abcd"])]
    _, second = score(folder, [{"function": "trl_style.py:math_reward_func"}], groups)
    assert second.extra["not_applicable"] == 1


def test_what_a_reward_prints_does_not_reach_standard_output(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    score(folder, [{"function": "bad.py:raises"}], [group(0, "p", ["ok"])])
    out, err = capfd.readouterr()
    assert out == "" and "to standard output" in err


def test_a_reward_that_cannot_be_loaded_is_an_error_of_its_submissions(folder: Path) -> None:
    with RewardPool([RewardConfig(function="trl_style.py:reward_lem")], folder) as pool:
        for _ in range(2):
            with pytest.raises(RewardError, match="did you mean 'reward_len'"):
                pool.submit(SOME, {}).result(60)


def test_closing_ends_a_call_under_way_and_a_second_time_does_nothing(folder: Path) -> None:
    pool = RewardPool([RewardConfig(function="bad.py:hangs")], folder)
    futures = [pool.submit(SOME, {}) for _ in range(3)]
    time.sleep(1)
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 5
    for future in futures:
        with pytest.raises(RewardError, match="the reward pool is closed"):
            future.result(1)
    with pytest.raises(RewardError, match="the reward pool is closed"):
        pool.submit(SOME, {})


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_rewards_pool import RewardConfig, RewardPool, SOME

if __name__ == "__main__":
    config = RewardConfig(function="bad.py:pids", args={{"pid_file": {pid_file!r}}})
    with RewardPool([config], Path({folder!r}), workers=2) as pool:
        futures = [pool.submit(SOME, {{}}) for _ in range(2)]
        time.sleep(100)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(folder: Path, tmp_path: Path, how: signal.Signals) -> None:
    pid_file = tmp_path / "pids"
    script = PARENT.format(root=str(ROOT), tests=str(ROOT / "tests"), pid_file=str(pid_file), folder=str(folder))
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    wait_for(lambda: pid_file.exists() and len(pid_file.read_text().split()) == 2, 30)
    workers = [int(pid) for pid in pid_file.read_text().split()]
    assert all(map(alive, workers))
    parent.send_signal(how)
    parent.wait(10)
    wait_for(lambda: not any(map(alive, workers)), 10)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def test_a_kill_takes_the_processes_that_a_reward_started_along(folder: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "child"
    (folder / "starts_child.py").write_text(
        "import subprocess, time\n"
        "def starts_child(completions, **kwargs):\n"
        f"    child = subprocess.Popen(['sleep', '100'])\n    open({str(pid_file)!r}, 'w').write(str(child.pid))\n"
        "    time.sleep(100)\n"
    )
    reward = {"function": "starts_child.py:starts_child", "timeout": 1.0}
    with pytest.raises(RewardError, match="gave no answer"):
        score(folder, [reward], [group(0, "p", ["ok"])])
    wait_for(lambda: not alive(int(pid_file.read_text())), 5)
