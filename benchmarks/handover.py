"""What a hand-over costs: every pair of layouts on the demo's model, then from 5 MB to 2 GB of weights; its memory. On
a CUDA device: one rank to one engine.

    python benchmarks/handover.py --output benchmarks/results/handover.md      10 minutes, 12 GB of memory

Beside each hand-over's milliseconds stand those of one memcpy of the same bytes in the same run, and the share that the
digests of both sides take, measured as hashing the same bytes once per sender and receiver. Memory is what a training
rank holds above its level before, sampled every millisecond, without what lies in Ray's shared memory.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.pop(0)  # this folder, whose rollout.py would hide the package of that name, in Ray's workers too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import ray
import torch

import hybrid_engine.engine as engine_module
from alignment.config import InitConfig, StageConfig, TrainConfig
from alignment.model import build_model, preset_config, save_model_dir, train_tokenizer
from benchmarks.workload import CUDA, machine_line, publish, set_environment, table
from hybrid_engine.train_worker import TrainWorker
from rollout.config import RolloutConfig
from rollout.weights import Piece, device_digests, digest

MIB = 2**20
SIZES = {
    "5 MB": {},
    "60 MB": {"hidden_size": 256, "num_hidden_layers": 6, "n_routed_experts": 16, "moe_intermediate_size": 256},
    "500 MB": {"hidden_size": 512, "num_hidden_layers": 9, "n_routed_experts": 32, "moe_intermediate_size": 320},
    "1 GB": {"hidden_size": 1024, "num_hidden_layers": 9, "n_routed_experts": 32, "moe_intermediate_size": 320},
    "2 GB": {"hidden_size": 1024, "num_hidden_layers": 9, "n_routed_experts": 64, "moe_intermediate_size": 320},
}
"""Changes to the nano preset; weights in float32."""
TRAIN = {"1 rank": {}, "shard 2, expert 2": {"shard": 2, "expert": 2}, "shard 4, expert 2": {"shard": 4, "expert": 2}}
ROLLOUT = {
    "1 engine": {},
    "2 replicas": {"replicas": 2},
    "TP 2": {"tensor": 2},
    "TP 2 + EP": {"tensor": 2, "expert": True},
    "DP 2 + EP": {"data": 2, "expert": True},
}
PAIRS = [
    ("1 rank", "1 engine", "5 MB"),
    *(("shard 2, expert 2", rollout, "5 MB") for rollout in ROLLOUT),
    ("shard 4, expert 2", "TP 2 + EP", "5 MB"),
    *(("1 rank", "1 engine", size) for size in ("60 MB", "500 MB", "2 GB")),
    *(("shard 2, expert 2", "TP 2 + EP", size) for size in ("60 MB", "500 MB", "2 GB")),
    ("shard 4, expert 2", "1 engine", "1 GB"),
]


class MeasuredRank(TrainWorker):
    """A training rank that watches its own memory."""

    def load(self, *arguments):
        with _Peak() as peak:
            buckets = super().load(*arguments)
        self._found = {"loading": peak.above, "held": _private_bytes() - peak.before}
        return buckets

    def pack(self, version, bucket):
        if bucket == 0:
            self._peak = _Peak().__enter__()
        super().pack(version, bucket)

    def canary(self, prompts):
        self._peak.__exit__()
        # The first one's stays: it also makes the buffer that the others use again.
        self._found["hand-over"] = max(self._peak.above, self._found.get("hand-over", 0))
        return super().canary(prompts)

    def found(self) -> dict[str, int]:
        """Bytes: highest while loading and while handing over, and what stays after loading."""
        return self._found


class _Peak:
    """The most private memory inside the block, above what it began with, in bytes."""

    def __enter__(self):
        self.before = self._most = _private_bytes()
        self._running = True
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception):
        self._running = False
        self._thread.join()

    @property
    def above(self) -> int:
        return self._most - self.before

    def _watch(self):
        while self._running:
            self._most = max(self._most, _private_bytes())
            time.sleep(0.001)


def _private_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def model_dir(folder: Path, size: str) -> Path:
    """A DeepSeek-V2 with random weights and a tokenizer, made once."""
    path = folder / size.replace(" ", "")
    if not path.is_dir():
        init = InitConfig(vocab_size=512)
        tokenizer = train_tokenizer(init, [f"{n} + {n} = {2 * n}" for n in range(100)])
        config = preset_config(init, tokenizer)
        config.update(SIZES[size])
        save_model_dir(build_model(config), tokenizer, path)
    return path


def copy_and_hash(nbytes: int) -> tuple[Callable[[], object], Callable[[], object]]:
    """What copies so many bytes once where buckets are packed, and what digests them."""
    if not CUDA:
        source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
        return lambda: np.copyto(target, source), lambda: digest(source)
    here = torch.ones(nbytes, dtype=torch.uint8, device="cuda")
    there, piece = torch.empty_like(here), Piece("all", "uint8", (nbytes,), (0,), (nbytes,), 0, nbytes)
    return lambda: (there.copy_(here), torch.cuda.synchronize()), lambda: device_digests(here, [piece])


def median_ms(call, rounds: int) -> float:
    """Of `rounds` calls after a first one that is not counted."""
    seconds = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begun)
    return 1000 * statistics.median(seconds[1:])


def measure(path: Path, train: str, rollout: str, rounds: int, bucket_mb: int) -> tuple[list[str], list[int]]:
    """A line of the table, and the ranks' memory in bytes: (shard held, loading, hand-over) of the highest."""
    kind = {"dtype": "bfloat16"} if CUDA else {}
    engines = RolloutConfig(max_length=64, max_num_seqs=8, memory=0.1, bucket_mb=bucket_mb, **ROLLOUT[rollout], **kind)
    engine = engine_module.HybridEngine(path, TrainConfig(**TRAIN[train]), engines, seed=0)
    try:
        engine.load(path, path, StageConfig())
        taken = []
        for _ in range(rounds + 1):
            engine._hand_over()
            taken.append(engine.take_metrics())
        memory = ray.get([rank.found.remote() for rank in engine._ranks.values()])
    finally:
        engine.close()
    milliseconds, canary = (
        1000 * statistics.median(t[f"time/{name}"] for t in taken[1:]) for name in ("handover", "canary")
    )
    nbytes = int(taken[0]["handover/bytes"])
    copy, hash_ = copy_and_hash(nbytes)
    memcpy = median_ms(copy, rounds)
    # The ranks of each side hash their parts at the same time; every rollout rank hashes what it receives.
    hashing = 2 * median_ms(hash_, rounds)
    cells = [f"{train} -> {rollout}", f"{nbytes / MIB:,.1f}", f"{milliseconds:,.1f}", f"{canary:,.1f}"]
    cells += [f"{milliseconds / memcpy:,.1f}", f"{100 * hashing / milliseconds:.1f}%"]
    return cells, [max(rank[name] for rank in memory) for name in ("held", "loading", "hand-over")]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="hand-overs of each pair that count")
    parser.add_argument("--largest", default="2 GB", choices=list(SIZES), help="leave out larger models")
    parser.add_argument("--bucket-mb", type=int, default=64, help="rollout.bucket_mb")
    parser.add_argument("--output", type=Path, help="append the report to this Markdown file")
    args = parser.parse_args()
    set_environment()
    engine_module.TrainWorker = MeasuredRank
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sizes = list(SIZES)
    rows, memory = [], []
    with tempfile.TemporaryDirectory() as folder:
        for train, rollout, size in PAIRS:
            several = train != "1 rank" or rollout != "1 engine"
            if sizes.index(size) <= sizes.index(args.largest) and not (CUDA and several):
                cells, found = measure(model_dir(Path(folder), size), train, rollout, args.rounds, args.bucket_mb)
                rows.append(cells)
                found = found if not CUDA else [0, 0, 0]  # buckets lie on the device: this is the host's
                memory.append([f"{train} -> {rollout}", size, *(f"{value / MIB:,.1f}" for value in found)])
                print(" | ".join(cells), *memory[-1][2:], file=sys.stderr)
    header = ["layouts", "MiB", "ms", "canary beyond it, ms", "of one memcpy", "digests, both sides"]
    peaks = ["layouts", "weights", "held after loading, MiB", "highest while loading", "highest while handing over"]
    text = f"{machine_line()}\n\nbucket_mb {args.bucket_mb}, medians of {args.rounds}\n\n{table(header, rows)}\n\n"
    text += f"Memory of the training rank with the most of it:\n\n{table(peaks, memory)}\n"
    publish("Hand-overs", text, args.output)


if __name__ == "__main__":
    main()
