"""Rows from files, hub and functions; prompts; the resumable stream."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from alignment.config import InitConfig
from alignment.model import train_tokenizer
from rollout.config import DataConfig
from rollout.data import load_rows, row_texts
from rollout.prompts import Stream, check_lengths, make_prompts
from rollout.types import Prompt

SHARED = Path(__file__).parents[2] / "shared" / "data"
ROWS = [{"question": "1+1=", "answer": "2"}, {"question": "2+3=", "answer": "5"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(InitConfig(vocab_size=300), ["user assistant what is 1+1", "the sum is two"])


def write(path: Path, rows) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path.name


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.parquet"])
def test_every_file_format_gives_the_same_rows(tmp_path, name):
    assert load_rows(DataConfig(path=write(tmp_path / name, ROWS)), tmp_path) == ROWS


def test_json_object_with_examples_and_odd_characters(tmp_path):
    rows = [{"input": "line\u2028separator, caf\u00e9 \U0001f600"}]
    (tmp_path / "a.json").write_text(json.dumps({"canary": "x", "examples": rows}, ensure_ascii=False))
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False) + "\n\n")
    assert load_rows(DataConfig(path="a.json"), tmp_path) == rows
    assert load_rows(DataConfig(path="a.jsonl"), tmp_path) == rows  # U+2028 ends no line, a blank line is no row


def test_data_dir_comes_before_the_recipes_folder(tmp_path):
    for folder, answer in (("recipe", "2"), ("data", "two")):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "rows.jsonl", [{"answer": answer}])
    config = DataConfig(path="rows.jsonl")
    assert load_rows(config, tmp_path / "recipe")[0]["answer"] == "2"
    assert load_rows(config, tmp_path / "recipe", tmp_path / "data")[0]["answer"] == "two"


def test_columns_are_renamed_and_old_ones_stay_unless_overwritten(tmp_path):
    path = write(tmp_path / "rows.jsonl", [{"a": 1, "b": 2}, {"a": 3, "b": 4}])
    rows = load_rows(DataConfig(path=path, columns={"prompt": "a", "a": "b", "b": "a"}, limit=1), tmp_path)
    assert rows == [{"a": 2, "b": 1, "prompt": 1}]


@pytest.mark.parametrize(
    ("name", "content", "settings", "parts"),
    [
        ("x.jsonl", '{"a": 1}\n{"a": \n', {}, ["x.jsonl, line 2", "not valid JSON"]),
        ("x.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', {}, ["x.jsonl, line 3", "not valid JSON"]),
        ("x.jsonl", '{"a": 1}\n[1]\n', {}, ["x.jsonl, row 1", "list"]),
        ("x.jsonl", "", {}, ["x.jsonl", "empty"]),
        ("x.json", '{"rows": []}', {}, ["x.json", "examples"]),
        ("x.json", "[]", {}, ["x.json", "empty"]),
        ("x.parquet", "no", {}, ["x.parquet", "not a readable Parquet file"]),
        ("x.csv", "a,b", {}, ["x.csv", ".jsonl"]),
        ("x.jsonl", '{"a": 1}', {"columns": {"prompt": "q"}}, ["x.jsonl, row 0", "`q`", "there are: a"]),
        ("x.jsonl", '{"a": 1}\n{"b": 1}', {"columns": {"prompt": "a"}}, ["x.jsonl, row 1", "`a`", "there are: b"]),
        ("x.jsonl", '{"a": 1}', {"args": {"k": 1}}, ["x.jsonl", "`args`"]),
        ("y.jsonl", "", {"path": "x.jsonl"}, ["x.jsonl: no such file"]),
        ("y.jsonl", "", {"path": "./x"}, ["x: no such file"]),
        ("y.jsonl", "", {"function": "a:b"}, ["exactly one of `path`, `function` and `from`"]),
    ],
)
def test_bad_data_is_an_error_that_says_where(tmp_path, name, content, settings, parts):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        load_rows(DataConfig(**{"path": name} | settings), tmp_path)
    for part in parts:
        assert part in str(error.value)


def test_rows_from_a_function_beside_the_recipe(tmp_path):
    (tmp_path / "my_rows.py").write_text(
        "def rows(count): return ({'prompt': str(i)} for i in range(count))\n"
        "def broken(): return 1 / 0\n"
        "def number(): return 3\n"
    )
    config = DataConfig(function="my_rows.py:rows", args={"count": 3}, limit=2)
    assert load_rows(config, tmp_path) == [{"prompt": "0"}, {"prompt": "1"}]
    for function, args, part in [
        ("rows", {}, "missing a required argument: 'count'"),
        ("broken", {}, "ZeroDivisionError"),
        ("number", {}, "must return a list"),
    ]:
        with pytest.raises(ValueError, match=part) as error:
            load_rows(DataConfig(function=f"my_rows.py:{function}", args=args), tmp_path)
        assert f"my_rows.py:{function}" in str(error.value)


def test_hub_name_that_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"nobody/nothing: neither a file here nor .*\{'split': 'train'\}"):
        load_rows(DataConfig(path="nobody/nothing"), tmp_path)


def test_hub_datasets_are_loaded_through_datasets(tmp_path):
    # `datasets` loads a directory of files as it loads a hub name.
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "test.jsonl", ROWS)
    assert load_rows(DataConfig(path="folder", args={"split": "test"}, limit=1), tmp_path) == ROWS[:1]
    with pytest.raises(ValueError, match=r"folder: .*\{'split': 'train'\}"):
        load_rows(DataConfig(path="folder"), tmp_path)


def test_texts_for_the_tokenizer_are_what_the_policy_reads_and_writes():
    rows = [
        {"prompt": "a", "completion": "b", "answer": "c"},
        {"messages": [{"role": "user", "content": "d"}, {"role": "assistant", "content": None}]},
    ]
    assert list(row_texts(rows)) == ["a", "b", "user", "d", "assistant"]


def test_reading_data_imports_no_torch():
    code = "import sys, rollout.data, rollout.prompts; assert not {'torch', 'ray', 'vllm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_prompts_equal_trls_grpo_tokenisation(tokenizer):
    chat = [{"role": "user", "content": "what is 1+1"}]
    prompts = make_prompts([{"prompt": "1+1=", "answer": 2}, {"prompt": chat}], tokenizer, "rows")
    # What trl.GRPOTrainer._tokenize_prompts calls.
    assert prompts[0].token_ids.tolist() == tokenizer(text=["1+1="])["input_ids"][0]
    expected = tokenizer.apply_chat_template(
        conversation=[chat], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert prompts[1].token_ids.tolist() == expected["input_ids"][0]
    assert tokenizer.decode(prompts[1].token_ids).endswith("<|start|>assistant\n")
    assert (prompts[0].index, prompts[0].text, dict(prompts[0].columns)) == (0, "1+1=", {"answer": 2})
    assert (prompts[1].index, prompts[1].text, dict(prompts[1].columns)) == (1, chat, {})
    assert prompts[0].token_ids.dtype == np.int32


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": 3}, "expected a string or a list of chat messages"),
        ({"prompt": []}, "expected a string or a list of chat messages"),
        ({"prompt": [{"role": "nobody", "content": "x"}]}, "the chat template refuses the messages: unknown role"),
    ],
)
def test_bad_prompts_name_their_row(row, part):
    tokenizer = train_tokenizer(InitConfig(vocab_size=300), ["a"])
    refusal = "{% if m.role == 'nobody' %}{{ raise_exception('unknown role') }}{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}" + refusal + "x{% endfor %}"
    good = {"prompt": [{"role": "user", "content": "x"}]}
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2") as error:
        make_prompts([{"prompt": "a"}, good, row], tokenizer, "rows.jsonl")
    assert part in str(error.value)


def test_chat_without_a_template_is_refused():
    tokenizer = train_tokenizer(InitConfig(vocab_size=300), ["a"])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"row 0.*no chat template"):
        make_prompts([{"prompt": [{"role": "user", "content": "x"}]}], tokenizer, "rows")


def prompts_of(lengths) -> list[Prompt]:
    return [Prompt(i, str(i), np.full(length, i, np.int32), {}) for i, length in enumerate(lengths)]


def test_a_prompt_that_does_not_fit_is_named():
    prompts = prompts_of([3, 9, 8])
    check_lengths(prompts, max_length=13, max_new_tokens=4)
    with pytest.raises(ValueError, match=r"rows, row 1: a prompt of 9 tokens and 5 new ones .* 13 \(1 of 3"):
        check_lengths(prompts, max_length=13, max_new_tokens=5, source="rows")


def indices(batch) -> list[int]:
    return [prompt.index for prompt in batch]


def test_stream_gives_every_item_once_an_epoch_and_batches_cross_epochs():
    stream = Stream(prompts_of([1] * 10), batch_size=4, seed=5)
    batches = [indices(next(stream)) for _ in range(10)]
    assert all(len(batch) == 4 for batch in batches)
    flat = [index for batch in batches for index in batch]
    epochs = [flat[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4  # shuffled anew
    again = Stream(prompts_of([1] * 10), batch_size=4, seed=5)
    assert [indices(next(again)) for _ in range(10)] == batches
    assert indices(next(Stream(prompts_of([1] * 10), 4, seed=6))) != batches[0]


def test_stream_serves_batches_larger_than_the_dataset():
    assert sorted(indices(next(Stream(prompts_of([1, 1, 1]), 9, seed=0)))) == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("taken", range(8))
def test_stream_continues_where_it_was_saved(taken):
    stream = Stream(prompts_of([2] * 7), batch_size=3, seed=1)
    for _ in range(taken):
        next(stream)
    state = json.loads(json.dumps(stream.state()))
    other = Stream(prompts_of([2] * 7), batch_size=3, seed=1)
    next(other)
    other.restore(state)
    assert [indices(next(other)) for _ in range(6)] == [indices(next(stream)) for _ in range(6)]


def test_stream_refuses_changed_data():
    items = prompts_of([2, 1])
    state = Stream(items, 1, seed=1).state()
    changed = [Prompt(0, "0", np.array([0, 1], np.int32), {}), items[1]]
    moved = [Prompt(0, "0", np.array([0], np.int32), {}), Prompt(1, "1", np.array([0, 1], np.int32), {})]
    for other in (changed, moved, items[::-1], items[:1], items + items[:1]):
        with pytest.raises(ValueError, match="the dataset or the seed has changed since the checkpoint"):
            Stream(other, 1, seed=1).restore(state)
    with pytest.raises(ValueError, match="the seed has changed"):
        Stream(items, 1, seed=2).restore(state)


def test_ten_thousand_prompts_in_two_seconds(tokenizer):
    rows = [{"prompt": f"what is {i}+{i}", "answer": 2 * i} for i in range(10_000)]
    start = time.process_time()
    stream = Stream(make_prompts(rows, tokenizer, "rows"), 64, seed=0)
    next(stream)
    assert time.process_time() - start < 2


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside the project")
@pytest.mark.parametrize(
    ("path", "columns", "count"),
    [
        ("gsm8k/test.jsonl", {"prompt": "question", "completion": "answer"}, 1319),
        ("bbh/navigate.json", {"prompt": "input", "completion": "target"}, 250),
        ("humaneval/test.jsonl", {"completion": "canonical_solution"}, 164),
    ],
)
def test_real_files_become_prompts(tokenizer, path, columns, count):
    rows = load_rows(DataConfig(path=path, columns=columns), Path("/nowhere"), SHARED)
    prompts = make_prompts(rows, tokenizer, path)
    assert len(prompts) == count
    assert all(tokenizer.decode(prompt.token_ids) == prompt.text for prompt in prompts)
