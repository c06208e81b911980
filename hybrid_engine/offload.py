"""Moves the tensors of one process between tiers, and frees for true what they leave.

The top tier is where tensors live: `device` on CUDA, `host` on the CPU. Below it are, on CUDA, pinned pages of `host`,
and on both a file on `disk`, with direct I/O: the page cache would otherwise keep in memory what was moved out of it.
"""

import mmap
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor

from hybrid_engine.disk import BLOCK, File
from rollout.vllm.sleep import trim

PAGE = 2**24
"""Bytes that move at a time."""
LARGE = 2**21
"""Bytes from which on torch aligns a tensor's memory to blocks (`ALIGNED`): it then needs no buffer."""
ALIGNED = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Environment of a process with an `Offloader` on the CPU, before it imports torch."""
RISING = ("disk", "host", "device")

Tensors = Callable[[], Sequence[torch.Tensor]]
Part = tuple[torch.UntypedStorage, int, int]
"""Bytes of a storage: from, to."""


class Place(NamedTuple):
    """A piece of a component shall lie in these tiers and no other. streamed: the work itself will fetch it, change it
    and bring it back there (`Offloader.stream`)."""

    component: str
    piece: int
    tiers: frozenset[str]
    streamed: bool = False


@dataclass(slots=True, eq=False)
class Piece:
    """tensors: what it now consists of (optimiser states come to be in the first step); asked when it leaves the top
    tier. slot: where it lies in its component's file. pages: its copy in pinned memory."""

    tensors: Tensors
    held: frozenset[str]
    slot: int
    storages: list[tuple[torch.UntypedStorage, int]] = field(default_factory=list)
    pages: list[torch.Tensor] = field(default_factory=list)

    def runs(self) -> list[list[Part]]:
        """Its bytes, a page at most in each run: of one storage, or of several that are small."""
        runs: list[list[Part]] = [[]]
        for storage, nbytes in self.storages:
            alone = nbytes >= (PAGE if storage.device.type == "cuda" else LARGE)
            for start in range(0, nbytes, PAGE):
                part = storage, start, min(nbytes, start + PAGE)
                if alone or _length(runs[-1]) + nbytes > PAGE or (runs[-1] and runs[-1][0][2] >= LARGE):
                    runs.append([])
                runs[-1].append(part)
        return [run for run in runs if run]


class Offloader:
    """One process's pieces, by component. Moves run one after the other, in a thread of their own."""

    def __init__(self, device: torch.device, folder: Path | None) -> None:
        self._cuda, self._folder = device.type == "cuda", folder
        self.top = "device" if self._cuda else "host"
        self.top_alone = frozenset({self.top})
        self._pieces: dict[str, list[Piece]] = {}
        self._sizes: dict[str, int] = {}
        self._files: dict[str, File] = {}
        self._guest: list[Place] = []
        self._free: list[torch.Tensor] = []
        self._side = torch.cuda.Stream(device) if self._cuda else None
        self._rooms = [self._page(), self._page()]
        self._mover, self._io = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._moving: list[Future[Any]] = []

    def add(self, name: str, pieces: Sequence[Tensors], nbytes: int) -> None:
        """A component, all of it in the top tier; nbytes: at most, of a piece, and a block more for each tensor.
        Raises DiskError where a disk is to be used and has no room for all of it."""
        slot = (-(-nbytes // BLOCK) + 1) * BLOCK
        self._sizes[name] = slot
        self._pieces[name] = [Piece(tensors, self.top_alone, i * slot) for i, tensors in enumerate(pieces)]
        if self._folder is not None:
            self._files[name] = File(self._folder, len(pieces) * slot)

    def clear(self) -> None:
        """Forget every component."""
        self.wait()
        self._pieces.clear()
        while self._files:
            os.close(self._files.popitem()[1].fd)

    def place(self, places: Sequence[Place], *, wait: bool = True) -> None:
        """Bring pieces to their tiers. wait: until they are there, and all that was begun before."""
        self._moving.append(self._mover.submit(self._place, places))
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until what was begun is done; raises what went wrong with it."""
        moving, self._moving = self._moving, []
        for move in moving:
            move.result()

    def stream(self, places: Sequence[Place]) -> Iterator[int]:
        """Yield the number of each piece while it is in the top tier, to be changed; meanwhile the next one is fetched,
        and the one before goes back to its place."""
        self.place([place._replace(tiers=self.top_alone) for place in places[:1]])
        for place, after in zip_longest(places, places[1:]):
            self.place([] if after is None else [after._replace(tiers=self.top_alone)], wait=False)
            yield place.piece
            self.wait()
            self.place([place], wait=False)
        self.wait()

    def visit(self, name: str, number: int | None, *, changed: bool = False) -> None:
        """Have a piece in the top tier (`changed` there), and the one that visited before at its place again; None:
        only that."""
        if self._guest and self._guest[0].piece == number:
            return
        places, self._guest = self._guest, []
        if number is not None:
            held = self._pieces[name][number].held
            self._guest = [Place(name, number, held)]
            places = [*places, Place(name, number, self.top_alone if changed else held | self.top_alone)]
        self.place(places)

    def speeds(self) -> dict[str, tuple[float, float]]:
        """Bytes/s (down, up) of the link above each lower tier, measured with eight pages."""
        probe, found = torch.ones(8 * PAGE, dtype=torch.uint8, device="cuda" if self._cuda else "cpu"), {}
        self.add("probe", [lambda: [probe]], len(probe))
        for tier in (["host"] if self._cuda else []) + (["disk"] if self._folder else []):
            for _ in range(2):  # the first time pages are made, and blocks of the disk assigned
                begun = time.perf_counter()
                self.place([Place("probe", 0, frozenset({tier}))])
                down, begun = time.perf_counter() - begun, time.perf_counter()
                self.place([Place("probe", 0, self.top_alone)])
                found[tier] = len(probe) / down, len(probe) / (time.perf_counter() - begun)
        self.clear()
        return found

    def _place(self, places: Sequence[Place]) -> None:
        with torch.cuda.stream(self._side) if self._cuda else nullcontext():
            freed = [self._bring(place) for place in places]
        if any(freed):
            trim(self._cuda)

    def _bring(self, place: Place) -> bool:
        """Whether this freed memory of the top tier."""
        name, tiers, piece = place.component, place.tiers, self._pieces[place.component][place.piece]
        for tier in sorted(tiers - piece.held, key=RISING.index, reverse=True):
            source = max(piece.held, key=RISING.index)
            if source == self.top:
                piece.storages = _storages(piece)
            if tier == self.top:
                for storage, nbytes in piece.storages:
                    storage.resize_(nbytes)
            self._copy(name, piece, source, tier)
            piece.held |= {tier}
        freed = self.top in piece.held - tiers
        if freed:
            for storage, _ in piece.storages:
                storage.resize_(0)
        if self._cuda and "host" in piece.held - tiers:
            self._free += piece.pages
            piece.pages = []
        piece.held = tiers
        return freed

    def _copy(self, name: str, piece: Piece, source: str, target: str) -> None:
        """Page by page; the disk works on one page while another is filled or emptied, or straight on the tensors' own
        memory where that begins at a block."""
        runs, file = piece.runs(), self._files.get(name)
        sizes = [-(-_length(run) // BLOCK) * BLOCK for run in runs]
        offsets = list(accumulate(sizes, initial=piece.slot))
        assert offsets[-1] - piece.slot <= self._sizes[name], f"{name}: a piece is larger than its slot"
        if self._side is not None:  # what was enqueued for these tensors, their allocation too, comes first
            self._side.wait_stream(torch.cuda.default_stream())
        if self._cuda and target == "host":
            piece.pages = [self._free.pop() if self._free else self._page() for _ in runs]
        pinned, by_disk = self._cuda and "host" in (source, target), "disk" in (source, target)
        pages = piece.pages if pinned else [self._room(run, k) for k, run in enumerate(runs)]

        def start(work: Callable[[torch.Tensor, int], None], k: int) -> Future[None]:
            return self._io.submit(work, pages[k][: sizes[k]], offsets[k])

        going = start(file.read, 0) if source == "disk" and runs else None
        for k, run in enumerate(runs):
            if source == "disk":
                if k + 1 < len(runs):  # memory that is not there yet would hold the read up, page by page
                    pages[k + 1][: sizes[k + 1]].zero_()
                going.result()
                going = start(file.read, k + 1) if k + 1 < len(runs) else None
            elif source == self.top:
                self._pass(run, pages[k], into_page=True, wait=by_disk)
            if target == "disk":
                if going is not None:
                    going.result()
                going = start(file.write, k)
            elif target == self.top:
                self._pass(run, pages[k], into_page=False, wait=by_disk)
        if self._side is not None:
            self._side.synchronize()
        if going is not None:
            going.result()

    def _room(self, run: Sequence[Part], k: int) -> torch.Tensor:
        """Where a run of the CPU lies for the disk: where it is, or in a buffer."""
        if not self._cuda and len(run) == 1:
            own = _bytes(run[0])
            if own.data_ptr() % BLOCK == 0 == len(own) % BLOCK and len(own):
                return own
        return self._rooms[k % 2]

    def _pass(self, run: Sequence[Part], page: torch.Tensor, *, into_page: bool, wait: bool) -> None:
        start = 0
        for part in map(_bytes, run):
            own, start = page[start : start + len(part)], start + len(part)
            if own.data_ptr() != part.data_ptr():
                (own if into_page else part).copy_(part if into_page else own, non_blocking=self._cuda)
        if wait and self._side is not None:
            self._side.synchronize()

    def _page(self) -> torch.Tensor:
        if self._cuda:
            return torch.empty(PAGE, dtype=torch.uint8, pin_memory=True)
        return torch.frombuffer(mmap.mmap(-1, PAGE), dtype=torch.uint8)


def _length(run: Sequence[Part]) -> int:
    return sum(end - start for _, start, end in run)


def _bytes(part: Part) -> torch.Tensor:
    storage, start, end = part
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[start:end]


def spread(sizes: Mapping[Any, int], most: int = 32) -> list[list[Any]]:
    """The keys in at most `most` pieces of about equal bytes, none of them empty."""
    largest = max(sizes.values(), default=0)
    pieces: list[list[Any]] = [[] for _ in range(max(1, min(most, sum(sizes.values()) // max(1, largest))))]
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        min(pieces, key=lambda piece: sum(map(sizes.__getitem__, piece))).append(key)
    return pieces


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _storages(piece: Piece) -> list[tuple[torch.UntypedStorage, int]]:
    """Each storage of its tensors once, with its bytes."""
    found = {s.data_ptr(): s for s in (local(t.detach()).untyped_storage() for t in piece.tensors()) if s.nbytes()}
    return [(storage, storage.nbytes()) for storage in found.values()]
