"""Moves the tensors of one process between tiers, and frees for true what they leave.

The top tier is where tensors live: `device` on CUDA, `host` on the CPU. Below it are, on CUDA, pinned pages of `host`,
and on both a file on `disk`, with direct I/O: the page cache would otherwise keep in memory what was moved out of it.
"""

import ctypes
import errno
import mmap
import os
import shutil
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

from rollout.vllm.sleep import trim

PAGE, BLOCK = 2**24, 4096
"""Bytes that move at a time, and what direct I/O wants sizes, offsets and addresses to be multiples of."""
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


class DiskError(OSError):
    """The disk cannot be used, or is full."""


@dataclass(slots=True)
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
            for start in range(0, nbytes, PAGE):
                part = storage, start, min(nbytes, start + PAGE)
                if nbytes >= LARGE or _length(runs[-1]) + nbytes > PAGE or (runs[-1] and runs[-1][0][2] >= LARGE):
                    runs.append([])
                runs[-1].append(part)
        return [run for run in runs if run]


class File:
    """`size` bytes on the disk that vanish with the process. Raises DiskError where they cannot be had."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600)
            os.posix_fallocate(self.fd, 0, max(size, BLOCK))
        except OSError as error:
            free = f", {shutil.disk_usage(folder).free / 2**30:.2f} GiB are free" if folder.is_dir() else ""
            raise DiskError(
                error.errno, f"memory.disk: {folder}: {error.strerror}; {size / 2**30:.2f} GiB are needed{free}"
            ) from error

    def write(self, page: torch.Tensor, offset: int) -> None:
        """Write a page, or the first blocks of one."""
        try:
            if os.pwrite(self.fd, _memory(page), offset) < len(page):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise DiskError(error.errno, f"memory.disk: {self.folder}: {error.strerror}, while writing") from error

    def read(self, page: torch.Tensor, offset: int) -> None:
        """Read into a page, or the first blocks of one."""
        if os.preadv(self.fd, [_memory(page)], offset) < len(page):
            raise DiskError(errno.EIO, f"memory.disk: {self.folder}: it holds less than was written")


class Offloader:
    """One process's pieces, by component. Moves run one after the other, in a thread of their own."""

    def __init__(self, device: torch.device, folder: Path | None) -> None:
        self._cuda, self._folder = device.type == "cuda", folder
        self.top = "device" if self._cuda else "host"
        self.top_alone = frozenset({self.top})
        self._pieces: dict[str, list[Piece]] = {}
        self._sizes: dict[str, int] = {}
        self._files: dict[str, File] = {}
        self._free: list[torch.Tensor] = []
        self._side = torch.cuda.Stream(device) if self._cuda else None
        self._rooms = [self._page(), self._page()]
        self._mover, self._io = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._moving: list[Future[Any]] = []

    def add(self, name: str, pieces: Sequence[Tensors], nbytes: int) -> None:
        """A component, all of it in the top tier; nbytes: at most, of a piece, and a block more for each tensor."""
        slot = (-(-nbytes // BLOCK) + 1) * BLOCK
        self._sizes[name] = len(pieces) * slot
        self._pieces[name] = [Piece(tensors, self.top_alone, i * slot) for i, tensors in enumerate(pieces)]

    def clear(self) -> None:
        """Forget every component."""
        self.wait()
        self._pieces.clear()
        while self._files:
            os.close(self._files.popitem()[1].fd)

    def reserve(self, name: str) -> None:
        """Take the room on the disk that a component will need. Raises DiskError."""
        if name not in self._files:
            self._files[name] = File(self._folder, self._sizes[name])

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

    def stream(self, name: str, numbers: Sequence[int], below: frozenset[str]) -> Iterator[int]:
        """Yield each number while its piece is in the top tier, to be changed; meanwhile the next one is fetched, and
        the one before goes back to the tiers `below`."""
        self.place([Place(name, number, self.top_alone) for number in numbers[:1]])
        for number, after in zip_longest(numbers, numbers[1:]):
            self.place([] if after is None else [Place(name, after, self.top_alone)], wait=False)
            yield number
            self.wait()
            self.place([Place(name, number, below)], wait=False)
        self.wait()

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
            freed = [self._bring(self._pieces[p.component][p.piece], p.component, p.tiers) for p in places]
        if any(freed):
            trim(self._cuda)

    def _bring(self, piece: Piece, name: str, tiers: frozenset[str]) -> bool:
        """Whether this freed memory of the top tier."""
        for tier in sorted(tiers - piece.held, key=RISING.index, reverse=True):
            source = max(piece.held, key=RISING.index)
            if source == self.top:
                piece.storages = _storages(piece)
            if tier == self.top:
                for storage, nbytes in piece.storages:
                    storage.resize_(nbytes)
            if tier == "disk":
                self.reserve(name)
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
        most = self._sizes[name] // len(self._pieces[name])
        assert offsets[-1] - piece.slot <= most, f"{name}: a piece is larger than its slot"
        if self._side is not None:  # what was enqueued for these tensors, their allocation too, comes first
            self._side.wait_stream(torch.cuda.default_stream())
        if self._cuda and target == "host":
            piece.pages = [self._free.pop() if self._free else self._page() for _ in runs]
        pinned = self._cuda and "host" in (source, target)
        pages = piece.pages if pinned else [self._room(run, k) for k, run in enumerate(runs)]

        def start(work: Callable[[torch.Tensor, int], None], k: int) -> Future[None]:
            return self._io.submit(work, pages[k][: sizes[k]], offsets[k])

        going = start(file.read, 0) if source == "disk" and runs else None
        for k, run in enumerate(runs):
            if source == "disk":
                going.result()
                going = start(file.read, k + 1) if k + 1 < len(runs) else None
            elif source == self.top:
                self._pass(run, pages[k], into_page=True)
            if target == "disk":
                if going is not None:
                    going.result()
                going = start(file.write, k)
            elif target == self.top:
                self._pass(run, pages[k], into_page=False)
        if going is not None:
            going.result()

    def _room(self, run: Sequence[Part], k: int) -> torch.Tensor:
        """Where a run of the CPU lies for the disk: where it is, or in a buffer."""
        if not self._cuda and len(run) == 1:
            own = _bytes(run[0])
            if own.data_ptr() % BLOCK == 0 == len(own) % BLOCK and len(own):
                return own
        return self._rooms[k % 2]

    def _pass(self, run: Sequence[Part], page: torch.Tensor, *, into_page: bool) -> None:
        start = 0
        for part in map(_bytes, run):
            own, start = page[start : start + len(part)], start + len(part)
            if own.data_ptr() != part.data_ptr():
                (own if into_page else part).copy_(part if into_page else own, non_blocking=self._cuda)
        if self._side is not None:
            self._side.synchronize()

    def _page(self) -> torch.Tensor:
        if self._cuda:
            return torch.empty(PAGE, dtype=torch.uint8, pin_memory=True)
        return torch.frombuffer(mmap.mmap(-1, PAGE), dtype=torch.uint8)


def _memory(page: torch.Tensor) -> ctypes.Array[ctypes.c_char]:
    """The bytes themselves; `page.numpy()` would fix the size of its storage for good."""
    return (ctypes.c_char * len(page)).from_address(page.data_ptr())


def _length(run: Sequence[Part]) -> int:
    return sum(end - start for _, start, end in run)


def _bytes(part: Part) -> torch.Tensor:
    storage, start, end = part
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)[start:end]


def spread(sizes: Mapping[Any, int], most: int = 8) -> list[list[Any]]:
    """The keys in at most `most` pieces of about equal bytes, none of them empty."""
    largest = max(sizes.values(), default=0)
    count = max(1, min(most, sum(sizes.values()) // max(1, largest)))
    pieces: list[list[Any]] = [[] for _ in range(count)]
    totals = [0] * count
    for key in sorted(sizes, key=sizes.__getitem__, reverse=True):
        least = totals.index(min(totals))
        pieces[least].append(key)
        totals[least] += sizes[key]
    return pieces


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _storages(piece: Piece) -> list[tuple[torch.UntypedStorage, int]]:
    """Each storage of its tensors once, with its bytes."""
    found = {s.data_ptr(): s for s in (local(t.detach()).untyped_storage() for t in piece.tensors()) if s.nbytes()}
    return [(storage, storage.nbytes()) for storage in found.values()]
