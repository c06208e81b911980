"""Our losses, gradients included, equal TRL's on the same batch."""

from __future__ import annotations

import copy
import dataclasses
from functools import partial

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import model_dir
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig as TRLGRPOConfig
from trl import GRPOTrainer, SFTTrainer
from trl import SFTConfig as TRLSFTConfig

from alignment.batch import grpo_minibatches
from alignment.config import GRPOConfig, TrainConfig
from alignment.logprobs import TREE_ATTENTION
from alignment.losses import grpo_loss, sft_loss
from alignment.policy import RankPolicy
from alignment.routing import Routing
from alignment.sft import sft_step
from rollout.types import Completion, Group, Handle, Prompt, Scores, Trajectory

P, G, TEMPERATURE = 3, 4, 0.8


@pytest.fixture(scope="module")
def folder():
    return model_dir("deepseek")


@pytest.fixture(scope="module")
def trl_grpo(folder, tmp_path_factory: pytest.TempPathFactory):
    def trainer(**changes) -> GRPOTrainer:
        args = TRLGRPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")), per_device_train_batch_size=P * G, num_generations=G,
            temperature=TEMPERATURE, report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
            epsilon=0.2, epsilon_high=0.28, max_completion_length=8,
            use_bias_correction_kl=False,  # eq. 33 as printed; TRL can also weight it by the ratio
            **changes,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
        data = Dataset.from_list([{"prompt": "a"}] * (P * G))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        made = GRPOTrainer(model, reward_funcs=lambda completions, **_: [0.0] * len(completions), args=args,
                           train_dataset=data, processing_class=tokenizer)  # fmt: skip
        made.current_gradient_accumulation_steps = 1
        made.model.train()
        return made

    return trainer


def sampled(seed: int) -> tuple[list[Group], list[Trajectory], np.ndarray, np.ndarray]:
    """Groups of random tokens with random rewards, and "old" and "reference" log-probabilities that matter."""
    rng = np.random.default_rng(seed)
    groups, trajectories = [], []
    for p in range(P):
        prompt = rng.integers(5, 60, rng.integers(2, 6)).astype(np.int32)
        completions = []
        for _ in range(G):
            completion = rng.integers(5, 60, rng.integers(1, 8)).astype(np.int32)
            tokens = np.concatenate([prompt, completion])
            mask = np.arange(len(tokens)) >= len(prompt)
            completions.append(Completion("", completion, "stop", Handle("all", len(trajectories))))
            trajectories.append(Trajectory(tokens, mask, np.where(mask, -2.0, np.nan).astype(np.float32), "stop"))
        scores = Scores(rng.normal(size=G), {}, {})
        groups.append(Group(Prompt(p, "", prompt, {}), tuple(completions), scores))
    noise = [rng.normal(scale=0.3, size=(P * G, 8)).astype(np.float32) for _ in range(2)]
    return groups, trajectories, *noise


def padded(groups: list[Group]) -> dict[str, torch.Tensor]:
    """TRL's layout: prompts padded on the left, completions on the right."""
    prompts = [group.prompt.token_ids for group in groups for _ in group.completions]
    completions = [c.token_ids for group in groups for c in group.completions]
    longest_prompt, longest = max(map(len, prompts)), max(map(len, completions))
    batch = {name: torch.zeros(len(prompts), n, dtype=torch.long) for name, n in (
        ("prompt_ids", longest_prompt), ("prompt_mask", longest_prompt),
        ("completion_ids", longest), ("completion_mask", longest))}  # fmt: skip
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        batch["prompt_ids"][i, longest_prompt - len(prompt) :] = torch.from_numpy(prompt)
        batch["prompt_mask"][i, longest_prompt - len(prompt) :] = 1
        batch["completion_ids"][i, : len(completion)] = torch.from_numpy(completion)
        batch["completion_mask"][i, : len(completion)] = 1
    return batch


class Capture:
    """A `RankPolicy` on one process whose gradients are kept instead of applied."""

    def __init__(self, folder) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=TREE_ATTENTION
        )
        self.gradients: dict[str, torch.Tensor] = {}
        optimizer, routing = torch.optim.SGD(self.model.parameters(), lr=0.0), Routing(self.model, TrainConfig())
        self.policy = RankPolicy(self.model, optimizer, 64, self._clip, lambda last: None, lambda: None, routing)

    def _clip(self, max_norm: float) -> float:
        self.gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        return 0.0

    def update(self, rows, loss, **kwargs):
        return self.policy.update(rows, loss, **kwargs)


def assert_same_gradients(ours: dict[str, torch.Tensor], theirs: torch.nn.Module) -> None:
    compared = 0
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            scale = parameter.grad.abs().max().clamp(min=1e-3)
            torch.testing.assert_close(
                ours[name] / scale, parameter.grad / scale, atol=1e-4, rtol=0, msg=lambda m, name=name: f"{name}: {m}"
            )
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("off_policy", [False, True])
@pytest.mark.parametrize("kl", [0.0, 0.04])
@pytest.mark.parametrize(("normalize", "loss_type"), [("token", "dapo"), ("sequence", "grpo")])
def test_grpo_loss_equals_trl(trl_grpo, folder, normalize: str, loss_type: str, kl: float, off_policy: bool) -> None:
    trainer = trl_grpo(loss_type=loss_type, beta=kl)
    groups, trajectories, old_noise, reference_noise = sampled(seed=1)
    capture = Capture(folder)
    config = GRPOConfig(
        prompts={"path": "x.jsonl"}, rewards=[{"function": "m:f"}], steps=1, prompts_per_step=P, completions=G,
        clip=(0.2, 0.28), kl=kl, normalize=normalize,
    )  # fmt: skip
    (rows,) = grpo_minibatches(groups, config)
    plain = [dataclasses.replace(row, trajectory=trajectories[row.trajectory.index]) for row in rows]
    now = capture.policy.logprobs(plain, temperature=TEMPERATURE)

    batch = padded(groups)
    mask = batch["completion_mask"]
    old, reference = (torch.zeros(mask.shape) for _ in range(2))
    resolved = []
    for i, (row, values) in enumerate(zip(plain, now, strict=True)):
        n = len(values)
        old[i, :n] = torch.from_numpy(values + old_noise[i, :n])
        reference[i, :n] = torch.from_numpy(values + reference_noise[i, :n])
        resolved.append(
            dataclasses.replace(
                row,
                old_logprobs=old[i, :n].numpy() if off_policy else None,
                reference_logprobs=reference[i, :n].numpy() if kl else None,
            )
        )
    # the advantages that TRL computes: group by group, sample standard deviation, 1e-4
    rewards = torch.tensor(np.stack([group.scores.total for group in groups]))
    advantages = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    batch |= {"advantages": advantages.flatten().float(), "num_items_in_batch": mask.sum()}
    batch |= {"old_per_token_logps": old} if off_policy else {}
    batch |= {"ref_per_token_logps": reference} if kl else {}
    theirs = trainer._compute_loss(trainer.model, batch)
    theirs.backward()

    loss = partial(grpo_loss, clip=(0.2, 0.28), kl=kl)
    stats = capture.update(resolved, loss, learning_rate=0.0, temperature=TEMPERATURE, max_grad_norm=1.0)
    assert stats.sums["loss"] == pytest.approx(theirs.item(), abs=1e-6)
    assert_same_gradients(capture.gradients, trainer.model)


def test_sft_loss_equals_trl(folder, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [
        {"prompt": "ab c", "completion": " de"},
        {"prompt": "f", "completion": " gh ij k"},
        {"prompt": "lmn o", "completion": " p"},
    ]
    args = TRLSFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=3, report_to=[], use_cpu=True, bf16=False,
        gradient_checkpointing=False, completion_only_loss=True, max_length=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    trainer = SFTTrainer(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    theirs = trainer.compute_loss(trainer.model, copy.deepcopy(batch))
    theirs.backward()

    trajectories = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        # padding is cut off by the labels' own end: what TRL trains on, sequence by sequence
        end = int((labels != -100).nonzero().max()) + 1
        mask = (labels[:end] != -100).numpy()
        trajectories.append(
            Trajectory(ids[:end].numpy().astype(np.int32), mask, np.full(end, np.nan, np.float32), "stop")
        )
    capture = Capture(folder)

    class Engine:
        def phase(self, name):
            return self

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def update(self, rows, loss, **kwargs):
            assert loss is sft_loss
            held = [dataclasses.replace(row, trajectory=row.trajectory.ref[row.trajectory.index]) for row in rows]
            return {"loss": capture.update(held, loss, **kwargs).sums["loss"]}

    from alignment.config import SFTConfig

    metrics = sft_step(Engine(), trajectories, SFTConfig(data={"path": "x.jsonl"}, steps=1), 1, 1)
    assert metrics["loss"] == pytest.approx(theirs.item(), abs=1e-6)
    assert_same_gradients(capture.gradients, trainer.model)
