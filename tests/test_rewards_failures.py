"""Rewards that raise, hang, die or return nonsense, in real worker processes; and how workers end."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reward_files import SOME, alive, group, score, wait_for, write_files

from rewards.config import RewardConfig
from rewards.pool import RewardError, RewardPool

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("rewards"))


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
    "bytes": "returned b'1.0', not a number",
    "bytearray": "returned bytearray(b'1.0'), not a number",
    "memoryview": "returned <memory at ",
    "list": "returned [1.0], not a number",
    "huge": "returned 10000",
    "array": "returned array([1., 1.]), not a number",
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
    said = "call with all 5 completions failed: RuntimeError: too many .*; with one at a time, the first 5 passed"
    with pytest.raises(RewardError, match=said):
        score(folder, [{"function": "bad.py:only_whole_batches_fail"}], SOME)
    with pytest.raises(RewardError, match="it returned None, not a list of rewards"):
        score(folder, [{"function": "bad.py:nothing"}], SOME)
    with pytest.raises(RewardError, match=r"log_extra\('x', ...\) got 4 values for 5 completions"):
        score(folder, [{"function": "bad.py:unequal_log"}], SOME)


def test_a_batch_that_is_merely_slow_is_said_to_be_so_in_bounded_time(folder: Path) -> None:
    groups = [group(0, "p", [str(number) for number in range(30)])]
    with pytest.raises(RewardError, match=r"gave no answer within 1 s; with one at a time, the first \d\d? passed"):
        score(folder, [{"function": "bad.py:slow", "timeout": 1.0}], groups)


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


def test_masked_nonsense_leaves_the_other_values_of_the_same_call(folder: Path) -> None:
    groups = [group(17, "q", ["fine", "bad", "ok"], bad="nan")]
    (scores,) = score(folder, [{"function": "bad.py:odd", "on_error": "mask"}], groups)
    assert scores.parts["odd"][[0, 2]].tolist() == [1.0, 1.0] and math.isnan(scores.total[1])


def test_masked_rewards_of_a_function_that_compares_come_from_one_call(folder: Path) -> None:
    """With one completion at a time each would be the longest, and score 1."""
    _, second = score(folder, [{"function": "bad.py:best_of_batch", "on_error": "mask"}], SOME)
    assert second.total[[0, 2]].tolist() == [1.0, 0.0]


def test_a_call_without_the_culprit_still_gets_each_rows_own_columns(folder: Path) -> None:
    groups = [group(3, "p", ["bad"], bonus=1), group(4, "q", ["ok", "bad"], bonus=2), group(5, "p", ["ok"], bonus=3)]
    scores = score(folder, [{"function": "bad.py:bonus_of_row", "on_error": "mask"}], groups)
    assert [scores[1].total[0], scores[2].total[0]] == [12.0, 3.0]
    assert math.isnan(scores[0].total[0]) and math.isnan(scores[1].total[1])


def test_a_call_that_fails_for_no_single_completion_masks_them_all(folder: Path) -> None:
    first, second = score(folder, [{"function": "bad.py:only_whole_batches_fail", "on_error": "mask"}], SOME)
    assert np.isnan(first.total).all() and np.isnan(second.total).all()


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
    assert time.monotonic() - start < 30  # the reward's own limit is 60
    for future in futures:
        with pytest.raises(RewardError, match="the reward pool is closed"):
            future.result(1)
    with pytest.raises(RuntimeError, match="shutdown"):
        pool.submit(SOME, {})


PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
sys.path.insert(0, {root!r})
sys.path.insert(0, {tests!r})
from pathlib import Path
from reward_files import SOME
from rewards.config import RewardConfig
from rewards.pool import RewardPool

if __name__ == "__main__":
    configs = [RewardConfig(name=n, function="bad.py:pids", args={{"pid_file": {pid_file!r}}}) for n in "ab"]
    with RewardPool(configs, Path({folder!r})) as pool:
        pool.submit(SOME, {{}})
        time.sleep(100)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_its_parent(folder: Path, tmp_path: Path, how: signal.Signals) -> None:
    pid_file = tmp_path / "pids"
    script = PARENT.format(root=str(ROOT), tests=str(ROOT / "tests"), pid_file=str(pid_file), folder=str(folder))
    parent = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    wait_for(lambda: pid_file.exists() and len(pid_file.read_text().split()) == 2, 60)
    workers = [int(pid) for pid in pid_file.read_text().split()]
    assert all(map(alive, workers))
    parent.send_signal(how)
    parent.wait(30)
    wait_for(lambda: not any(map(alive, workers)), 30)


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
