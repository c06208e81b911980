"""Offloading on this machine: speed against the medium's, the cost of a step, and a model that does not fit its budget.

    python benchmarks/offload.py [--disk FOLDER] [--mb 1024]                       pinned memory and the disk alone
    python benchmarks/offload.py --step 5.3GiB [--millions 100] [--steps 4]        GRPO steps within 5.3 GiB

The second runs the same steps without a budget (of the device where there is one, else of the host), with it, and with
everything moved at every phase.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from statistics import median
from unittest.mock import patch

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # as `offload.ALIGNED`

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoModelForCausalLM, DeepseekV2Config, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from alignment.config import GRPOConfig, TrainConfig
from alignment.grpo import grpo
from hybrid_engine.disk import File
from hybrid_engine.engine import HybridEngine
from hybrid_engine.offload import PAGE, Offloader, Place
from hybrid_engine.phases import GIB, Budget, Residency
from rollout.config import RolloutConfig, memory_bytes
from rollout.prompts import Stream
from rollout.sampler import Sampling
from rollout.types import Prompt, Scores

HOST, DISK = frozenset({"host"}), frozenset({"disk"})
CUDA = torch.cuda.is_available()


def medium(folder: Path, mb: int, rounds: int = 5) -> dict[str, tuple[float, float]]:
    """Way -> (bytes/s of the medium, of tensors that leave and come back). Of the disk: direct I/O from and into a
    buffer, page by page; of a device's link: a copy from and into pinned memory, whole."""
    device = torch.device("cuda" if CUDA else "cpu")
    pages = mb * 2**20 // PAGE
    file, offloader = File(folder, pages * PAGE), Offloader(device, folder)
    page, tensors = offloader._page(), [torch.randn(PAGE // 4, device=device) for _ in range(pages)]
    offloader.add("probe", [lambda: tensors], pages * PAGE)
    moves: dict[str, list[Callable[[], object]]] = {
        "down to the disk": [lambda: [file.write(page, k * PAGE) for k in range(pages)],
                             lambda: offloader.place([Place("probe", 0, DISK)])],
        "up from the disk": [lambda: [file.read(page, k * PAGE) for k in range(pages)],
                             lambda: offloader.place([Place("probe", 0, offloader.top_alone)])],
    }  # fmt: skip
    if CUDA:
        here, there = (torch.ones(pages * PAGE, dtype=torch.uint8) for _ in range(2))
        here, there = here.pin_memory(), there.cuda()
        moves |= {
            "down to the host": [lambda: here.copy_(there), lambda: offloader.place([Place("probe", 0, HOST)])],
            "up from the host": [lambda: (there.copy_(here), torch.cuda.synchronize()), moves["up from the disk"][1]],
        }
    seconds: dict[str, list[list[float]]] = {way: [[], []] for way in moves}
    for _ in range(rounds + 1):
        for way, pair in moves.items():
            for number, move in enumerate(pair):
                begun = time.perf_counter()
                move()
                seconds[way][number].append(time.perf_counter() - begun)
    rates = {way: [pages * PAGE / median(times[1:]) for times in both] for way, both in seconds.items()}
    return {way: (raw, moved) for way, (raw, moved) in rates.items()}


def make_model(folder: Path, millions: float) -> Path:
    """A DeepSeek-V2 of about so many million parameters, and a tokenizer."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["0123456789 plus is"] * 100, 300, special_tokens=["<pad>", "<eos>"], show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        folder
    )
    width = int(512 * (millions / 102) ** 0.5 / 64 + 0.5) * 64
    config = DeepseekV2Config(
        vocab_size=330, hidden_size=width, intermediate_size=3 * width, moe_intermediate_size=width,
        num_hidden_layers=10, num_attention_heads=8, num_key_value_heads=8, n_shared_experts=1, n_routed_experts=12,
        num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=None, qk_rope_head_dim=64,
        kv_lora_rank=512 if CUDA else 128, qk_nope_head_dim=32, v_head_dim=32, topk_method="greedy", n_group=1,
        topk_group=1, norm_topk_prob=False,
        max_position_embeddings=512, eos_token_id=1, bos_token_id=None, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters")
    model.save_pretrained(folder)
    return folder


class EvenTokens:
    """The share of even token ids."""

    def submit(self, groups, trainer_state):
        future: Future = Future()
        future.set_result([
            Scores(np.array([(c.token_ids % 2 == 0).mean() for c in group.completions]), {}, {}) for group in groups
        ])  # fmt: skip
        return future

    def close(self) -> None:
        return None


def steps(model: Path, count: int, budget: Budget | None, kv: float = 1.5) -> Iterator[dict[str, float]]:
    """Metrics of GRPO steps with a reference; last, under "parts", the GiB of all components together."""
    config = GRPOConfig(
        prompts={"path": "x"}, rewards=[{"function": "m:f"}], steps=count, prompts_per_step=4, completions=4,
        max_new_tokens=6, learning_rate=1e-5, kl=0.02,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, "", rng.integers(5, 300, rng.integers(3, 40)).astype(np.int32), {}) for i in range(8)]
    kind = {"memory": kv}
    if CUDA:
        kind = {"memory": 6.4 * GIB / torch.cuda.get_device_properties(0).total_memory, "dtype": "bfloat16"}
    rollout = RolloutConfig(max_length=96, max_num_seqs=64, bucket_mb=32, **kind)
    engine = HybridEngine(model, TrainConfig(tokens_per_rank=1024), rollout, seed=0, budget=budget)
    try:
        engine.load(model, model, config, model)
        sampling = Sampling(config.completions, config.max_new_tokens, config.temperature, seed=0)
        begun = time.perf_counter()
        for done in grpo(engine, Stream(prompts, 4, seed=0), config, sampling, EvenTokens(), 1):
            yield done.metrics | engine.take_metrics() | {"time/step": time.perf_counter() - begun}
            begun = time.perf_counter()
        if budget is not None:
            held = engine._memory.residency._held
            yield {"parts": sum(h.component.bytes for name, h in held.items() if not name.startswith("work")) / GIB}
    finally:
        engine.close()


def move_all(residency: Residency, phase: str) -> list[list[Place]]:
    """The schedule of whoever thinks of none: what a phase does not need is moved out of its way."""
    if residency._schedule is None:
        residency._solve()
    return residency.only([name for name, held in residency._held.items() if phase in held.component.needed_in], phase)


def equal(a: dict[str, float], b: dict[str, float]) -> bool:
    """Whether two steps' metrics are the same, timings and memory aside."""
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in (a, b)]
    return kept[0] == kept[1]


def compare(folder: Path, disk: Path, room: int, millions: float, count: int, naively: bool) -> None:
    """Print what a budget costs, and whether it is kept."""
    model = make_model(folder, millions)
    budget = Budget(room, None, disk, print) if CUDA else Budget(None, room, disk, print)
    free = list(steps(model, count, None))
    *kept, last = steps(model, count, budget)
    naive = [None] * count
    if naively:
        with patch.object(Residency, "enter", move_all):
            *naive, _ = steps(model, count, Budget(None, None, disk, print))  # without streaming it may need more
    parts = last["parts"]
    print(f"parts {parts:.2f} GiB, {parts * GIB / room:.2f} x the budget of {room / GIB:.2f} GiB")
    for i, (one, two, three) in enumerate(zip(free, kept, naive, strict=True), 1):
        error = two["memory/measured"] / two["memory/predicted"] - 1
        shares = [
            f"{row['time/step']:.2f} s ({row['time/offload'] / row['time/step']:.0%} moving)" if row else "unknown"
            for row in (two, three)
        ]
        print(
            f"step {i}: {one['time/step']:.2f} s without a budget, {shares[0]} with it, {shares[1]} with all moved; "
            f"metrics {'equal' if equal(one, two) else 'DIFFER'} (gradient's norm {one['grad_norm']:.9g}, "
            f"{two['grad_norm']:.9g}); "
            f"peak {two['memory/measured']:.2f} GiB, {error:+.1%} of the predicted"
        )


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--disk", type=Path, default=Path("scratch"))
    parser.add_argument("--mb", type=int, default=1024)
    parser.add_argument("--step", type=memory_bytes)
    parser.add_argument("--millions", type=float, default=102)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--all-moved", action=argparse.BooleanOptionalAction, default=True, help="the third run, too")
    given = parser.parse_args()
    if given.step:
        with tempfile.TemporaryDirectory() as folder:
            compare(Path(folder), given.disk.resolve(), given.step, given.millions, given.steps, given.all_moved)
    else:
        for way, (raw, moved) in medium(given.disk.resolve(), given.mb).items():
            print(f"{way}: {moved / 1e6:.0f} MB/s, {moved / raw:.0%} of the medium's {raw / 1e6:.0f} MB/s")


if __name__ == "__main__":
    main()
