"""The metrics file survives crashes and resumes; TensorBoard's curve continues where the run did."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from alignment.metrics import append_step, check_trackers, read, trackers, truncate_after

ROOT = Path(__file__).resolve().parents[1]


def test_rows_come_back_in_order_with_null_for_nan(tmp_path):
    path, numbers = tmp_path / "metrics.jsonl", {"loss": np.float32(0.5), "tokens/total": np.int64(12)}
    append_step(path, 1, {**numbers, "bad": float("nan"), "worse": float("inf")})
    append_step(path, 2, {"loss": None})
    assert read(path) == [
        {"step": 1, "loss": 0.5, "tokens/total": 12, "bad": None, "worse": None},
        {"step": 2, "loss": None},
    ]


def test_a_value_that_is_no_number_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"'reward/mean'.*str"):
        append_step(tmp_path / "metrics.jsonl", 1, {"reward/mean": "0.5"})
    assert list(tmp_path.iterdir()) == []


def test_a_torn_last_line_is_ignored_and_then_overwritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read(path) == [{"step": 1}]
    truncate_after(path, 1)
    append_step(path, 2, {"loss": 1.0})
    assert read(path) == [{"step": 1}, {"step": 2, "loss": 1.0}]


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read(path)


def test_truncate_after_forgets_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "samples.jsonl"
    truncate_after(path, 3)  # nothing to forget yet
    odd = "a\u0085b\u2028c\u2029d\x1ce\rf"  # what str.splitlines takes for ends of lines
    rows = [{"step": step, "loss": step / 3, "completion": odd} for step in range(1, 6)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.write_text("".join(lines) + lines[0][:-9], encoding="utf-8")
    truncate_after(path, 3)
    assert read(path) == rows[:3]
    truncate_after(path, 0)
    assert read(path) == []


def test_a_killed_process_loses_no_row(tmp_path):
    script = (
        "import os, signal, sys; from pathlib import Path; from alignment.metrics import append_step\n"
        "for step in range(1, 51): append_step(Path(sys.argv[1]), step, {'loss': 1.0})\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    path = tmp_path / "metrics.jsonl"
    done = subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT, env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == -signal.SIGKILL
    assert [row["step"] for row in read(path)] == list(range(1, 51))


def test_reading_metrics_imports_no_torch():
    script = "import sys, alignment.metrics; sys.exit('torch' in sys.modules or 'accelerate' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


def test_tensorboard_continues_after_a_kill_and_drops_what_was_lost(tmp_path):
    # The first process got to step 5 and was killed; its checkpoint was of step 3.
    with trackers(["tensorboard"], tmp_path, "02-grpo", {"name": "demo"}) as log:
        for step in range(1, 6):
            log(step, {"reward/mean": step / 10, "loss": float("nan")})
    with trackers(["tensorboard"], tmp_path, "02-grpo", {"name": "demo"}, first_step=4) as log:
        for step in range(4, 8):
            log(step, {"reward/mean": step})

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(tmp_path / "tensorboard" / "02-grpo")).Reload()
    assert events.Tags()["scalars"] == ["reward/mean"]
    curve = [(event.step, round(event.value, 6)) for event in events.Scalars("reward/mean")]
    assert curve == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 4.0), (5, 5.0), (6, 6.0), (7, 7.0)]


def test_a_missing_tracker_is_a_clear_error(tmp_path):
    with pytest.raises(ValueError, match=r"no_such_tracker is not installed; `pip install"):
        check_trackers(["no_such_tracker"])
    with pytest.raises(ValueError, match="no_such_tracker"), trackers(["no_such_tracker"], tmp_path, "01-sft", {}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_no_trackers_cost_nothing(tmp_path):
    with trackers([], tmp_path, "01-sft", {}) as log:
        log(1, {"loss": 1.0})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is optional and not installed")
def test_wandb_keeps_one_run_per_stage(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for first in (1, 3):
        with trackers(["wandb"], tmp_path, "01-sft", {"name": "demo"}, first_step=first) as log:
            log(first, {"loss": 1.0})
    (id_file,) = (tmp_path / "wandb").glob("*.id")
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    assert runs and all(run.name.endswith(id_file.read_text()) for run in runs)
