"""Tensors that leave memory for true and come back bit for bit: on the CPU, and CUDA's logic with a fake device."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from hybrid_engine.disk import BLOCK, DiskError, File
from hybrid_engine.offload import ALIGNED, PAGE, Offloader, Place, spread
from rollout.vllm.sleep import TAGS, Sleep

CPU = torch.device("cpu")
TOP, DISK, BOTH = frozenset({"host"}), frozenset({"disk"}), frozenset({"host", "disk"})


def resident() -> int:
    return psutil.Process().memory_full_info().pss


def sums(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def random_tensors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    """Of odd sizes, of several types, one a view of another's storage."""
    made = [torch.randn(shape) for shape in shapes]
    return [*made, made[0].to(torch.bfloat16), torch.arange(1001), made[0][1:], torch.empty(0)]


def test_what_leaves_frees_memory_and_comes_back_bit_for_bit_at_the_same_objects(tmp_path: Path) -> None:
    tensors = random_tensors((4099, 2053), (17,), (3001, 4001), (1, 1))  # 84 MB, several pages and a rest
    before, addresses = sums(tensors), [id(tensor) for tensor in tensors]
    expected = sum(t.untyped_storage().nbytes() for t in tensors[:6])
    moved = Offloader(CPU, tmp_path)
    moved.add("p", [lambda: tensors], expected + 10 * BLOCK)
    full = resident()
    moved.place([Place("p", 0, DISK)])
    assert full - resident() > 0.95 * expected - 3 * PAGE
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
    assert not list(tmp_path.iterdir())  # the file has no name, and vanishes with the process
    moved.place([Place("p", 0, TOP)])
    assert full - resident() < 0.1 * expected + 3 * PAGE
    assert [id(tensor) for tensor in tensors] == addresses
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    assert tensors[6].data_ptr() == tensors[0][1:].data_ptr()  # views are views again


def test_memory_that_begins_at_a_block_goes_to_the_disk_as_it_is(tmp_path: Path) -> None:
    """As torch allocates it in a process with `ALIGNED`."""
    code = f"""
import torch
from pathlib import Path
from hybrid_engine.offload import PAGE, Offloader, Place
from hybrid_engine.disk import BLOCK
tensors = [torch.randn(PAGE // 2), torch.randn(PAGE // 4 + 1), torch.randn(7)]
before, moved, copied = [t.clone() for t in tensors], Offloader(torch.device("cpu"), Path("{tmp_path}")), []
copy_ = torch.Tensor.copy_
torch.Tensor.copy_ = lambda self, other, **options: (copied.append(self.numel()), copy_(self, other, **options))[1]
assert all(t.data_ptr() % BLOCK == 0 for t in tensors[:2])
moved.add("p", [lambda: tensors], 4 * PAGE)
for tier in ("disk", "host", "disk", "host"):
    moved.place([Place("p", 0, frozenset([tier]))])
    assert (tensors[0].untyped_storage().nbytes() > 0) == (tier == "host")
assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
assert max(copied) == 28, copied  # only the rests: 4 and 28 bytes
"""
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **ALIGNED}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_copy_kept_below_is_dropped_or_read_and_never_written_twice(tmp_path: Path, monkeypatch) -> None:
    written: list[int] = []
    write = File.write
    monkeypatch.setattr(File, "write", lambda self, page, at: (written.append(at), write(self, page, at))[1])
    tensors = [torch.randn(3 * PAGE // 4) for _ in range(3)]
    before = sums(tensors)
    moved = Offloader(CPU, tmp_path)
    moved.add("p", [lambda t=t: [t] for t in tensors], 3 * PAGE)
    moved.place([Place("p", 1, BOTH)], wait=False)  # as in the background of a phase that only reads it
    moved.wait()
    assert len(written) == 3 and min(written) == 3 * PAGE + BLOCK  # its own slot
    moved.place([Place("p", 1, DISK), Place("p", 1, TOP), Place("p", 0, DISK), Place("p", 2, DISK)])
    moved.place([Place("p", number, TOP) for number in range(3)])
    assert len(written) == 9
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_streamed_optimizer_steps_equal_one_step_and_hold_two_pieces_at_most(tmp_path: Path) -> None:
    torch.manual_seed(0)
    models = [[torch.nn.Parameter(torch.ones(300, 70 + i)) for i in range(5)] for _ in range(2)]
    optimizers = [torch.optim.AdamW(parameters, lr=0.01) for parameters in models]
    moved, state = Offloader(CPU, tmp_path), optimizers[1].state
    moved.add(
        "o", [lambda p=p: [v for v in state[p].values() if v.ndim] if p in state else [] for p in models[1]], 2**20
    )
    moved.place([Place("o", number, DISK) for number in range(5)])

    def here() -> list[int]:
        return [i for i, p in enumerate(models[1]) if p in state and state[p]["exp_avg"].untyped_storage().nbytes()]

    for _ in range(3):
        gradients = [torch.randn_like(p) for p in models[0]]
        for parameters in models:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient.clone()
        optimizers[0].step()
        for number in moved.stream([Place("o", number, DISK) for number in range(5)]):
            assert len(here()) <= 2  # this one and the next
            optimizers[1].param_groups[0]["params"] = [models[1][number]]
            optimizers[1].step()
        assert here() == []
    assert all(torch.equal(a, b) for a, b in zip(*models, strict=True))


def test_an_error_while_moving_in_the_background_is_raised_at_the_next_move(tmp_path: Path, monkeypatch) -> None:
    tensor = torch.randn(PAGE)
    moved = Offloader(CPU, tmp_path)
    moved.add("p", [lambda: [tensor]], 4 * PAGE)
    monkeypatch.setattr(os, "pwrite", _full)
    moved.place([Place("p", 0, DISK)], wait=False)
    with pytest.raises(DiskError, match=f"memory.disk: {tmp_path}: No space left on device, while writing") as error:
        moved.place([])
    assert error.value.errno == errno.ENOSPC
    assert tensor.untyped_storage().nbytes() == 4 * PAGE  # what could not be written is still here


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_write_that_stops_half_way_is_a_full_disk(tmp_path: Path, monkeypatch) -> None:
    tensor = torch.randn(PAGE)
    moved = Offloader(CPU, tmp_path)
    moved.add("p", [lambda: [tensor]], 4 * PAGE)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, memoryview(data)[: len(data) // 2], at))
    with pytest.raises(DiskError, match="No space left on device"):
        moved.place([Place("p", 0, DISK)])


def test_a_disk_that_cannot_be_used_or_is_too_small_is_said_before_anything_moves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder, size, message in (
        (tmp_path / "file" / "scratch", 1, "Not a directory; 0.00 GiB are needed"),
        (
            tmp_path,
            2**50,
            r"(No space left on device|File too large); 1048576.00 GiB are needed, \d+\.\d\d GiB are free",
        ),
        (Path("/proc/self"), 1, "memory.disk: /proc/self: "),
    ):
        moved = Offloader(CPU, folder)
        with pytest.raises(DiskError, match=message):
            moved.add("p", [list], size)


def test_shards_of_fsdp_leave_and_come_back(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 3))
        fully_shard(model[0])
        fully_shard(model)
        inputs, moved = torch.randn(5, 64), Offloader(CPU, tmp_path)
        expected = model(inputs).detach()
        model[0].reshard(), model.reshard()
        moved.add("p", [lambda: list(model.parameters())], 2**20)
        moved.place([Place("p", 0, DISK)])
        assert all(p.to_local().untyped_storage().nbytes() == 0 for p in model.parameters())
        moved.place([Place("p", 0, TOP)])
        assert torch.equal(model(inputs), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_pieces_are_about_equal_and_none_is_empty() -> None:
    assert spread({}) == [[]]
    assert spread({"a": 100, "b": 1}) == [["a", "b"]]
    sizes = {i: 5 + i % 7 for i in range(100)}
    pieces = spread(sizes)
    totals = [sum(sizes[i] for i in piece) for piece in pieces]
    assert len(pieces) == 32 and sorted(i for piece in pieces for i in piece) == list(range(100))
    assert max(totals) - min(totals) <= 11


# -- CUDA, with streams and pinned memory that record what is done with them ----------------------------------------


class FakeStream:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def wait_stream(self, other: object) -> None:
        self.log.append("wait")

    def synchronize(self) -> None:
        self.log.append("synchronize")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What happens on the side stream; "device" memory is ordinary memory."""
    log: list[str] = []
    empty = torch.empty

    def pinned(*shape: int, pin_memory: bool = False, **options: object) -> torch.Tensor:
        if not pin_memory:
            return empty(*shape, **options)
        log.append("pin")
        return torch.frombuffer(mmap.mmap(-1, shape[0]), dtype=torch.uint8)  # at a page's start, as if pinned

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: log.append(f"empty {threading.current_thread().name}"))
    monkeypatch.setattr(torch, "empty", pinned)
    return log


def test_pinned_pages_are_made_once_and_copies_wait_for_the_work_before_and_end_before_memory_is_freed(
    cuda: list[str], tmp_path: Path
) -> None:
    tensors = [torch.randn(PAGE // 2), torch.randn(PAGE // 4 + 5)]  # two pages; one, and a rest
    before = sums(tensors)
    moved = Offloader(torch.device("cuda"), tmp_path)
    moved.add("p", [lambda t=t: [t] for t in tensors], 2 * PAGE)
    device, host, disk = (frozenset({tier}) for tier in ("device", "host", "disk"))
    del cuda[:]
    for number in (0, 1, 0, 1):
        moved.place([Place("p", number, host)])
        assert tensors[number].untyped_storage().nbytes() == 0
        moved.place([Place("p", number, device)])
    assert (cuda[0], cuda.count("pin"), cuda.count("synchronize")) == ("wait", 2, 8)  # pages come again; a wait a move
    moved.place([Place("p", 0, host | disk), Place("p", 1, host)])
    moved.place([Place("p", 0, disk), Place("p", 1, disk)])
    assert cuda.count("pin") == 4
    moved.place([Place("p", 0, host), Place("p", 1, device)])
    moved.place([Place("p", 0, device)])
    assert cuda.count("pin") == 4
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
    for i, event in enumerate(cuda):  # nothing is freed while a copy may run: the last thing was to wait for it
        if event.startswith("empty"):
            assert "wait" not in cuda[:i] or cuda[:i][::-1].index("synchronize") < cuda[:i][::-1].index("wait")
    for target in (disk, device):  # two pages in turn: each is copied before the disk, or another, has it
        del cuda[:]
        moved.place([Place("p", 0, target)])
        assert cuda.count("synchronize") == 3


class FakeLlm:
    """vLLM's sleep mode by its executors' rules: from 0.32 on it is asleep whose weights are, before whoever sleeps in
    part; a model with two parameters, and a cache."""

    def __init__(self, version: tuple[int, int]) -> None:
        self.version, self.asleep, self.saved = version, set[str](), False
        self.model, self.kv_caches = torch.nn.Linear(10, 10), [torch.zeros(300)]

    def collective_rpc(self, function):
        class Worker:
            model_runner = self

        return [function(Worker)]

    def sleep(self, level: int) -> None:
        assert level == 2 and not self.asleep, "vLLM warns, and frees nothing"
        self.asleep, self.saved = {"weights", "kv_cache"}, True

    def wake_up(self, tags: list[str]) -> None:
        assert self.asleep.issuperset(tags), "vLLM warns, and wakes nothing"
        self.asleep -= set(tags)
        if self.saved and (self.version < (0, 32) or "weights" in tags):
            assert "weights" not in self.asleep, "buffers are written to memory that is not there"
            self.saved = False


@pytest.mark.parametrize("version", [(0, 25), (0, 32)])
@pytest.mark.parametrize("last", [{"weights"}, {"KV cache"}, set(), {"weights", "KV cache"}])
def test_on_cuda_vllm_sleeps_and_wakes_in_stages(version: tuple[int, int], last: set[str]) -> None:
    llm = FakeLlm(version)
    sleep = Sleep(llm, "cuda")
    assert sleep.give_up() == {"weights": 440, "KV cache": 1200} and llm.asleep == {"weights", "kv_cache"}
    for before in ({"weights"}, {"weights", "KV cache"}, {"KV cache"}, {"weights"}, {"weights", "KV cache"}):
        held = sleep.hold(before)
        assert held is (before == {"KV cache"})  # level 2 keeps nothing: the next hand-over fills it again
        expected = set() if before == {"KV cache"} else {TAGS[name] for name in before}
        assert llm.asleep == set(TAGS.values()) - expected
    sleep.hold(last)
    assert ("weights" in llm.asleep) is ("weights" not in last)
    assert ("kv_cache" in llm.asleep) is (last != {"weights", "KV cache"})
    assert llm.kv_caches[0].untyped_storage().nbytes() == 1200  # vLLM's own business
