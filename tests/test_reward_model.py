"""Reward models: data, losses against TRL's, training over ranks, and the classifier that Transformers loads."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from ranks import run_ranks
from tiny import model_dir, tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig as TRLRewardConfig
from trl import RewardTrainer

from alignment import reward_model
from alignment.config import RewardModelConfig, TrainConfig
from alignment.logprobs import token_scores
from alignment.losses import pairwise_loss, pointwise_loss
from alignment.policy import RankPolicy
from alignment.protocols import LossInputs, TrainRow
from alignment.reward_model import Judged, judged_text, length_warning, make_judged_rows
from alignment.routing import Routing
from hybrid_engine.checkpoint import save_final
from hybrid_engine.loading import load_model
from hybrid_engine.sharding import Meshes, clip_grad_norm, last_micro_batch, make_meshes, reshard
from rollout.config import DataConfig

CHAT = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
PAIRS = [
    {"prompt": f"What is {a} plus {b}? ", "chosen": f"The answer is {a + b}.", "rejected": f"It is {a}. " * (b % 3)}
    for a in range(4) for b in range(1, 9) if b % 3
]  # fmt: skip


def config(**settings) -> RewardModelConfig:
    return RewardModelConfig(**{"data": DataConfig(path="rows.jsonl"), "steps": 1, "max_length": 64} | settings)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# -- data


def read_ids(rows: list[dict], made: list[Judged], tok) -> list[list[list[int]]]:
    return [[side.token_ids[:-1].tolist() for side in row.trajectories] for row in made]


def test_sides_are_tokenised_as_trl_does(tmp_path: Path):
    tok = tokenizer()
    tok.chat_template = CHAT
    explicit_chat = [{"prompt": [user("1+1?")], "chosen": [assistant("2")], "rejected": [assistant("three")]}]
    implicit_chat = [{"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c d")]}]
    implicit = [{"chosen": "What is 2 plus 2? 4", "rejected": "What is 2 plus 2? 5"}]
    for rows in (PAIRS, implicit, explicit_chat, implicit_chat):
        rows = rows * 12
        kept, held, counts = make_judged_rows([*rows, *PAIRS], tok, config(), "rows")
        made = read_ids(rows, [*kept, *held], tok)
        args = TRLRewardConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=64)
        model = AutoModelForSequenceClassification.from_pretrained(model_dir("qwen3_moe"), num_labels=1)
        trainer = RewardTrainer(model, args, train_dataset=Dataset.from_list(rows), processing_class=tok)
        theirs = [[row["chosen_ids"], row["rejected_ids"]] for row in trainer.train_dataset]
        assert all(pair in made for pair in theirs)
        assert counts == {"rows": len(rows) + len(PAIRS), "kept": len(kept), "held out": len(held), "too long": 0,
                          "unfit": 0}  # fmt: skip


def test_transcripts_are_read_as_chats_where_there_is_a_template():
    tok = tokenizer()
    row = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nHuman: you?\n\nAssistant: go"}
    kept, held, _ = make_judged_rows([row, *PAIRS], tok, config(), "rows")
    as_string = tok(row["chosen"] + "<eos>")["input_ids"]
    assert as_string in [ids[0] for ids in read_ids([], kept + held, tok)]
    tok.chat_template = CHAT
    kept, held, _ = make_judged_rows([row, *PAIRS], tok, config(), "rows")
    odd = tok("user: hi\nuser: you?\nassistant: go\n")["input_ids"]
    assert odd in [ids[-1] for ids in read_ids([], kept + held, tok)]


def test_prompt_and_sides_of_a_transcript_are_joined_before_it_is_read():
    """As a `sample` stage writes them; the reward worker reads the same text."""
    tok = tokenizer()
    tok.chat_template = CHAT
    row = {"prompt": "\n\nHuman: hi\n\nAssistant:", "chosen": " you too", "rejected": " no"}
    kept, held, _ = make_judged_rows([row, *PAIRS], tok, config(), "rows")
    assert tok("user: hi\nassistant: you too\n")["input_ids"] in [ids[0] for ids in read_ids([], kept + held, tok)]
    assert judged_text(row["prompt"], row["chosen"], tok) == [user("hi"), assistant("you too")]


BAD = {
    "equal sides": ({"prompt": "a", "chosen": "b", "rejected": "b"}, "`chosen` and `rejected` are equal"),
    "equal tokens": ({"prompt": "a", "chosen": "b", "rejected": "b<eos>"}, "`chosen` and `rejected` are equal"),
    "empty side": ({"prompt": "a", "chosen": "b", "rejected": " "}, "`rejected` is empty"),
    "empty chat": ({"prompt": "a", "chosen": [], "rejected": [assistant("x")]}, "`chosen` is empty"),
    "empty turn": ({"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant:"}, "empty"),
    "mixed": ({"chosen": "b", "rejected": [assistant("x")]}, "must both be"),
    "chat and strings": ({"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}, "is a chat"),
    "no prompt": ({"prompt": "a", "chosen": [assistant("b")], "rejected": [assistant("c")]}, "share no message"),
    "margin": ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": math.inf}, "finite number"),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_unfit_row_is_named_or_dropped_and_counted(bad: str):
    row, words = BAD[bad]
    rows = [*PAIRS, row, {"prompt": "a", "chosen": "b " * 10_000, "rejected": "c"}]
    with pytest.raises(ValueError, match=f"^rows, row {len(PAIRS)}: .*{words}.*on_error: drop"):
        make_judged_rows(rows, tokenizer(), config(), "rows")
    kept, held, counts = make_judged_rows(rows, tokenizer(), config(on_error="drop"), "rows")
    assert counts["unfit"] == counts["too long"] == 1 and len(kept) + len(held) == len(PAIRS)


@pytest.mark.parametrize("value, words", [(2, "must be 0 or 1"), ("good", "must be 0 or 1"), (None, "must be 0 or 1")])
def test_label_out_of_range_is_named(value, words: str):
    rows = [{"prompt": f"p{i}", "completion": "c", "label": i % 2} for i in range(40)]
    make_judged_rows(rows, tokenizer(), config(loss="pointwise"), "rows")
    with pytest.raises(ValueError, match=f"row 40: `label` {words}"):
        make_judged_rows([*rows, rows[0] | {"label": value}], tokenizer(), config(loss="pointwise"), "rows")


def test_rows_of_one_prompt_are_held_out_together():
    rows = [PAIRS[i % 16] | {"rejected": f"wrong {i}"} for i in range(160)]
    kept, held, counts = make_judged_rows(rows, tokenizer(), config(held_out=0.3), "rows")
    prompts = [{tuple(row.trajectories[0].token_ids) for row in side} for side in (kept, held)]
    assert not prompts[0] & prompts[1] and counts["held out"] % 10 == 0 < counts["held out"]


def test_score_is_read_where_transformers_reads_it_when_the_end_token_pads():
    tok = tokenizer()
    tok.pad_token = tok.eos_token
    kept, _, _ = make_judged_rows(PAIRS, tok, config(), "rows")
    assert all(side.token_ids[-2] != tok.eos_token_id for row in kept for side in row.trajectories)


# -- losses


def inputs(scores: list[float], targets: list[float], weight: float) -> LossInputs:
    tensor = torch.tensor(scores, dtype=torch.float64, requires_grad=True)
    n = len(scores)
    return LossInputs(tensor, tensor.detach(), None, torch.tensor(targets, dtype=torch.float64),
                      torch.full((n,), weight, dtype=torch.float64), None, torch.arange(n))  # fmt: skip


def test_pairwise_loss_by_hand():
    given = inputs([2.0, 0.5, -1.0, 1.0], [0.5, 0.0, 0.0, 0.0], 0.5)
    out = pairwise_loss(given, centering=0.1)
    first = math.log(1 + math.exp(-(2.0 - 0.5 - 0.5))) + 0.1 * 2.5**2
    second = math.log(1 + math.exp(2.0)) + 0.1 * 0.0
    assert out.loss.item() == pytest.approx((first + second) / 2, rel=1e-12)
    out.loss.backward()
    slope = -1 / (1 + math.exp(1.0)) / 2  # d/ds_chosen of -log sigmoid(1.0), halved
    assert given.logprobs.grad[0].item() == pytest.approx(slope + 0.1 * 2.5, rel=1e-12)
    assert given.logprobs.grad[1].item() == pytest.approx(-slope + 0.1 * 2.5, rel=1e-12)
    assert {key: float(value) for key, value in out.sums.items()} == pytest.approx(
        {"accuracy": 0.5, "margin": (1.5 - 2.0) / 2, "score": (1.25 + 0.0) / 2}
    )


def test_pairs_are_found_in_any_order_of_tokens():
    given = inputs([2.0, 0.5, -1.0, 1.0], [0.5, 0.0, 0.0, 0.0], 0.5)
    order = torch.tensor([3, 0, 2, 1])
    mixed = LossInputs(given.logprobs[order], given.old_logprobs[order], None, given.advantages[order],
                       given.weights[order], None, order)  # fmt: skip
    assert pairwise_loss(mixed, 0.1).loss.item() == pytest.approx(pairwise_loss(given, 0.1).loss.item(), rel=1e-12)


def test_pointwise_losses_by_hand():
    given = inputs([2.0, -1.0], [1.0, 0.0], 0.5)
    binary = (math.log(1 + math.exp(-2.0)) + math.log(1 + math.exp(-1.0))) / 2
    assert pointwise_loss(given, binary=True).loss.item() == pytest.approx(binary, rel=1e-12)
    assert pointwise_loss(given, binary=False).loss.item() == pytest.approx((1.0 + 1.0) / 2, rel=1e-12)


# -- the model over ranks, against Transformers and TRL


def rank_policy(folder: Path, layout: TrainConfig, meshes: Meshes) -> RankPolicy:
    model = load_model(folder, layout, meshes, torch.device("cpu"), score_seed=3)
    return RankPolicy(
        model, torch.optim.SGD(model.parameters(), lr=0.1), 2048, lambda norm: clip_grad_norm(model.parameters(), norm),
        partial(last_micro_batch, model), partial(reshard, model), Routing(model, layout), token_scores,
    )  # fmt: skip


def rank_rows(judged: list[Judged]) -> list[TrainRow]:
    return [
        TrainRow(side, group, len(side.token_ids), target, 1 / len(judged))
        for group, row in enumerate(judged)
        for side, target in zip(row.trajectories, row.targets, strict=True)
    ]


def train_and_save(folder: Path, start: Path, layout: TrainConfig) -> None:
    rank, meshes = dist.get_rank(), make_meshes(layout, "cpu")
    policy = rank_policy(start, layout, meshes)
    tok = AutoTokenizer.from_pretrained(folder)
    rows = [row | {"margin": 0.25 * (i % 3)} for i, row in enumerate(PAIRS)]
    kept, held, _ = make_judged_rows(rows, tok, config(), "rows")
    mine = kept[:8][rank :: layout.world]
    scaled = [dataclasses.replace(row, weight=1 / 8) for row in rank_rows(mine)]
    save_final(folder / "before", policy.model, tok)
    how = {"learning_rate": 0.1, "temperature": 1.0, "max_grad_norm": 1e9}
    stats = policy.update(scaled, pairwise_loss, **how)
    save_final(folder / "after", policy.model, tok)
    scores = policy.logprobs(rank_rows(held), temperature=1.0)
    if rank == 0:
        (folder / "scores.json").write_text(json.dumps([float(score[0]) for score in scores]))
    (folder / f"loss-{rank}.json").write_text(json.dumps([stats.sums["loss"], stats.grad_norm]))


@pytest.mark.parametrize("layout", [TrainConfig(), TrainConfig(shard=2), TrainConfig(shard=2, expert=2)], ids=str)
def test_update_equals_trls_and_transformers_loads_what_is_saved(layout: TrainConfig, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    tok = tokenizer()
    tok.save_pretrained(folder)
    run_ranks(train_and_save, layout.world, folder, model_dir("deepseek"), layout)
    parts = [json.loads((folder / f"loss-{rank}.json").read_text()) for rank in range(layout.world)]
    loss, norm = sum(part[0] for part in parts), parts[0][1]

    classifier = AutoModelForSequenceClassification.from_pretrained(folder / "before", experts_implementation="eager")
    assert type(classifier).__name__ == "DeepseekV2ForSequenceClassification" and classifier.num_labels == 1
    rows = [row | {"margin": 0.25 * (i % 3)} for i, row in enumerate(PAIRS)]
    kept, held, _ = make_judged_rows(rows, tok, config(), "rows")
    args = TRLRewardConfig(output_dir=str(tmp_path), report_to=[], use_cpu=True, bf16=False, max_length=64,
                           center_rewards_coefficient=0.01, gradient_checkpointing=False)  # fmt: skip
    trainer = RewardTrainer(classifier, args, train_dataset=Dataset.from_list(PAIRS), processing_class=tok)
    batch = [
        {"chosen_ids": one.trajectories[0].token_ids[:-1].tolist(), "margin": one.targets[0],
         "rejected_ids": one.trajectories[1].token_ids[:-1].tolist()}
        for one in kept[:8]
    ]  # fmt: skip
    collated = trainer.data_collator(batch)
    theirs = trainer.compute_loss(classifier, dict(collated))
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-6)
    gradients = [p.grad for p in classifier.parameters() if p.grad is not None]
    assert norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).double().norm().item(), rel=1e-5)

    after = AutoModelForSequenceClassification.from_pretrained(folder / "after").eval()
    ids = [side.token_ids[:-1].tolist() for row in held for side in row.trajectories]
    padded = tok.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        expected = after(**padded).logits[:, 0].numpy()
    np.testing.assert_allclose(json.loads((folder / "scores.json").read_text()), expected, atol=2e-6)


# -- what is reported


class Scores:
    """A policy that scores sides by a rule."""

    def __init__(self, rule):
        self.rule = rule

    def phase(self, name: str):
        return contextlib.nullcontext(self)

    def scores(self, rows):
        return np.array([self.rule(row.trajectory.ref[row.trajectory.index]) for row in rows], np.float32)


def test_confounded_length_is_reported_and_an_honest_rule_is_not():
    tok = tokenizer()
    long = [{"prompt": f"p{i}", "chosen": "good " * (3 + i % 5), "rejected": "bad " * (1 + i % 2)} for i in range(80)]
    fair = [
        {"prompt": f"p{i}", "chosen": "good " * (1 + i % 5), "rejected": "bad " * (1 + (i * 7) % 5)} for i in range(80)
    ]
    for rows, warned in ((long, True), (fair, False)):
        _, held, _ = make_judged_rows(rows, tok, config(held_out=0.9), "rows")
        found = reward_model.held_out_metrics(Scores(lambda one: float("good" in tok.decode(one.token_ids))), held)
        assert found["held_out/accuracy"] > 0.9
        assert (length_warning(found) is not None) == warned, found
    _, held, _ = make_judged_rows(fair, tok, config(held_out=0.9), "rows")
    assert length_warning(reward_model.held_out_metrics(Scores(lambda one: len(one.token_ids)), held)) is not None


def test_calibration_error_by_hand():
    confidence = np.array([0.55, 0.55, 0.95, 0.95])
    logits = np.log(confidence / (1 - confidence))
    right = np.array([True, False, True, True])
    assert reward_model.calibration_error(logits, right) == pytest.approx((abs(1 - 1.1) + abs(2 - 1.9)) / 4)
