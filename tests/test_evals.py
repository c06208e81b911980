"""The lm-eval door, against a sampler whose probabilities stand in a table and sums worked out by hand."""

from __future__ import annotations

import json
import logging
import random
import socket
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from eval_fakes import BigramSampler, Characters
from lm_eval.api.instance import Instance

from alignment.config import EvalConfig, InitConfig
from alignment.eval_model import SamplerLM, generation
from alignment.evals import check_tasks, run_evals
from alignment.model import train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, argument, 0, ("task", index, 1)) for index, argument in enumerate(arguments)]


def model(sampler: BigramSampler, bos: str | None = None, seed: int = 0) -> SamplerLM:
    return SamplerLM(sampler, Characters(bos), seed)  # type: ignore[arg-type]


def write_task(folder: Path, name: str, docs: list[dict[str, Any]], **config: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    options = {"data_files": {"test": f"{name}.jsonl"}, "cache_dir": str(folder / "cache")}
    base = {"dataset_path": "json", "dataset_kwargs": options, "test_split": "test"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **base, **config}))
    return f"{name}.yaml"


GENERATE = {
    "output_type": "generate_until",
    "doc_to_text": "{{q}}=",
    "doc_to_target": "{{a}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "{{c}}",
    "doc_to_target": "{{t}}",
    "target_delimiter": "",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
LETTERS = [{"q": letter, "a": letter.upper()} for letter in "abcdef"]


def run(sampler: BigramSampler, folder: Path, *tasks: str, seed: int = 0, data_dir: Path | None = None, **config: Any):
    return run_evals(EvalConfig(tasks=tasks, **config), sampler, Characters(), folder, seed, data_dir)  # type: ignore[arg-type]


def test_loglikelihood_is_the_sum_over_the_continuation_alone():
    sampler = BigramSampler()
    answers = model(sampler).loglikelihood(ask("loglikelihood", ("a", "b"), ("xxa", "bac"), ("b", "a"), ("a", "ca")))
    expected = [log(0.5), log(0.5) + log(0.7) + log(0.25), log(0.7), log(0.25) + log(0.6)]
    assert [value for value, _ in answers] == pytest.approx(expected, abs=1e-6)
    assert [greedy for _, greedy in answers] == [True, False, True, False]
    assert len(sampler.scored) == 1, "all requests go in one batch"


def test_white_space_at_the_contexts_end_is_part_of_the_continuation():
    ((value, greedy),) = model(BigramSampler()).loglikelihood(ask("loglikelihood", ("= ", "b")))
    assert value == pytest.approx(log(0.5) + log(0.8), abs=1e-6)
    assert greedy


@pytest.mark.parametrize(("bos", "first"), [(None, 0.9), ("c", 0.3)])
def test_empty_context_is_the_bos_or_else_the_end_token(bos: str | None, first: float):
    ((value, _),) = model(BigramSampler(), bos).loglikelihood(ask("loglikelihood", ("", "ba")))
    assert value == pytest.approx(log(first) + log(0.7), abs=1e-6)


def test_bos_is_added_once():
    sampler = BigramSampler()
    model(sampler, bos="^").generate_until(ask("generate_until", ("abc", {}), ("^abc", {})))
    assert ["".join(map(chr, request.prompt)) for request in sampler.generated[0]] == ["^abc", "^abc"]


@pytest.mark.parametrize("max_length", [3, 4, 5, 6, 100])
def test_rolling_loglikelihood_counts_every_token_once(max_length: int):
    """A bigram needs one token of context, so that windows must not change the sum."""
    sampler = BigramSampler(max_length=max_length)
    answers = model(sampler).loglikelihood_rolling(ask("loglikelihood_rolling", ("abaca",), ("",), ("b",)))
    whole = log(0.05) + log(0.5) + log(0.7) + log(0.25) + log(0.6)
    assert answers == pytest.approx([whole, 0.0, log(0.9)], abs=1e-6)
    assert len(sampler.scored) == 1


def test_generation_is_one_batch_with_the_tasks_limits_and_comes_back_in_order():
    sampler = BigramSampler(lambda prompt, request: prompt.upper() + "\nmore")
    kwargs = {"until": ["\n", "", "Q:"], "max_gen_toks": 5, "do_sample": False, "temperature": 0.7}
    texts = model(sampler).generate_until(
        ask("generate_until", *((letter, kwargs) for letter in "abcd"), ("Q:", {"until": ":"}))
    )
    assert texts == ["A", "B", "C", "D", "Q"]
    (batch,) = sampler.generated
    assert [(request.stop, request.max_tokens, request.temperature) for request in batch] == [
        *4 * [(("\n", "Q:"), 5, 0.0)],
        ((":",), 256, 0.0),
    ]


def test_generation_limits_and_temperature_as_lm_eval_reads_them():
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    assert [generation({key: 7})["max_gen_toks"] for key in names] == 4 * [7]
    assert generation({"max_gen_toks": None, "temperature": None})["max_gen_toks"] == 256

    def temperature(**kwargs: Any) -> float:
        return generation(kwargs)["temperature"]

    assert temperature(temperature=0.6) == temperature(do_sample=True, temperature=0.6) == 0.6
    assert temperature(do_sample=False, temperature=0.6) == temperature(do_sample=True) == temperature() == 0


def seeds(seed: int, tmp_path: Path) -> list[int | None]:
    sampling = {"until": ["\n"], "do_sample": True, "temperature": 0.5}
    task = write_task(tmp_path, "sampled", LETTERS, **(GENERATE | {"generation_kwargs": sampling, "repeats": 2}))
    sampler = BigramSampler()
    run(sampler, tmp_path, task, seed=seed)
    return [request.seed for request in sampler.generated[0]]


def test_every_item_and_repetition_has_its_own_seed_the_same_each_time(tmp_path: Path):
    first = seeds(3, tmp_path)
    assert len(set(first)) == 12
    assert seeds(3, tmp_path) == first
    assert set(seeds(4, tmp_path)).isdisjoint(first)


def test_multiple_choice_is_scored_by_hand(tmp_path: Path):
    """After a: b 0.5 beats c 0.25. After b: c 0.2 beats bb, the right one. After c: b 0.3 beats aba 0.6 x 0.5 x 0.7."""
    docs = [
        {"q": "a", "c": ["c", "b"], "t": 1},
        {"q": "b", "c": ["c", "bb"], "t": 1},
        {"q": "c", "c": ["aba", "b"], "t": 1},
    ]
    (result,), samples = run(BigramSampler(), tmp_path, write_task(tmp_path, "choice", docs, **CHOICE))
    assert (result.task, result.metric, result.higher_is_better) == ("choice", "acc", True)
    assert result.values.tolist() == [1.0, 0.0, 1.0]
    assert [continuation for _, continuation in samples[2]["arguments"]] == ["aba", "b"]
    answers = [responses[0] for responses in samples[2]["resps"]]
    assert [value for value, _ in answers] == pytest.approx([log(0.6 * 0.5 * 0.7), log(0.3)], abs=1e-6)
    assert [greedy for _, greedy in answers] == [True, False]


def test_perplexity_per_item_is_in_bits_per_byte_and_lower_is_better(tmp_path: Path):
    metrics = [{"metric": name} for name in ("word_perplexity", "bits_per_byte")]
    rolling = {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{q}}",
        "metric_list": metrics,
    }
    task = write_task(tmp_path, "text", [{"q": "ba"}, {"q": "aba"}], **rolling)
    (result,), _ = run(BigramSampler(), tmp_path, task)
    assert (result.metric, result.higher_is_better) == ("bits_per_byte", False)
    expected = [-np.log2(0.9 * 0.7) / 2, -np.log2(0.05 * 0.5 * 0.7) / 3]
    assert result.values == pytest.approx(expected, abs=1e-6)


def test_every_sample_is_kept_under_an_id_that_depends_on_the_item(tmp_path: Path):
    task = write_task(tmp_path, "upper", LETTERS, **GENERATE)
    sampler = BigramSampler(lambda prompt, request: prompt[0].upper() if prompt[0] in "abc" else "?")
    (result,), samples = run(sampler, tmp_path, task)
    assert result.values.tolist() == [1, 1, 1, 0, 0, 0]
    assert [item.rsplit(":", 1)[0] for item in result.items] == [f"upper:{index}" for index in range(6)]
    assert {"task": "upper", "doc_id": 3, "target": "D", "resps": [["?"]], "exact_match": 0.0}.items() <= samples[
        3
    ].items()
    assert samples[3]["arguments"][0][0] == "d="
    json.dumps(samples, default=str)
    write_task(tmp_path, "upper", [*LETTERS[:2], {"q": "changed", "a": "C"}, *LETTERS[3:]], **GENERATE)
    (again,), _ = run(sampler, tmp_path, task)
    assert [a == b for a, b in zip(again.items, result.items, strict=True)] == [True, True, False, True, True, True]


def test_the_first_filter_is_the_benchmark_and_all_are_kept(tmp_path: Path):
    filters = [
        {"name": "strict", "filter": [{"function": "take_first"}]},
        {"name": "loose", "filter": [{"function": "regex", "regex_pattern": "([A-Z])"}, {"function": "take_first"}]},
    ]
    task = write_task(tmp_path, "upper", LETTERS, **GENERATE, filter_list=filters)
    (result,), samples = run(BigramSampler(lambda prompt, request: f"it is {prompt[0].upper()}"), tmp_path, task)
    assert result.metric == "exact_match,strict" and not result.values.any()
    first = [sample for sample in samples if sample["doc_id"] == 0]
    assert [(s["filter"], s["exact_match"], s["filtered_resps"]) for s in first] == [
        ("strict", 0.0, ["it is A"]),
        ("loose", 1.0, ["A"]),
    ]


def test_prompts_and_few_shot_examples_are_the_same_each_time_and_global_randomness_is_left_alone(tmp_path: Path):
    task = write_task(tmp_path, "shots", LETTERS, **GENERATE, num_fewshot=2, fewshot_split="test")
    sampler = BigramSampler()
    first, _ = run(sampler, tmp_path, task)
    random.seed(2)
    np.random.seed(2)
    states = random.getstate(), [*map(str, np.random.get_state())]
    second, _ = run(sampler, tmp_path, task)
    assert (random.getstate(), [*map(str, np.random.get_state())]) == states
    before, after = (["".join(map(chr, request.prompt)) for request in batch] for batch in sampler.generated)
    assert before == after
    assert first[0].items == second[0].items
    assert before[0].endswith("a=") and before[0].count("=") == 3
    other = BigramSampler()
    run(other, tmp_path, task, seed=1)
    assert before != ["".join(map(chr, request.prompt)) for request in other.generated[0]]


def test_limit_and_new_tokens_of_the_recipe_overrule_the_task(tmp_path: Path):
    task = write_task(tmp_path, "upper", LETTERS, **GENERATE)
    sampler = BigramSampler()
    (result,), _ = run(sampler, tmp_path, task, limit=2, max_new_tokens=3)
    assert len(result.items) == 2
    assert [request.max_tokens for request in sampler.generated[0]] == [3, 3]
    (info,) = check_tasks(EvalConfig(tasks=(task,), limit=2, max_new_tokens=3), tmp_path, 100, Characters())  # type: ignore[arg-type]
    assert (info.name, info.n, info.max_new_tokens, info.longest_prompt) == ("upper", 2, 3, 2)


def test_chat_template_wraps_the_item_and_opens_the_answer(tmp_path: Path):
    tokenizer = train_tokenizer(InitConfig(), ["abc = user assistant"])
    task = write_task(
        tmp_path, "upper", LETTERS[:1], **GENERATE, num_fewshot=1, fewshot_config={"samples": LETTERS[1:2]}
    )
    sampler = BigramSampler()
    config = EvalConfig(tasks=(task,), chat_template=True)
    _, (sample,) = run_evals(config, sampler, tokenizer, tmp_path, 0)
    turns = [("user", "b="), ("assistant", "B"), ("user", "a=")]
    messages = [{"role": role, "content": content} for role, content in turns]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert sampler.generated[0][0].prompt.tolist() == ids
    assert sample["arguments"][0][0] == tokenizer.decode(ids)
    with pytest.raises(ValueError, match="tokenizer has no chat template"):
        run(sampler, tmp_path, task, chat_template=True)


def test_nothing_but_warnings_is_printed(tmp_path: Path, capfd, caplog):
    caplog.set_level(logging.INFO)
    task = write_task(tmp_path, "upper", LETTERS, **GENERATE)
    check_tasks(EvalConfig(tasks=(task,)), tmp_path, 100, Characters())  # type: ignore[arg-type]
    run(BigramSampler(), tmp_path, task)
    run(BigramSampler(), RECIPES, "tasks/addition.yaml", limit=3)
    out = capfd.readouterr()
    assert (out.out, out.err) == ("", "")
    assert [record.message for record in caplog.records if record.name.startswith("lm_eval")] == []
    quiet = GENERATE | {"metric_list": [{"metric": "exact_match"}]}
    vague = write_task(tmp_path, "vague", LETTERS, **quiet)
    check_tasks(EvalConfig(tasks=(vague,)), tmp_path, 100, Characters())  # type: ignore[arg-type]
    assert any("aggregation is not" in record.message for record in caplog.records)


def test_data_files_come_from_the_data_folder_or_else_from_beside_the_yaml(tmp_path: Path):
    task = write_task(tmp_path / "recipe", "upper", LETTERS[:2], **GENERATE)
    write_task(tmp_path / "data", "upper", LETTERS[2:5], **GENERATE)
    for data_dir, expected in ((tmp_path / "data", "cde"), (None, "ab"), (tmp_path, "ab")):
        _, samples = run(BigramSampler(), tmp_path / "recipe", task, data_dir=data_dir)
        assert "".join(sample["arguments"][0][0][0] for sample in samples) == expected


def test_local_tasks_never_ask_the_network(tmp_path: Path, monkeypatch):
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    docs = [{"q": letter, "a": str(random.random())} for letter in "ab"]  # new data: nothing comes from a cache
    run(BigramSampler(), tmp_path, write_task(tmp_path, "upper", docs, **GENERATE))
    run(BigramSampler(), RECIPES, "tasks/addition.yaml", limit=3)
    assert asked == []
