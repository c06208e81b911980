"""Tasks that cannot be asked are refused before a model loads; the recipes' own tasks are asked and marked rightly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from eval_fakes import BigramSampler, Characters
from test_evals import CHOICE, GENERATE, LETTERS, RECIPES, run, write_task
from test_skills import right_answer

from alignment.config import EvalConfig
from alignment.evals import check_tasks


def refused(folder: Path, task: str, max_length: int = 100, **options: Any) -> str:
    with pytest.raises(ValueError) as caught:
        check_tasks(EvalConfig(tasks=(task,), **options), folder, max_length, Characters())  # type: ignore[arg-type]
    return str(caught.value)


def test_a_missing_file_is_named_with_the_nearest(tmp_path: Path):
    write_task(tmp_path, "addition", LETTERS, **GENERATE)
    message = refused(tmp_path, "additon.yaml")
    assert str(tmp_path / "additon.yaml") in message and message.endswith("did you mean 'addition.yaml'?")


def test_a_name_that_lm_eval_does_not_have_is_refused_with_the_nearest():
    assert refused(RECIPES, "gsm8kk") == "evals.tasks: lm-eval has no task `gsm8kk`; did you mean 'gsm8k'?"


def test_missing_data_is_named(tmp_path: Path):
    task = write_task(tmp_path, "upper", LETTERS, **GENERATE)
    (tmp_path / "upper.jsonl").unlink()
    message = refused(tmp_path, task)
    assert (
        str(tmp_path / "upper.yaml") in message and str(tmp_path / "upper.jsonl") in message and "data_dir" in message
    )


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"task": ["a", "b"], "group": "g"}, "needs `task: NAME`"),
        ({"dataset_kwargs": {}}, "needs dataset_kwargs.data_files"),
        ({"metric_list": [{}]}, "lm-eval cannot load it: ValueError: 'metric' key"),
        ({"unsafe_code": True}, "runs code that the model writes"),
        ({"generation_kwargs": {"do_sample": True, "temperature": 1, "top_p": 0.9}}, "asks for top_p=0.9"),
        ({"generation_kwargs": {"num_beams": 4}}, "asks for num_beams=4"),
    ],
)
def test_a_task_that_cannot_be_asked_is_refused(tmp_path: Path, change: dict[str, Any], expected: str):
    write_task(tmp_path, "bad", LETTERS, **(GENERATE | change))
    assert expected in refused(tmp_path, "bad.yaml")


def test_settings_without_effect_are_accepted(tmp_path: Path):
    kwargs = {"until": ["x"], "do_sample": False, "top_p": 0.9, "num_beams": 1, "max_gen_toks": 4}
    task = write_task(tmp_path, "greedy", LETTERS, **(GENERATE | {"generation_kwargs": kwargs}))
    assert [info.n for info in check_tasks(EvalConfig(tasks=(task,)), tmp_path, 100, Characters())] == [6]


def test_yaml_that_cannot_be_read_is_refused_with_the_cause(tmp_path: Path):
    (tmp_path / "broken.yaml").write_text("task: [")
    assert "cannot be read as an lm-eval task: ParserError" in refused(tmp_path, "broken.yaml")
    (tmp_path / "lost.yaml").write_text("task: lost\ncustom_dataset: !function nowhere.at_all")
    assert "Cannot import module 'nowhere'" in refused(tmp_path, "lost.yaml")


def test_the_same_task_twice_is_refused(tmp_path: Path):
    task = write_task(tmp_path, "upper", LETTERS, **GENERATE)
    with pytest.raises(ValueError, match=r"`upper.yaml` brings the task `upper` a second time"):
        check_tasks(EvalConfig(tasks=(task, task)), tmp_path, 100, Characters())


def test_a_context_that_is_too_short_is_refused_with_the_numbers(tmp_path: Path):
    docs = [{"q": "abc" * n, "a": "x"} for n in (1, 5, 4)]
    task = write_task(tmp_path, "long", docs, **GENERATE)
    (info,) = check_tasks(EvalConfig(tasks=(task,)), tmp_path, 24, Characters())  # type: ignore[arg-type]
    assert (info.longest_prompt, info.max_new_tokens) == (16, 8), "16 + 8 = 24 just fits"
    message = refused(tmp_path, task, 23)
    assert "`long`, item 1, needs 16 tokens for the prompt and 8 for the answer; the context holds 23:" in message
    sampler = BigramSampler(max_length=23)
    with pytest.raises(ValueError, match="item 1, needs 16 tokens"):
        run(sampler, tmp_path, task)
    assert sampler.generated == [], "refused before anything was sampled"


def test_a_choice_that_does_not_fit_is_refused(tmp_path: Path):
    task = write_task(tmp_path, "choice", [{"q": "abc", "c": ["x", "yyyy"], "t": 0}], **CHOICE)
    (info,) = check_tasks(EvalConfig(tasks=(task,)), tmp_path, 7, Characters())  # type: ignore[arg-type]
    assert (info.longest_prompt, info.max_new_tokens) == (7, 0)
    assert "needs 7 tokens for the prompt and 0" in refused(tmp_path, task, 6)
    sampler = BigramSampler(max_length=6)
    with pytest.raises(ValueError, match="needs 7 tokens"):
        run(sampler, tmp_path, task)
    assert sampler.scored == []


def test_questions_and_reference_answers_are_known_before_a_model_is_loaded(tmp_path: Path):
    tasks = (
        write_task(tmp_path, "upper", LETTERS, **GENERATE | {"description": "Answer:", "num_fewshot": 2}),
        write_task(tmp_path, "choice", [{"q": "abc", "c": ["x", "yyyy"], "t": 1}], **CHOICE),
        write_task(tmp_path, "gap", [{"c": ["a is", "b is"], "t": "red"}], **CHOICE | {"doc_to_text": 0}),
        write_task(tmp_path, "several", [{"q": "abc", "a": ["one", "two"]}], **GENERATE | {"doc_to_target": "a"}),
    )
    infos = check_tasks(EvalConfig(tasks=tasks, limit=2), tmp_path, 100, Characters())  # type: ignore[arg-type]
    assert [info.texts for info in infos] == [
        (("a=", "A"), ("b=", "B")),
        (("abc", "yyyy"),),
        (("a is b is", "red"),),
        (("abc=", "one two"),),
    ]


def test_a_log_likelihood_is_not_taken_for_a_perplexity(tmp_path: Path):
    metrics = [{"metric": "perplexity"}, {"metric": "acc"}]
    config = {"output_type": "loglikelihood", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}", "metric_list": metrics}
    task = write_task(tmp_path, "last_word", [{"q": "a", "a": "b"}, {"q": "a", "a": "c"}], **config)
    (result,), samples = run(BigramSampler(), tmp_path, task)
    assert (result.metric, result.values.tolist()) == ("acc", [1.0, 0.0])
    assert [sample["acc"] for sample in samples] == [1.0, 0.0]


def test_a_task_without_a_number_per_item_is_refused(tmp_path: Path):
    corpus = CHOICE | {"metric_list": [{"metric": "mcc", "aggregation": "matthews_corrcoef", "higher_is_better": True}]}
    docs = [{"q": "a", "c": ["c", "b"], "t": 1}, {"q": "a", "c": ["b", "c"], "t": 1}]
    task = write_task(tmp_path, "corpus", docs, **corpus)
    with pytest.raises(ValueError, match="`corpus` has no metric that is a number per item"):
        run(BigramSampler(), tmp_path, task)


def test_the_demos_skills_are_marked_rightly():
    """Everything right but what begins with a 1: the white space around an answer is forgiven, nothing else is."""
    sampler = BigramSampler(lambda prompt, request: f"  {right_answer(prompt)} \nadd")
    tasks = tuple(f"tasks/{skill}.yaml" for skill in ("addition", "sorting", "reversing"))
    results, _ = run(sampler, RECIPES, *tasks, max_new_tokens=20)
    assert [(result.task, result.metric, len(result.items)) for result in results] == [
        (skill, "exact_match", 500) for skill in ("addition", "sorting", "reversing")
    ]
    assert all(result.values.all() for result in results)
    wrong = BigramSampler(lambda prompt, request: f" {right_answer(prompt)}0")
    assert not any(result.values.any() for result in run(wrong, RECIPES, *tasks)[0])


def test_bbh_is_asked_and_marked_on_the_real_files(shared_data: Path):
    """The recipe's own tasks; a model that says the same of every item scores that answer's share of the targets."""
    recipe = yaml.safe_load((RECIPES / "gsm8k_bbh.yaml").read_text())
    tasks = tuple(task for task in recipe["evals"]["tasks"] if "bbh_" in task)
    infos = check_tasks(EvalConfig(tasks=tasks), RECIPES, 1024, Characters(), data_dir=shared_data)  # type: ignore[arg-type]
    said = {
        "bbh_boolean_expressions": "False",
        "bbh_multistep_arithmetic_two": "24",
        "bbh_object_counting": "8",
        "bbh_navigate": "No",
    }
    assert [info.name for info in infos] == list(said)
    for info, answer, task in zip(infos, said.values(), tasks, strict=True):
        text = (shared_data / "bbh" / f"{info.name.removeprefix('bbh_')}.json").read_text(encoding="utf-8")
        examples = json.loads(text)["examples"]
        sampler = BigramSampler(lambda prompt, request, answer=answer: f" {answer}.\nQ:")
        (result,), samples = run(sampler, RECIPES, task, data_dir=shared_data)
        assert result.values.tolist() == [float(example["target"] == answer) for example in examples]
        assert 0 < result.values.mean() < 1
        assert all(
            f"Q: {example['input']}\nA:" in row["arguments"][0][0]
            for example, row in zip(examples, samples, strict=True)
        )
        assert info.longest_prompt == max(len(sample["arguments"][0][0]) for sample in samples)
