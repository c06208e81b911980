"""Checkpoints that a run resumes from, and the final Transformers directory: each is there whole, or not at all.

A folder with a checkpoint's name is complete: it gets its name by the rename that ends the saving. What is not has
another name (`unfinished`). Saving and loading are collectives over all ranks of the process group."""

import random
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.metrics import atomic_directory, unfinished
from alignment.model import as_classifier, save_model_dir


class Pieces(NamedTuple):
    """Optimiser states that may lie outside memory. names: the parameters of each piece. visit: has a piece in memory
    (`changed` there) until the next call; None: of none. All ranks alike."""

    names: Sequence[Sequence[str]]
    visit: Callable[..., None]


def step_dir(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint after `step` steps lies; names sort by number."""
    return checkpoints / f"step-{step:08d}"


def save_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, extra: dict[str, Any],
    group: dist.ProcessGroup | None = None, pieces: Pieces | None = None,
) -> Future[None]:  # fmt: skip
    """Write weights, optimiser state, every rank's random states and rank 0's `extra` to `path`, atomically.

    Training may go on at once: a copy is written, in the background, and rank 0's future is done when `path` is there;
    older checkpoints beside it are then deleted. extra: plain values, containers and tensors. The checkpoint may be
    loaded by another number of ranks. group: gloo, of all ranks, for this alone (default: all ranks' own group, in
    which nothing else may happen meanwhile). With `pieces` all is written before this returns, and no copy made."""
    rank, stack = dist.get_rank(), ExitStack()
    folder = stack.enter_context(atomic_directory(path)) if rank == 0 else unfinished(path)
    dist.barrier()  # the folder is there
    torch.save(_random_states(), folder / f"random-{rank}.pt")
    if rank == 0:
        torch.save(extra, folder / "extra.pt")
    dist.barrier()  # every rank's random states are there; what is written below may need the group for itself
    weights, states = dcp_state.get_state_dict(model, optimizer)
    state, shards = {"model": weights, "optimizer": states}, folder / "shards"
    if pieces is None:
        written = dcp.async_save(state, checkpoint_id=shards, process_group=group)
    else:  # copied ahead, a piece would be away again before its copy is made
        writer = dcp.FileSystemWriter(shards, per_thread_copy_ahead=0)
        dcp.save(state, storage_writer=writer, planner=_PieceByPiece(pieces), process_group=group)
        pieces.visit(None)

    def finish() -> None:
        with stack:
            if pieces is None:
                written.result()  # rank 0's comes when every rank has written
        if rank == 0:
            prune(path.parent, keep=1)

    background = ThreadPoolExecutor(1)
    finished = background.submit(finish)
    background.shutdown(wait=False)
    return finished


def load_checkpoint(
    path: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, pieces: Pieces | None = None
) -> dict[str, Any]:
    """Restore what `save_checkpoint` wrote, in place, and return its `extra`. Random states return where the number of
    ranks is the same as it was; otherwise they are left as they are."""
    optimizer.zero_grad(set_to_none=True)  # with gradients around, torch would not create the states to load into
    if pieces is not None:
        _make_states(model, optimizer, pieces)
    weights, states = dcp_state.get_state_dict(model, optimizer)
    shards, moments = path / "shards", states["state"]
    if pieces is not None:
        states["state"] = {}  # all of them are in pieces
        for number, names in enumerate(pieces.names):
            pieces.visit(number, changed=True)
            dcp.load({"optimizer": {"state": {name: moments[name] for name in names}}}, checkpoint_id=shards)
        pieces.visit(None)
    state = {"model": weights, "optimizer": states}
    dcp.load(state, checkpoint_id=shards)
    loaded = state["optimizer"] | {"state": moments}
    dcp_state.set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=loaded)
    if len(list(path.glob("random-*.pt"))) == dist.get_world_size():
        drawn = torch.load(path / f"random-{dist.get_rank()}.pt", weights_only=True)
        random.setstate(drawn["python"])
        np.random.set_state(drawn["numpy"])
        torch.set_rng_state(drawn["torch"])
        if drawn["cuda"]:
            torch.cuda.set_rng_state_all(drawn["cuda"])
    return torch.load(path / "extra.pt", weights_only=True)


class _PieceByPiece(dcp.DefaultSavePlanner):
    """Writes one piece after the other."""

    def __init__(self, pieces: Pieces) -> None:
        super().__init__()
        self._visit = pieces.visit
        self._numbers = {name: number for number, names in enumerate(pieces.names) for name in names}

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        items = sorted(new_plan.items, key=lambda item: -1 if (n := self._number(item.index)) is None else n)
        return super().finish_plan(replace(new_plan, items=items))

    def lookup_object(self, index: MetadataIndex) -> Any:
        self._visit(self._number(index))
        return super().lookup_object(index)

    def _number(self, index: MetadataIndex) -> int | None:
        return self._numbers.get(index.fqn.removeprefix("optimizer.state.").rpartition(".")[0])


def _make_states(model: PreTrainedModel, optimizer: torch.optim.Optimizer, pieces: Pieces) -> None:
    """AdamW's states of parameters that have none, a piece at a time: torch would make all at once."""
    parameters = dict(model.named_parameters())
    for number, names in enumerate(pieces.names):
        pieces.visit(number, changed=True)
        for parameter in (parameters[name] for name in names if parameters[name] not in optimizer.state):
            moments = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": torch.tensor(0.0)} | moments
    pieces.visit(None)


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The checkpoint with the most steps, or None."""
    return max(checkpoints.glob("step-*"), default=None)


def prune(checkpoints: Path, keep: int) -> None:
    """Delete all but the `keep` newest checkpoints, and what interrupted saves left. One process calls it."""
    assert keep > 0
    for path in checkpoints.glob(".step-*"):
        shutil.rmtree(path)
    for path in sorted(checkpoints.glob("step-*"))[:-keep]:
        shutil.rmtree(path.rename(unfinished(path)))  # renamed, so that one half deleted is not taken for whole


def save_final(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write a directory that `from_pretrained` and vLLM load as it is: safetensors under checkpoint names, config,
    generation config and tokenizer. Atomic, and a collective over all ranks."""
    options = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = dcp_state.get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        if model.get_output_embeddings().out_features == 1:  # a reward model
            model, state = as_classifier(model, tokenizer, state)
        save_model_dir(model, tokenizer, path, state)
    dist.barrier()


def _random_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
