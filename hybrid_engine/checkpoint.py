"""Checkpoints that a run resumes from, and the final Transformers directory: each is there whole, or not at all."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.model import atomic_directory, save_model_dir

COMPLETE = "complete.json"
CHECKPOINT = re.compile(r"step-(\d+)|\.step-(\d+)\.old")
"""A checkpoint's name; with `.old`, while another of the same step takes its place (see `atomic_directory`)."""
UNFINISHED = re.compile(r"\.step-\d+\.new")


def step_dir(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies; names sort by number."""
    return checkpoints / f"step-{step:08d}"


def save_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, extra: dict[str, Any]
) -> None:
    """Write weights, optimiser state, every rank's random states and rank 0's `extra` to `path`, atomically.

    A collective over all ranks. extra: plain values, containers and tensors. Until the rename at the very end, an
    older checkpoint is what `latest_checkpoint` finds. It may be loaded by another number of ranks.
    """
    with _folder_of_all_ranks(path) as folder:
        weights, states = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": states}, checkpoint_id=folder / "shards", no_dist=not _in_group())
        torch.save(_random_states(), folder / f"random-{_rank()}.pt")
        if _rank() == 0:
            torch.save(extra, folder / "extra.pt")


def load_checkpoint(path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, in place, and return its `extra`. A collective over all ranks.

    Random states return where the number of ranks is the same as it was; otherwise they are left as they are.
    Raises ValueError when `path` holds no complete checkpoint.
    """
    if not (path / COMPLETE).is_file():
        raise ValueError(f"{path} is not a complete checkpoint (it has no {COMPLETE}); start from another one")
    optimizer.zero_grad(set_to_none=True)  # with gradients around, torch would not create the states to load into
    weights, states = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=path / "shards", no_dist=not _in_group())
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    if json.loads((path / COMPLETE).read_text())["ranks"] == _ranks():
        _restore_random_states(torch.load(path / f"random-{_rank()}.pt", weights_only=True))
    return torch.load(path / "extra.pt", weights_only=True)


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = _complete(checkpoints)
    return found[-1] if found else None


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest complete checkpoints, and what interrupted saves left. One process calls it."""
    assert keep > 0
    kept = _complete(checkpoints)[-keep:]
    for path in checkpoints.glob("*"):
        if path not in kept and (CHECKPOINT.fullmatch(path.name) or UNFINISHED.fullmatch(path.name)):
            (path / COMPLETE).unlink(missing_ok=True)  # first, so that a half-deleted one is not taken for whole
            shutil.rmtree(path)


def save_final(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a directory that `from_pretrained` and vLLM load as it is: safetensors under checkpoint names, config,
    generation config and tokenizer. Atomic, and a collective over all ranks."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if _rank() == 0:
        save_model_dir(model, tokenizer, path, state)
    _barrier()


@contextmanager
def _folder_of_all_ranks(path: Path) -> Iterator[Path]:
    """Rank 0's `atomic_directory`, with all ranks writing into it."""
    if _rank() == 0:
        with atomic_directory(path) as folder:
            yield _from_rank_0(folder)
            _barrier()
            (folder / COMPLETE).write_text(json.dumps({"ranks": _ranks(), "torch": torch.__version__}))
    else:
        yield _from_rank_0(None)
        _barrier()
    _barrier()


def _complete(checkpoints: Path) -> list[Path]:
    """Complete checkpoints by number of steps."""
    found: dict[int, Path] = {}
    for path in sorted(checkpoints.glob("*")):  # ".step-N.old" comes first, so that "step-N" takes its place
        match = CHECKPOINT.fullmatch(path.name)
        if match and (path / COMPLETE).is_file():
            found[int(match[1] or match[2])] = path
    return [found[step] for step in sorted(found)]


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])


def _in_group() -> bool:
    return dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _in_group() else 0


def _ranks() -> int:
    return dist.get_world_size() if _in_group() else 1


def _from_rank_0(folder: Path | None) -> Path:
    box = [folder]
    if _in_group():
        dist.broadcast_object_list(box)
    assert box[0] is not None
    return box[0]


def _barrier() -> None:
    if _in_group():
        dist.barrier()
