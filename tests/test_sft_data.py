"""SFT rows: token for token what TRL's SFTTrainer makes of them."""

import copy
import time

import numpy as np
import pytest
from datasets import Dataset

from alignment.config import InitConfig, ModelConfig, SFTConfig
from alignment.model import build_model, model_config, train_tokenizer
from alignment.sft import make_sft_rows
from rollout.config import DataConfig

PLAIN = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


STRINGS = [
    {"prompt": "12+7=", "completion": "19"},
    {"prompt": "the sum of one and one ", "completion": " is two<|end|>"},  # ends already
    {"prompt": "", "completion": "two"},
    {"prompt": "what is the s", "completion": "um of one and one"},  # a token spans the boundary
    {"prompt": "a long one: " + "9" * 40, "completion": "9"},  # its completion is cut off
    {"prompt": "cut ", "completion": "9" * 60},
]
CHATS = [
    {"prompt": [user("what is 1+1?")], "completion": [assistant("the sum is two")]},
    {"prompt": [{"role": "system", "content": "be brief"}, user("1+1")], "completion": [assistant("2")]},
    {"prompt": [user("x")], "completion": [assistant("y"), user("z"), assistant("w" * 50)]},
]
MESSAGES = [
    {"messages": [user("what is 1+1?"), assistant("two"), user("and 2+2?"), assistant("four")]},
    {"messages": [{"role": "system", "content": "be brief"}, user("1+1"), assistant("2")]},
    {"messages": [user("9" * 60), assistant("cut off")]},
]
CONVERSATIONS = [{"conversations": [{"from": "user", "value": "1+1"}, {"from": "assistant", "value": "two"}]}]
MESSAGES_OF_CONVERSATIONS = [user("1+1"), assistant("two")]  # TRL refuses its assistant-only loss for `conversations`


@pytest.fixture(scope="module")
def tokenizer():
    texts = ["what is the sum of one and one", "the sum is two", "user assistant system"] * 3
    return train_tokenizer(InitConfig(vocab_size=320), texts)


def sft_config(**settings) -> SFTConfig:
    return SFTConfig(**{"data": DataConfig(path="rows.jsonl"), "steps": 1, "max_length": 40} | settings)


def trl_rows(rows, tokenizer, tmp_path, **settings):
    """Token ids and labels as TRL's trainer holds them."""
    import trl

    args = trl.SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_length=40, **settings)
    model = build_model(model_config(ModelConfig(init=InitConfig()), tokenizer, tmp_path))
    dataset = Dataset.from_list(copy.deepcopy(rows))
    trainer = trl.SFTTrainer(model, args=args, train_dataset=dataset, processing_class=tokenizer)
    return trainer.train_dataset["input_ids"], trainer.train_dataset["labels"]


@pytest.mark.parametrize("completion_only", [True, False])
@pytest.mark.parametrize("rows", [STRINGS, CHATS, MESSAGES, CONVERSATIONS], ids=["text", "chat", "messages", "from"])
def test_rows_equal_trls_token_for_token(rows, completion_only, tokenizer, tmp_path):
    before = copy.deepcopy(rows)
    trajectories, counts = make_sft_rows(rows, tokenizer, sft_config(completion_only=completion_only), "rows")
    assert rows == before
    whole_chat = "prompt" not in rows[0]
    settings = {"assistant_only_loss": True} if whole_chat and completion_only else {}
    settings |= {} if whole_chat else {"completion_only_loss": completion_only}
    theirs = [{"messages": MESSAGES_OF_CONVERSATIONS}] if rows is CONVERSATIONS else rows
    input_ids, labels = trl_rows(theirs, tokenizer, tmp_path, **settings)
    # TRL's loss shifts: the first token's label is never used.
    expected = [
        (ids, [False] + [label != -100 for label in row[1:]]) for ids, row in zip(input_ids, labels, strict=True)
    ]
    ours = [(row.token_ids.tolist(), row.loss_mask.tolist()) for row in trajectories]
    assert ours == [pair for pair in expected if any(pair[1])]
    assert counts["kept"] == len(ours) and counts["dropped"] == len(rows) - len(ours)
    assert counts["tokens"] == sum(len(ids) for ids, _ in ours)
    assert counts["loss_tokens"] == sum(sum(mask) for _, mask in ours)


def test_the_loss_is_on_the_completion_and_its_end_token(tokenizer):
    [row], counts = make_sft_rows([{"prompt": "1+1=", "completion": "2"}], tokenizer, sft_config(), "rows")
    assert tokenizer.convert_ids_to_tokens(row.token_ids) == ["1", "+", "1", "=", "2", "<|end|>"]
    assert row.loss_mask.tolist() == [False] * 4 + [True] * 2
    assert row.token_ids.dtype == np.int32 and row.logprobs.dtype == np.float32 and np.isnan(row.logprobs).all()
    assert row.finish_reason == "stop"
    assert counts == {"rows": 1, "kept": 1, "cut": 0, "dropped": 0, "tokens": 6, "loss_tokens": 2}


def test_what_is_cut_or_dropped_is_counted(tokenizer):
    _, counts = make_sft_rows(STRINGS, tokenizer, sft_config(), "rows")
    assert (counts["rows"], counts["kept"], counts["cut"], counts["dropped"]) == (6, 5, 2, 1)


def test_only_the_assistants_words_carry_loss_in_chats(tokenizer):
    [row], _ = make_sft_rows(MESSAGES[:1], tokenizer, sft_config(max_length=99), "rows")
    assert tokenizer.decode(row.token_ids[row.loss_mask]) == "two<|end|>four<|end|>"


def test_formats_can_be_mixed_and_keep_their_order(tokenizer):
    rows = [MESSAGES[0], STRINGS[0], CHATS[0], STRINGS[1], {**MESSAGES[1], "tools": "[]"}]
    mixed, _ = make_sft_rows(rows, tokenizer, sft_config(), "rows")
    for row, trajectory in zip(rows, mixed, strict=True):
        [alone], _ = make_sft_rows([row], tokenizer, sft_config(), "rows")
        assert trajectory.token_ids.tolist() == alone.token_ids.tolist()
        assert trajectory.loss_mask.tolist() == alone.loss_mask.tolist()


def test_a_template_without_marks_trains_on_whole_chats_only_when_asked():
    tokenizer = train_tokenizer(InitConfig(vocab_size=300), ["a"])
    tokenizer.chat_template = PLAIN
    with pytest.raises(ValueError, match=r"rows, row 0: .*\{% generation %\}.*completion_only: false"):
        make_sft_rows(MESSAGES, tokenizer, sft_config(), "rows")
    [row], _ = make_sft_rows(MESSAGES[:1], tokenizer, sft_config(completion_only=False, max_length=99), "rows")
    assert row.loss_mask.tolist() == [False] + [True] * (len(row.token_ids) - 1)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"prompt": "x", "completion": 3}, "column `completion`: expected a string or a list of chat messages"),
        ({"prompt": "x", "completion": [assistant("y")]}, "must both be strings or both be chat messages"),
        ({"prompt": None, "completion": None}, "column `prompt`: expected a string or a list of chat messages"),
        ({"messages": []}, "column `messages`: expected a string or a list of chat messages"),
        ({"messages": "hello"}, "`messages` must be a list of chat messages"),
    ],
)
def test_bad_rows_are_named(row, part, tokenizer):
    with pytest.raises(ValueError, match="rows, row 1") as error:
        make_sft_rows([STRINGS[0], row], tokenizer, sft_config(), "rows")
    assert part in str(error.value)


def test_data_without_a_token_to_train_on_is_refused(tokenizer):
    with pytest.raises(ValueError, match="none of its 1 rows has a token to train on within max_length=40"):
        make_sft_rows([{"prompt": "9" * 60, "completion": "9"}], tokenizer, sft_config(), "rows")


def test_ten_thousand_rows_in_two_seconds(tokenizer):
    rows = [{"prompt": f"what is {i}+{i}=", "completion": str(2 * i)} for i in range(10_000)]
    make_sft_rows(rows[:1], tokenizer, sft_config(), "rows")  # TRL's import is not what is measured
    seconds = []
    for _ in range(3):  # the best of them: the first also pays for fresh memory
        start = time.process_time()
        trajectories, _ = make_sft_rows(rows, tokenizer, sft_config(), "rows")
        seconds.append(time.process_time() - start)
    assert min(seconds) < 2
    assert len(trajectories) == 10_000
