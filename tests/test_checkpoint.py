"""A checkpoint is whole or absent, continues bit for bit, and does not care how many ranks wrote it."""

from __future__ import annotations

import random
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.distributed as dist
from ranks import run_ranks, tiny_model
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignment.config import TrainConfig
from hybrid_engine.checkpoint import latest_checkpoint, load_checkpoint, prune, save_checkpoint, save_final, step_dir
from hybrid_engine.sharding import clip_grad_norm, make_meshes, parameter_groups, shard_model

EXTRA = {"step": 2, "stream": {"epoch": 1, "order": [3, 1, 2], "fingerprint": "ab"}, "loss": 0.1 + 0.2}


class Run:
    """A model and its optimiser; every step draws from all three generators, as a stage might."""

    def __init__(self, family: str = "deepseek-v2", seed: int = 0) -> None:
        self.model = tiny_model(family, seed).train()
        if dist.get_world_size() > 1:
            train = TrainConfig(shard=dist.get_world_size())
            shard_model(self.model, make_meshes(train, "cpu"), train)
        groups = [{"params": group} for group in parameter_groups(self.model)]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3 * (seed + 1), weight_decay=0.1)

    def steps(self, count: int) -> Run:
        for _ in range(count):
            ids = torch.randint(101, (2, 5))
            ids[0, 0], ids[1, 0] = random.randrange(101), int(np.random.randint(101))
            self.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            clip_grad_norm(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return self

    def save(self, path: Path) -> None:
        save_checkpoint(path, self.model, self.optimizer, EXTRA).result()
        dist.barrier()  # rank 0's is there

    def load(self, path: Path) -> dict:
        return load_checkpoint(path, self.model, self.optimizer)

    def state(self) -> dict[str, torch.Tensor]:
        """Full parameters and optimiser states."""
        found = {}
        for name, parameter in self.model.named_parameters():
            found[name] = parameter
            found |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return {k: (v.full_tensor() if isinstance(v, DTensor) else v).detach().clone() for k, v in found.items()}


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def resumed_and_uninterrupted(folder: Path, family: str = "deepseek-v2") -> tuple[dict, dict]:
    run = Run(family)
    seed_all(7 + dist.get_rank())
    run.steps(2).save(step_dir(folder, 2))
    uninterrupted = run.steps(2).state()
    other = Run(family, seed=9)  # other weights, another learning rate, gradients left over from somewhere
    seed_all(99)
    other.model(input_ids=torch.ones(1, 3, dtype=torch.long), use_cache=False).logits.sum().backward()
    extra = other.load(step_dir(folder, 2))
    assert extra == EXTRA
    return other.steps(2).state(), uninterrupted


def on_two_ranks(folder: Path) -> None:
    resumed, uninterrupted = resumed_and_uninterrupted(folder / "two")
    assert same(resumed, uninterrupted)
    run = Run(seed=3)
    run.load(step_dir(folder / "one", 2))
    from_one = run.state()
    noise = torch.rand(3)
    again = Run(seed=4)
    again.load(step_dir(folder / "two", 2))
    from_two = again.state()
    save_final(folder / "final", again.model, tiny.tokenizer())
    if dist.get_rank() == 0:
        torch.save({"from_one": from_one, "from_two": from_two, "noise": noise}, folder / "found.pt")


@pytest.fixture(scope="module", autouse=True)
def group_of_one():
    """This process is a group of one rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint by one rank (`one`) and one by two (`two`), and what two ranks made of them."""
    folder = tmp_path_factory.mktemp("two_ranks")
    seed_all(5)
    Run().steps(2).save(step_dir(folder / "one", 2))
    run_ranks(on_two_ranks, 2, folder)
    return folder


@pytest.mark.parametrize("family", ["deepseek-v2", "llama-tied"])
def test_resuming_equals_never_stopping(tmp_path: Path, family: str):
    resumed, uninterrupted = resumed_and_uninterrupted(tmp_path, family)
    assert same(resumed, uninterrupted)


def test_two_ranks_resume_bit_for_bit(two_ranks: Path):
    assert sorted(p.name for p in step_dir(two_ranks / "two", 2).glob("random-*")) == ["random-0.pt", "random-1.pt"]


def test_one_ranks_checkpoint_loads_on_two_and_the_other_way(two_ranks: Path):
    found = torch.load(two_ranks / "found.pt")
    for source in ("one", "two"):
        run = Run(seed=8)
        seed_all(1)
        expected = torch.rand(3)
        seed_all(1)
        assert run.load(step_dir(two_ranks / source, 2)) == EXTRA
        assert torch.equal(torch.rand(3), expected) == (source == "two"), "random states return for equal ranks only"
        assert same(run.state(), found[f"from_{source}"])


def test_a_sharded_policy_becomes_a_transformers_directory(two_ranks: Path):
    run = Run(seed=8)
    run.load(step_dir(two_ranks / "two", 2))
    loaded = AutoModelForCausalLM.from_pretrained(two_ranks / "final", dtype=torch.float32)
    assert same(loaded.state_dict(), run.model.state_dict())
    ids = torch.arange(20)[None]
    assert torch.equal(loaded.eval()(input_ids=ids).logits, run.model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("family", ["deepseek-v2", "qwen3-moe", "llama-tied"])
def test_a_plain_policy_becomes_a_transformers_directory(tmp_path: Path, family: str):
    model, tokenizer = tiny_model(family).eval(), tiny.tokenizer()
    save_final(tmp_path / "final", model, tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "final", dtype=torch.float32).eval()
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "final").encode("1 plus 2") == tokenizer.encode("1 plus 2")
    assert (tmp_path / "final" / "generation_config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


class Killed(BaseException):
    """No code of ours handles it: what is on the disk is what a kill leaves."""


def save_and_die(run: Run, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save, killed just before the rename to the name of a checkpoint (DCP's own renames pass)."""
    real = Path.rename

    def dying(self: Path, target: Path) -> Path:
        if Path(target).name.startswith("step-"):
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Path, "rename", dying)
        run.save(path)


def test_a_kill_before_the_rename_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = Run("llama").steps(1)
    run.save(step_dir(tmp_path, 5))
    before = run.state()
    run.steps(1)
    save_and_die(run, step_dir(tmp_path, 10), monkeypatch)
    assert latest_checkpoint(tmp_path) == step_dir(tmp_path, 5)
    other = Run("llama", seed=1)
    other.load(latest_checkpoint(tmp_path))
    assert same(other.state(), before)
    run.save(step_dir(tmp_path, 10))
    assert latest_checkpoint(tmp_path) == step_dir(tmp_path, 10)
    prune(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [step_dir(tmp_path, 10)]


def fake(checkpoints: Path, name: str) -> Path:
    path = checkpoints / name
    path.mkdir(parents=True)
    (path / "extra.pt").write_text("")
    return path


def test_the_newest_is_found_and_the_unfinished_ignored(tmp_path: Path):
    assert latest_checkpoint(tmp_path / "absent") is None
    prune(tmp_path / "absent", 1)
    nine, ten = (fake(tmp_path, step_dir(tmp_path, step).name) for step in (9, 10))
    fake(tmp_path, f".{step_dir(tmp_path, 12).name}.new")
    fake(tmp_path, "notes")
    assert latest_checkpoint(tmp_path) == ten
    prune(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", nine.name, ten.name]
    prune(tmp_path, 1)
    assert not nine.exists() and latest_checkpoint(tmp_path) == ten


def test_a_kill_while_pruning_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    nine, ten = (fake(tmp_path, step_dir(tmp_path, step).name) for step in (9, 10))

    def dying(path: Path) -> None:
        (path / "extra.pt").unlink()
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", dying)
        prune(tmp_path, 1)
    assert not nine.exists() and latest_checkpoint(tmp_path) == ten
    prune(tmp_path, 1)
    assert list(tmp_path.iterdir()) == [ten]


def test_a_checkpoint_is_saved_before_any_step_too(tmp_path: Path):
    run = Run("llama")
    run.save(step_dir(tmp_path, 1))  # the optimiser has no state yet
    other = Run("llama", seed=1)
    other.load(step_dir(tmp_path, 1))
    assert same(other.state(), run.state())


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is written is the state at the call, and it has no name until it is whole."""
    gate, write = threading.Event(), FileSystemWriter.write_data

    def slowly(self, *arguments):
        assert gate.wait(60)
        return write(self, *arguments)

    monkeypatch.setattr(FileSystemWriter, "write_data", slowly)
    run = Run().steps(2)
    before = run.state()
    saving = save_checkpoint(step_dir(tmp_path, 2), run.model, run.optimizer, EXTRA)
    run.steps(2)
    assert not saving.done() and latest_checkpoint(tmp_path) is None
    gate.set()
    saving.result()
    other = Run(seed=1)
    assert other.load(latest_checkpoint(tmp_path)) == EXTRA
    assert same(other.state(), before) and not same(run.state(), before)
