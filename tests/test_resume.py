"""The demo, killed at ten random moments and continued each time, gives the metrics of the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import psutil
import pytest
from test_run import align, assert_nothing_left, descendants, finish, metrics

ROOT = Path(__file__).resolve().parent.parent
SHORTER = (
    "stages.0.sft.steps=120", "stages.0.sft.decay_steps=40", "stages.0.sft.checkpoint_every=20",
    "stages.1.grpo.steps=60", "stages.1.grpo.decay_steps=20", "stages.1.grpo.checkpoint_every=10", "evals.limit=100",
)  # fmt: skip
VICTIMS = ("driver", "TrainWorker", "RolloutWorker")
NAMED = {"TrainWorker": "training rank 0", "RolloutWorker": "rollout engine 0"}


def run(folder: Path):
    return align("run", str(ROOT / "recipes" / "demo.yaml"), "--output", str(folder), "--set", *SHORTER)


def steps_done(folder: Path) -> int:
    return sum(path.read_text().count("\n") for path in folder.glob("*/metrics.jsonl"))


def find(process, name: str) -> int | None:
    for child in psutil.Process(process.pid).children(recursive=True):
        if name in "".join(child.cmdline()):
            return child.pid
    return None


@pytest.mark.slow
def test_ten_kills_change_nothing(tmp_path: Path) -> None:
    finish(run(tmp_path / "whole"))
    moments = random.Random(7)
    for kill in range(10):
        victim, process = VICTIMS[kill % 3], run(tmp_path / "killed")
        start, wanted = steps_done(tmp_path / "killed"), moments.randint(2, 12)
        # A kill falls where the steps have got to, and then anywhere within the next one.
        while steps_done(tmp_path / "killed") < start + wanted and process.poll() is None:
            time.sleep(0.05)
        time.sleep(moments.random())
        assert process.poll() is None, f"the run ended before kill {kill}"
        pids = descendants(process)
        os.kill(process.pid if victim == "driver" else find(process, victim), signal.SIGKILL)
        killed = time.monotonic()
        output, _ = process.communicate(timeout=90)
        if victim != "driver":
            assert time.monotonic() - killed < 60
            assert process.returncode == 1 and NAMED[victim] in output, output[-2000:]
        assert_nothing_left(pids)
        print(f"kill {kill}: {victim} after {steps_done(tmp_path / 'killed')} steps")
    finish(run(tmp_path / "killed"))
    for stage in ("01-sft", "02-grpo"):
        whole, killed = metrics(tmp_path / "whole", stage), metrics(tmp_path / "killed", stage)
        assert len(whole) == len(killed)
        for expected, found in zip(whole, killed, strict=True):
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)
    tables = [json.loads((tmp_path / name / "tax.json").read_text()) for name in ("whole", "killed")]
    assert tables[0] == tables[1]
