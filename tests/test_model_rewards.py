"""Trained models as rewards, rewards on one scale, and sampled completions as data."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import ray
import torch
from tiny import model_dir, tokenizer
from transformers import AutoConfig, AutoModelForSequenceClassification

from alignment.grpo import rollout_metrics
from alignment.model import check_classifier
from alignment.sample import sampled_rows, write_data
from hybrid_engine.actors import launch
from hybrid_engine.reward_worker import ModelReward, RewardWorker, batches
from rewards.config import RewardConfig
from rewards.normalize import RewardNormalizer
from rewards.pool import RewardError, RewardPool
from rollout.types import Completion, Group, Handle, Prompt, Scores

TEXTS = ["4", "The answer is 4.", "no", "What is 2 plus 2? " * 6]


def group(index: int, texts: list[str], scores: Scores | None = None, text="What is 2 plus 2?") -> Group:
    ids = [np.arange(len(one), dtype=np.int32) for one in texts]
    completions = tuple(
        Completion(one, own, "stop", Handle(None, i)) for i, (one, own) in enumerate(zip(texts, ids, strict=True))
    )
    return Group(Prompt(index, text, np.arange(3, dtype=np.int32), {}), completions, scores)


def scored(index: int, texts: list[str], **parts: list[float]) -> Group:
    values = {name: np.array(value, float) for name, value in parts.items()}
    return group(index, texts, Scores(sum(values.values()), values, {}))


def classifier_dir(folder: Path) -> Path:
    config = AutoConfig.from_pretrained(model_dir("qwen3_moe"))
    config.num_labels, config.max_position_embeddings = 1, 120
    torch.manual_seed(1)
    AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_dir(tmp_path_factory.mktemp("classifier"))


@pytest.fixture(scope="module")
def cluster():
    ray.init("local", include_dashboard=False, log_to_driver=False, num_cpus=2)
    yield
    ray.shutdown()


def judge(folder: Path, **settings) -> ModelReward:
    worker = launch(RewardWorker, (str(folder), False, 64), 1, {}, None, 0, 0.0)
    found = ModelReward(RewardConfig(path=str(folder), **settings), worker, threading.Lock())
    found.allow()
    return found


def test_scores_are_those_of_each_text_alone(classifier: Path, cluster):
    model, tok = AutoModelForSequenceClassification.from_pretrained(classifier).eval(), tokenizer()
    with torch.no_grad():
        texts = [f"What is 2 plus 2?{text}<eos>" for text in TEXTS]
        expected = [model(torch.tensor([tok(text)["input_ids"]])).logits.item() for text in texts]
    source = judge(classifier, weight=2.0)
    config = source.config
    with RewardPool([config], classifier, models={config.label: source}) as pool:
        first, second = pool.submit([group(0, TEXTS), group(1, TEXTS[::-1])], {}).result()
    np.testing.assert_allclose(first.parts[config.label], expected, atol=1e-5)
    np.testing.assert_allclose(second.total, 2 * np.array(expected[::-1]), atol=2e-5)


def test_text_longer_than_the_models_context_is_named(classifier: Path, cluster):
    config = RewardConfig(path=str(classifier), name="judge")
    with RewardPool([config], classifier, models={"judge": judge(classifier)}) as pool:
        future = pool.submit([group(5, ["a", "What is 2 plus 2? " * 60])], {})
        with pytest.raises(RewardError, match=r"row 5 .*completion 1 .*tokens, the reward model's context is 120"):
            future.result()


def test_score_that_is_no_number_is_an_error(classifier: Path, cluster, tmp_path: Path):
    broken = AutoModelForSequenceClassification.from_pretrained(classifier)
    torch.nn.init.constant_(broken.score.weight, math.inf)
    broken.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    source = judge(tmp_path, name="judge")
    with RewardPool([source.config], tmp_path, models={"judge": source}) as pool:
        future = pool.submit([group(0, TEXTS)], {})
        with pytest.raises(RewardError, match=r"reward 'judge' .*completion 0 of its group: returned (nan|-?inf)"):
            future.result()


def test_dead_reward_model_is_named(classifier: Path, cluster):
    config = RewardConfig(path=str(classifier), name="judge")
    source = judge(classifier)
    with RewardPool([config], classifier, models={"judge": source}) as pool:
        source.ready()
        ray.kill(source.worker)
        with pytest.raises(RewardError, match=r"reward model .*died"):
            pool.submit([group(0, TEXTS)], {}).result()


def test_model_waits_for_its_phase(classifier: Path, cluster):
    config, source = RewardConfig(path=str(classifier), name="judge"), judge(classifier)
    source.release()
    with RewardPool([config], classifier, models={"judge": source}) as pool:
        future = pool.submit([group(0, TEXTS)], {})
        source.ready()
        assert not future.done()
        source.allow()
        assert len(future.result(60)[0].total) == 4


def test_batches_keep_to_the_budget_and_lose_nothing():
    lengths = [3, 50, 9, 70, 8, 8, 1]
    found = batches(lengths, 60)
    assert sorted(i for batch in found for i in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 60 or len(batch) == 1 for batch in found)
    assert len(found) == 3  # 70 | 50 | 9 8 8 3 1


def test_only_a_classifier_with_one_output_is_a_reward(classifier: Path, tmp_path: Path):
    assert check_classifier(str(classifier), Path()) == str(classifier)
    with pytest.raises(ValueError, match="a sequence classifier with one"):
        check_classifier(str(model_dir("deepseek")), Path())
    with pytest.raises(ValueError, match="is not a directory"):
        check_classifier("./nowhere", tmp_path)


# -- one scale


def test_running_normalisation_by_hand():
    configs = [RewardConfig(path="m", weight=2.0, normalize="running"), RewardConfig(function="a:f")]
    normalize = RewardNormalizer(configs, {})
    first = normalize([scored(0, ["a", "b"], m=[1.0, 3.0], f=[0.5, 0.5])])
    np.testing.assert_allclose(first[0].scores.total, [1.0 + 0.5 + 2 * (-1.0 - 1.0), 3.0 + 0.5 + 2 * (1.0 - 3.0)])
    kept = json.loads(json.dumps(normalize.running))
    batch = [scored(0, ["a", "b"], m=[5.0, math.nan], f=[0.0, 0.0]), scored(1, ["a", "b"], m=[7.0, 4.0], f=[0.0, 0.0])]
    second = normalize(batch)
    seen = np.array([1.0, 3.0, 5.0, 7.0, 4.0])
    expected = 7.0 + 2 * ((7.0 - seen.mean()) / seen.std() - 7.0)
    assert second[1].scores.total[0] == pytest.approx(expected)
    assert np.isnan(second[0].scores.total[1]) and second[1].scores.parts["m"][0] == 7.0
    again = RewardNormalizer(configs, {})
    again.running = kept
    np.testing.assert_array_equal(again(batch)[1].scores.total, second[1].scores.total)


def test_fixed_normalisation_and_none():
    fixed = RewardNormalizer([RewardConfig(model="m", normalize="held_out")], {"m": (1.0, 4.0)})
    np.testing.assert_allclose(fixed([scored(0, ["a", "b"], m=[1.0, 3.0])])[0].scores.total, [0.0, 0.5])
    off = RewardNormalizer([RewardConfig(function="a:m")], {})
    np.testing.assert_allclose(off([scored(0, ["a", "b"], m=[1.0, 3.0])])[0].scores.total, [1.0, 3.0])


def test_correlations_of_rewards_and_length_are_metrics():
    texts = ["a", "bb", "ccc", "dddd"]
    groups = [scored(0, texts, helpful=[1.0, 2.0, 3.0, 4.0], rule=[1.0, 0.0, 1.0, math.nan])]
    metrics = rollout_metrics(groups)
    assert metrics["correlation/helpful,length"] == pytest.approx(1.0)
    assert metrics["correlation/helpful,rule"] == pytest.approx(0.0, abs=1e-12)
    assert metrics["correlation/rule,length"] == pytest.approx(0.0, abs=1e-12)
    constant = rollout_metrics([scored(0, ["a", "b"], f=[1.0, 1.0])])
    assert not any(name.startswith("correlation/") for name in constant)


# -- completions as data


def test_sampled_completions_become_rows_pairs_and_best(tmp_path: Path):
    groups = [
        scored(0, ["a", "b", "c"], f=[0.0, 1.0, 0.5]),
        scored(1, ["x", "y", "z"], f=[1.0, 1.0, 1.0]),
        scored(2, ["p", "q", "p"], f=[0.0, math.nan, 1.0]),
        group(3, ["hi", "ho"], Scores(np.array([2.0, 1.0]), {}, {}), text=[{"role": "user", "content": "?"}]),
    ]
    rows = sampled_rows(1, groups[:2]) + sampled_rows(2, groups[2:])
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_data(tmp_path / "rows.jsonl", tmp_path / "final") == {"rows": 10, "pairs": 2, "best": 4}
    pairs, best = (
        [json.loads(line) for line in (tmp_path / "final" / f"{name}.jsonl").read_text().splitlines()]
        for name in ("pairs", "best")
    )
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        ("b", "a"), ([{"role": "assistant", "content": "hi"}], [{"role": "assistant", "content": "ho"}]),
    ]  # fmt: skip
    assert [row["completion"] for row in best][:3] == ["b", "x", "p"]
