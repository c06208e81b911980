"""Is the plan true? Its seconds against published runs, and its peak memory against what this machine measures.

    python benchmarks/plan.py published
    python benchmarks/plan.py memory --output benchmarks/results/plan.md

`published`: GRPO runs of NeMo-RL 0.4 on DGX-H100, on-policy, from its documentation (docs/about/performance-summary.md,
github.com/NVIDIA-NeMo/RL, with the recipes under examples/configs/recipes/llm/performance): model, GPUs, completions a
step, average length, tensor parallelism of generation, seconds of a step. The prediction is for this project's own
layouts (FSDP2 and expert parallelism instead of Megatron's), whose step does the same work: log-probabilities of the
policy and of the reference, four updates (one where the batch is 512).

`memory`: a MoE and a dense model of 100 million parameters in eight layouts, each in an engine as a run has it: a
hand-over, completions of full length, the reference, an update, twice. Measured is the proportional set size of all
processes of the run, ten times a second; predicted is the plan's peak where nothing is moved. The KV cache is small
enough for two steps to touch all of it: what was never written takes no memory.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder, whose rollout.py would hide the package of that name, in Ray's workers too
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from alignment.config import GRPOConfig, InitConfig, TrainConfig
from alignment.grpo import grpo
from alignment.model import build_model, preset_config, save_model_dir, train_tokenizer
from benchmarks.workload import machine_line, publish, table
from hybrid_engine.cluster import GIB, cluster
from hybrid_engine.engine import HybridEngine
from hybrid_engine.footprint import model_of
from hybrid_engine.forecast import Work
from hybrid_engine.memory import used_by_processes
from hybrid_engine.prospect import prospect
from rewards.config import RewardConfig
from rollout.config import DataConfig, RolloutConfig
from rollout.sampler import Sampling
from rollout.types import Prompt, Scores
from rollout.vllm.sleep import trim

PROMPT = 150
"""Tokens of an OpenMathInstruct-2 problem in its template, about; the page gives the sum with the completion."""
MOE = {"num_experts": 128, "num_experts_per_tok": 8, "head_dim": 128, "num_key_value_heads": 4, "vocab_size": 151936}


@dataclass(frozen=True)
class Run:
    """gpus: 8 a host. sequences: a step's, of at most `longest` and on average `mean` tokens. tensor: of an engine."""

    name: str
    config: PreTrainedConfig
    gpus: int
    sequences: int
    longest: int
    mean: int
    tensor: int
    seconds: float


PUBLISHED = [
    Run("Llama-3.1-8B", LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
        16, 2048, 4096, 1060, 1, 97.7),
    Run("Qwen3-30B-A3B", Qwen3MoeConfig(hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=48, num_attention_heads=32, **MOE), 32, 2048, 4096, 3154, 4, 225),
    Run("Qwen3-32B", Qwen3Config(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, head_dim=128,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=151936), 32, 2048, 4096, 3206, 4, 393),
    Run("Qwen3-235B-A22B", Qwen3MoeConfig(hidden_size=4096, intermediate_size=12288, moe_intermediate_size=1536,
        num_hidden_layers=94, num_attention_heads=64, **MOE), 128, 512, 8192, 5671, 16, 506),
    Run("DeepSeek-V3", DeepseekV3Config(), 256, 512, 1536, 745, 32, 154),
]  # fmt: skip


def published(*_: object) -> None:
    print("| run | GPUs | published, s | predicted, s | ratio | without the hand-over | ratio | of these |")
    print("| --- | --: | --: | --: | --: | --: | --: | --- |")
    for run in PUBLISHED:
        model, machines = model_of(run.config), cluster(f"{run.gpus // 8}x8xH100-80GB")
        updates = run.sequences // 512
        layout: dict[str, Any] = {"expert": 8} if model.experts else {}
        train = TrainConfig(
            shard=run.gpus, dtype="bfloat16", activation_checkpointing=True, tokens_per_rank=2 * run.longest, **layout
        )
        rollout = RolloutConfig(
            tensor=run.tensor, replicas=run.gpus // run.tensor, dtype="bfloat16", max_num_seqs=1024,
            max_length=run.longest, memory=0.6, eager=False,
        )  # fmt: skip
        work = Work(
            run.sequences, 1, PROMPT, run.mean - PROMPT, run.longest - PROMPT, updates=updates, forwards=1,
            samples=True, reference=True,
        )  # fmt: skip
        each = prospect(model, train, rollout, machines, work)
        parts = {phase: sum(seconds.values()) for phase, seconds in each.seconds.items()}
        total = sum(parts.values())
        text = ", ".join(f"{name} {seconds:,.0f}" for name, seconds in parts.items())
        rest = total - parts["handover"]
        cells = [run.name, run.gpus, f"{run.seconds:g}", f"{total:,.0f}", f"{total / run.seconds:.2f}"]
        print("|", " | ".join(map(str, [*cells, f"{rest:,.0f}", f"{rest / run.seconds:.2f}", text])), "|")


PROMPTS, COMPLETIONS, LENGTH, NEW, TOKENS = 32, 4, 64, 56, 2048
MODELS = {
    "MoE": {"hidden_size": 512, "num_hidden_layers": 9, "n_routed_experts": 32, "moe_intermediate_size": 256},
    "dense": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2560, "num_attention_heads": 12},
}
LAYOUTS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("MoE", {}, {}),
    ("MoE", {"activation_checkpointing": True}, {}),
    ("MoE", {"shard": 2, "expert": 2}, {"tensor": 2, "expert": True}),
    ("dense", {}, {}),
    ("dense", {"activation_checkpointing": True}, {}),
    ("dense", {"shard": 2}, {"replicas": 2}),
    ("dense", {}, {"tensor": 2}),
    ("MoE", {"replicate": 2}, {}),
]


class Random:
    """A scorer that draws its scores."""

    def submit(self, groups, trainer_state):
        draw, future = np.random.default_rng(0), Future()
        future.set_result([Scores(draw.random(len(group.completions)), {}, {}) for group in groups])
        return future

    def close(self):
        return


class Watch:
    """Proportional set size of this process and all below it, the most of every phase."""

    def __enter__(self):
        self.peaks, self.phase, self.running = {}, "start", True
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.running = False
        self.thread.join()

    def watch(self):
        while self.running:
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), used_by_processes())
            time.sleep(0.1)


def memory(first: int, output: Path | None) -> None:
    init = InitConfig(vocab_size=8192)
    tokenizer = train_tokenizer(init, [f"{n} and {n * n} and {n**3}" for n in range(20000)])
    header, rows = ["model", "predicted, GiB", "measured, GiB", "ratio", "train", "rollout", "phases"], []
    with tempfile.TemporaryDirectory() as folder:
        for name, train, rollout in LAYOUTS[first:]:
            path = Path(folder) / name
            if not path.is_dir():
                config = preset_config(init, tokenizer)
                if name == "dense":
                    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
                    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=None, **ends)
                config.update(MODELS[name])
                if name == "dense":
                    config.num_key_value_heads = config.num_attention_heads
                    config.head_dim = config.hidden_size // config.num_attention_heads
                save_model_dir(build_model(config), tokenizer, path)
                trim()
            rows.append(one_layout(name, path, TrainConfig(tokens_per_rank=TOKENS, **train), train, rollout))
            print(rows[-1], flush=True)
    publish("Memory, predicted and measured", f"{machine_line()}\n\n{table(header, rows)}", output)


def one_layout(name: str, path: Path, train: TrainConfig, shown: dict[str, Any], layout: dict[str, Any]) -> list[str]:
    """A row of the table."""
    from transformers import AutoConfig

    rollout = RolloutConfig(max_num_seqs=128, max_length=LENGTH, memory=0.125, bucket_mb=64, **layout)
    model = model_of(AutoConfig.from_pretrained(path))
    work = Work(PROMPTS, COMPLETIONS, LENGTH - NEW, NEW, NEW, samples=True, reference=True)
    each = prospect(model, train, rollout, replace(cluster(None), moves=False), work)
    predicted = each.resident("device")
    config = GRPOConfig(
        prompts=DataConfig(function="a:b"), rewards=(RewardConfig(function="a:b"),), steps=2, mismatch_limit=10.0,
        prompts_per_step=PROMPTS, completions=COMPLETIONS, max_new_tokens=NEW, learning_rate=1e-6, kl=0.1,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    prompts = [Prompt(i, "", draw.integers(3, 100, LENGTH - NEW).astype(np.int32), {}) for i in range(PROMPTS)]
    with Watch() as watch:
        engine = HybridEngine(path, train, rollout, seed=0)
        try:
            watch.phase = "load"
            engine.load(path, path, config, path)
            watch.phase = "steps"
            steps = grpo(engine, iter([prompts, prompts]), config, Sampling(COMPLETIONS, NEW, 1.0, 0), Random(), 1)
            for done in steps:
                print(done.metrics["completions/mean_length"], done.metrics["tokens/computed"], file=sys.stderr)
        finally:
            watch.running = False
            engine.close()
    most, found = max(predicted.values()), max(watch.peaks.values())
    text = ", ".join(f"{phase} {size / GIB:.2f}" for phase, size in (*predicted.items(), *watch.peaks.items()))
    print({part.name: round(part.bytes / GIB, 3) for part in each.parts["device"]}, file=sys.stderr)
    sizes = f"{most / GIB:.2f}", f"{found / GIB:.2f}", f"{most / found:.2f}"
    return [name, *sizes, str(shown or "1 rank"), str(layout or "1 engine"), text]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["published", "memory"])
    parser.add_argument("--first", type=int, default=0, help="leave out this many of the layouts of `memory`")
    parser.add_argument("--output", type=Path, help="append the table of `memory` to this Markdown file")
    args = parser.parse_args()
    {"published": published, "memory": memory}[args.what](args.first, args.output)
