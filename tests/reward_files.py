"""Reward files that tests load into real workers, and groups to score with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rewards.config import RewardConfig
from rewards.pool import RewardPool
from rollout.types import Completion, Group, Handle, Prompt, Scores

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
    values |= {"bytes": b"1.0", "bytearray": bytearray(b"1.0"), "memoryview": memoryview(b"1.0")}
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

def bonus_of_row(prompts, completions, bonus, **kwargs):
    if "bad" in completions:
        raise ValueError("cannot read 'bad'")
    return [b + 10 * (p == "q") for p, b in zip(prompts, bonus)]

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


def write_files(folder: Path) -> Path:
    (folder / "trl_style.py").write_text(TRL_FILE)
    (folder / "bad.py").write_text(BAD_FILE)
    return folder


def group(index: int, text: Any, completions: Sequence[str], **columns: Any) -> Group:
    """A group whose completions' token ids are the code points of their text."""
    made = (Completion(c, np.array([ord(x) for x in c], np.int32), "stop", Handle(None, 0)) for c in completions)
    return Group(Prompt(index, text, np.zeros(1, np.int32), columns), tuple(made))


def score(folder: Path, rewards: Sequence[Mapping[str, Any]], groups: Sequence[Group], **state: Any) -> list[Scores]:
    with RewardPool([RewardConfig(**reward) for reward in rewards], folder) as pool:
        return pool.submit(groups, state).result(timeout=60)


SOME = [group(11, "p", ["ok", "good"]), group(17, "q", ["fine", "bad", "ok"])]
"""The completion "bad" is number 1 of dataset row 17, number 3 of the batch."""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
