"""One training rank: an actor that holds its share of the policy, of the optimiser and of the reference."""

import shutil
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import torch.distributed as dist
from transformers import AutoTokenizer

from alignment.config import RewardModelConfig, StageConfig, TrainConfig
from alignment.logprobs import token_logprobs, token_scores
from alignment.policy import RankPolicy, UpdateStats
from alignment.protocols import Loss, TrainRow
from alignment.routing import Routing
from hybrid_engine.actors import Worker
from hybrid_engine.checkpoint import Pieces, load_checkpoint, save_checkpoint, save_final
from hybrid_engine.disk import BLOCK
from hybrid_engine.hand_over import Meeting, Sender, Sent, Way, join
from hybrid_engine.loading import load_model
from hybrid_engine.offload import Offloader, Place, local, spread
from hybrid_engine.sharding import clip_grad_norm, last_micro_batch, make_meshes, parameter_groups, reshard
from hybrid_engine.weight_sync import WeightPacker
from rollout.config import RolloutConfig
from rollout.types import Handle
from rollout.vllm.sleep import trim


class TrainWorker(Worker):
    """In a world of several ranks every rank gets the same calls in the same order."""

    def __init__(self, rank: int, config: TrainConfig, rollout: RolloutConfig, device: str) -> None:
        self._rank, self._config, self._rollout = rank, config, rollout
        self._device = torch.device(device)
        self._saving: Future[None] | None = None
        self._offloader: Offloader | None = None
        self._streamed: list[Place] = []
        self._packed: tuple[Any, Any] = None, None  # (version, bucket), and its parcels

    def join(self, address: tuple[str, int]) -> None:
        """Form the process group."""
        backend, meet = "nccl" if self._device.type == "cuda" else "gloo", f"tcp://{address[0]}:{address[1]}"
        dist.init_process_group(backend, meet, rank=self._rank, world_size=self._config.world)
        self._background = dist.new_group(backend="gloo")  # checkpoints are written while training goes on
        self._meshes = make_meshes(self._config, self._device.type)

    def connect(self, ways: Sequence[tuple[int, Way]], meeting: Meeting | None) -> None:
        """Learn how weights get to the rollout ranks (as `Sender` wants it)."""
        group = join(meeting, len(ways) + self._rank)
        self._sender = Sender(ways, None if self._device.type == "cpu" else self._device, group)

    def load(self, model_dir: Path, tokenizer_dir: Path, stage: StageConfig, reference_dir: Path | None) -> int:
        """Start a stage: weights from `model_dir`, a new optimiser, the frozen reference if the stage needs one.
        Returns the number of buckets of a hand-over, none of a reward model."""
        self._policy = self._reference = self._packer = None  # before the next ones are made: they need the memory
        self._packed = None, None
        if self._offloader is not None:
            self._offloader.clear()
        self._policy = self._build(model_dir, stage, self._config)
        if reference_dir is not None:
            self._reference = self._build(reference_dir, stage, TrainConfig())
            self._reference.model.requires_grad_(False)
        self._tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
        if isinstance(stage, RewardModelConfig):
            return 0
        self._packer = WeightPacker(self._policy.model, self._rollout)
        return self._packer.buckets

    def _build(self, model_dir: Path, config: StageConfig, routing: TrainConfig) -> RankPolicy:
        judges = isinstance(config, RewardModelConfig)
        score_seed = zlib.crc32(config.name.encode()) if judges else None
        model = load_model(model_dir, self._config, self._meshes, self._device, score_seed)
        groups = [{"params": group} for group in parameter_groups(model)]
        optimizer = torch.optim.AdamW(groups, config.learning_rate, config.betas, weight_decay=config.weight_decay)
        return RankPolicy(
            model=model,
            optimizer=optimizer,
            tokens_per_rank=self._config.tokens_per_rank,
            clip_grad_norm=lambda norm: clip_grad_norm(model.parameters(), norm),
            last_micro_batch=partial(last_micro_batch, model),
            after_forward=partial(reshard, model),
            routing=Routing(model, routing, config.capacity),
            outputs=token_scores if judges else token_logprobs,
            step=self._step,
            keep_gradients=self._device.type == "cpu" and self._offloader is None,
        )

    def offload(self, folder: Path | None) -> tuple[int, dict[str, tuple[float, float]]]:
        """Get ready to move tensors, to `folder` too: its free bytes, and as `Offloader.speeds`."""
        self._offloader = Offloader(self._device, folder)
        speeds = self._offloader.speeds()
        return 0 if folder is None else shutil.disk_usage(folder).free, speeds

    def components(self) -> dict[str, tuple[int, int]]:
        """What this rank holds: name -> bytes, pieces. Optimiser states are still to come."""
        states, parameters = self._policy.optimizer.state, dict(self._policy.model.named_parameters())
        trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}

        def moments(parameter: torch.Tensor) -> list[torch.Tensor]:
            return [value for value in states.get(parameter, {}).values() if value.ndim]

        found = {"parameters": self._component("parameters", parameters)}
        found["gradients"] = sum(local(p.detach()).nbytes for p in trained.values()), 1
        found["optimizer"] = self._component("optimizer", trained, moments, copies=2)
        if self._reference is not None:
            found["reference"] = self._component("reference", dict(self._reference.model.named_parameters()))
        trim()
        return found

    def _component(
        self, name: str, parameters: dict[str, Any], held: Callable[[Any], Any] = lambda p: [p], copies: int = 1
    ) -> tuple[int, int]:
        pieces = spread({key: parameter.numel() for key, parameter in parameters.items()})  # on all ranks alike
        sizes = {key: copies * local(p.detach()).nbytes for key, p in parameters.items()}
        # FSDP pads a shard by less than a row when it is first used; and each tensor has whole blocks.
        rows = {key: 8 * p.numel() // max(1, min(p.shape[:2], default=1)) + BLOCK for key, p in parameters.items()}
        most = max(sum(sizes[key] + copies * rows[key] for key in piece) for piece in pieces)
        tensors = [lambda own=piece: [t for key in own for t in held(parameters[key])] for piece in pieces]
        self._offloader.add(name, tensors, most)
        if name == "optimizer":
            self._shares = pieces
        return sum(sizes.values()), len(pieces)

    def place(self, places: Sequence[Place], during: bool) -> None:
        """Move now; or begin to, `during` the work to come, and let updates stream what is to be streamed."""
        back = [place._replace(streamed=False) for place in self._streamed]
        self._streamed = [place for place in places if place.streamed]
        ahead = [Place(place.component, place.piece, self._offloader.top_alone) for place in self._streamed[:1]]
        self._offloader.place([*back, *(place for place in places if not place.streamed), *ahead], wait=not during)
        if not during:
            trim(self._device.type == "cuda")  # what this rank's allocator keeps is wanted by the engine's

    @property
    def _pieces(self) -> Pieces | None:
        """The optimiser's states as a checkpoint takes them where they may lie elsewhere."""
        if self._offloader is not None:
            return Pieces(self._shares, partial(self._offloader.visit, "optimizer"))
        return None

    def device_memory(self) -> tuple[int, int]:
        """Bytes of this rank's device that were in use at most, by this rank since the last call, and all."""
        free, whole = torch.cuda.mem_get_info(self._device)
        more = torch.cuda.max_memory_reserved(self._device) - torch.cuda.memory_reserved(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        return whole - free + more, whole

    def _step(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimiser, which leaves out parameters that have no gradient: those whose states are streamed
        wait for theirs, piece by piece."""
        if not self._streamed:
            optimizer.step()
            return
        parameters = dict(self._policy.model.named_parameters())
        waiting = [name for place in self._streamed for name in self._shares[place.piece]]
        gradients = {name: parameters[name].grad for name in waiting}
        for name in waiting:
            parameters[name].grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for number in self._offloader.stream(self._streamed):
            for name in self._shares[number]:
                parameters[name].grad = gradients.pop(name)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def update(self, rows: Sequence[TrainRow], loss: Loss, **how: float) -> UpdateStats:
        """As `RankPolicy.update`; `rows` are this rank's."""
        return self._policy.update(resolve(rows), loss, **how)

    def logprobs(self, rows: Sequence[TrainRow], temperature: float, reference: bool) -> list[Handle]:
        """A handle to each row's log-probabilities, float32 [tokens]."""
        policy = self._reference if reference else self._policy
        assert policy is not None, "the stage was loaded without a reference"
        values = policy.logprobs(resolve(rows), temperature=temperature)
        ref = ray.put(values)
        return [Handle(ref, i) for i in range(len(values))]

    def pack(self, version: int, bucket: int) -> None:
        """Pack this rank's part of a bucket, to be published next."""
        room = self._sender.room(self._packer.nbytes)
        self._packed = (version, bucket), self._packer.pack(version, bucket, room)

    def publish(self, version: int, bucket: int) -> list[Sent]:
        """Offer a bucket, packed ahead or now: the next one can be packed meanwhile, none after it."""
        if self._packed[0] != (version, bucket):
            self.pack(version, bucket)
        return self._sender.publish(self._packed[1])

    def send(self) -> None:
        """Send what was published last, where it goes over NCCL."""
        self._sender.send()

    def canary(self, prompts: Sequence[np.ndarray]) -> np.ndarray:
        """The trainer's own log-probabilities of each prompt's next token: float32 [prompts, V]. On one thread: the
        engines compute theirs at the same time, and a second one would take turns with them."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return self._policy.next_token_logprobs(prompts)
        finally:
            torch.set_num_threads(threads)

    def save_checkpoint(self, path: Path, extra: dict[str, Any]) -> None:
        """Begin to write all that a resumed stage needs, once the one before is written; `extra` is the driver's."""
        self.finish_checkpoint()
        what = self._policy.model, self._policy.optimizer, extra, self._background, self._pieces
        self._saving = save_checkpoint(path, *what)

    def finish_checkpoint(self) -> None:
        """Wait until the last checkpoint is written."""
        if self._saving is not None:
            self._saving.result()

    def load_checkpoint(self, path: Path) -> dict[str, Any]:
        """Restore a checkpoint of this stage; the driver's `extra`."""
        return load_checkpoint(path, self._policy.model, self._policy.optimizer, self._pieces)

    def save_final(self, path: Path) -> None:
        """Write the weights as a Transformers directory."""
        save_final(path, self._policy.model, self._tokenizer)


def resolve(rows: Sequence[TrainRow]) -> list[TrainRow]:
    """The rows with what lies behind their handles in place of them; every reference is fetched once."""
    handles = [h for row in rows for h in (row.trajectory, row.old_logprobs, row.reference_logprobs) if h is not None]
    refs = list(dict.fromkeys(h.ref for h in handles if isinstance(h.ref, ray.ObjectRef)))
    found = dict(zip(refs, ray.get(refs), strict=True))

    def fetch(handle: Handle | None) -> Any:
        if handle is None:
            return None
        return (found[handle.ref] if isinstance(handle.ref, ray.ObjectRef) else handle.ref)[handle.index]

    fetched = ((row, *map(fetch, (row.trajectory, row.old_logprobs, row.reference_logprobs))) for row in rows)
    return [replace(row, trajectory=own, old_logprobs=old, reference_logprobs=ref) for row, own, old, ref in fetched]
