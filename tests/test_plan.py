"""`align plan`: its counts against real models and published ones, its bytes against what torch and vLLM hold, its
seconds against arithmetic by hand, and what it says of recipes that fit and that do not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from ranks import CONFIGS, run_ranks, tiny_model
from transformers import DeepseekV2Config, LlamaConfig, MixtralConfig, PreTrainedConfig, Qwen3MoeConfig

from alignment.config import TrainConfig
from alignment.logprobs import TREE_ATTENTION, tree_layout
from alignment.model import PRESETS
from alignment.tree import pack, plant
from hybrid_engine.cluster import ASSUMED, GIB, cluster
from hybrid_engine.footprint import cache_per_token, gathered, layer_activations, model_of, sharded
from hybrid_engine.forecast import Work, generation, passes
from hybrid_engine.prospect import prospect, ranked, remedies
from hybrid_engine.sharding import make_meshes, shard_model
from recipes.cli import main
from rollout.config import RolloutConfig
from rollout.types import Trajectory, VersionSpan

RECIPES = Path(__file__).resolve().parent.parent / "recipes"
LAYOUTS = [{"shard": 2}, {"shard": 2, "expert": 2}, {"replicate": 2}, {"replicate": 2, "expert": 2}]
H100 = "1x8xH100-80GB"


def preset(name: str) -> PreTrainedConfig:
    return DeepseekV2Config(**{"vocab_size": 512} | yaml.safe_load(PRESETS.read_text())[name])


LITE = model_of(preset("deepseek-v2-lite"))
WORK = Work(groups=32, rows=8, prompt=1024, new=1024, longest=1024, samples=True)
TRAIN = TrainConfig(dtype="bfloat16", activation_checkpointing=True, tokens_per_rank=4096)
ROLLOUT = RolloutConfig(dtype="bfloat16", max_length=2048, memory=0.45, eager=False)

# -- counts -----------------------------------------------------------------------------------------------------------

LLAMA_8B = LlamaConfig(
    hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
    vocab_size=128256, tie_word_embeddings=False,
)  # fmt: skip
QWEN_30B = Qwen3MoeConfig(
    hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
    num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, vocab_size=151936,
)  # fmt: skip
PUBLISHED = {  # billions, with the embedding among a token's
    "DeepSeek-V2": (preset("deepseek-v2"), 236, 21.4),
    "DeepSeek-V2-Lite": (preset("deepseek-v2-lite"), 15.7, 2.66),
    "Mixtral-8x7B": (MixtralConfig(num_key_value_heads=8), 46.7, 12.9),
    "Qwen3-30B-A3B": (QWEN_30B, 30.5, 3.35),
    "Llama-3.1-8B": (LLAMA_8B, 8.03, 8.03),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_that_were_published(name: str):
    config, total, active = PUBLISHED[name]
    model = model_of(config)
    assert (model.dense + model.routed) / 1e9 == pytest.approx(total, rel=2e-3)
    assert (sum(model.active) + config.vocab_size * config.hidden_size) / 1e9 == pytest.approx(active, rel=8e-3)


@pytest.mark.parametrize("family", CONFIGS)
def test_counts_are_those_of_the_model(family: str):
    model, found = tiny_model(family), model_of(CONFIGS[family])
    experts = [p for name, p in model.named_parameters() if ".experts." in name]
    assert found.dense + found.routed == sum(p.numel() for p in model.parameters())
    assert found.routed == sum(p.numel() for p in experts) and found.moe_layers == len(experts) // 2
    layers = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
    counted = Counter(dict.fromkeys(layers, 0))
    for group, alike in [*found.groups.items()][1:]:
        counted[sum(w.numel for w in group)] += alike
    assert counted == Counter(layers)


# -- bytes ------------------------------------------------------------------------------------------------------------


def on_two_ranks(folder: Path) -> None:
    found = []
    for layout in LAYOUTS:
        model, train = tiny_model("deepseek-v2"), TrainConfig(**layout)
        shard_model(model, make_meshes(train, "cpu"), train)
        found.append(sum(p.to_local().numel() for p in model.parameters()))
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")


def test_a_rank_keeps_what_the_plan_says(tmp_path: Path):
    run_ranks(on_two_ranks, 2, tmp_path)
    model = model_of(CONFIGS["deepseek-v2"])
    assert [sharded(model, TrainConfig(**layout)) for layout in LAYOUTS] == torch.load(tmp_path / "found.pt")


def trajectory(length: int, seed: int) -> Trajectory:
    mask = np.arange(length) > 3
    ids = np.random.default_rng(seed).integers(0, 101, length).astype(np.int32)
    return Trajectory(ids, mask, np.zeros(length, np.float32), "length", (VersionSpan(0, 4, length),))


@pytest.mark.parametrize("family", ["deepseek-v2", "deepseek-v3", "qwen3-moe", "mixtral", "llama"])
def test_activations_are_what_autograd_saves(family: str):
    model, saved, length = tiny_model(family), {}, 48
    model.set_attn_implementation(TREE_ATTENTION)
    (batch,) = pack([tree for i in range(4) for tree in plant([trajectory(length, i)], [i], 192, by_routes=False)], 192)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        kept = model.model(
            input_ids=torch.from_numpy(batch.token_ids)[None], position_ids=torch.from_numpy(batch.positions)[None],
            tree=tree_layout(batch.lengths, batch.ends, torch.device("cpu")), use_cache=False,
        )  # fmt: skip
    found = model_of(CONFIGS[family])
    dense, routed = layer_activations(found, TrainConfig(), length - 1, True)
    expected = (found.layers - found.moe_layers) * dense + found.moe_layers * routed
    assert len(batch.token_ids) * expected == pytest.approx(sum(saved.values()), rel=0.08)
    del kept


def test_checkpointing_gathers_two_layers_and_without_it_the_whole_model():
    model, layout = LITE, {"shard": 8, "expert": 8, "dtype": "bfloat16"}
    whole, root = model.dense + model.routed // 8, 2 * 102400 * 2048 + 2048  # embedding, output layer and last norm
    attention = 2048 * (16 * 192 + 576) + 512 * 16 * 256 + 16 * 128 * 2048 + 512
    layer = attention + 2 * 2048 + 3 * 2048 * 1408 * (64 // 8 + 2) + 64 * 2048  # in bfloat16; the root's in float32
    saving, plain, once = (
        gathered(model, TrainConfig(activation_checkpointing=saves, **layout), batches)
        for saves, batches in ((True, 2), (False, 2), (False, 1))
    )
    buffers = (2 + 4) * root
    assert saving == 2 * (root + 2 * layer) + 4 * root + buffers
    assert plain == (2 + 4) * whole + buffers and once == 2 * whole + 2 * root + buffers
    assert gathered(model, TrainConfig(), 2) == 0


def test_a_token_of_the_kv_cache_takes_what_vllm_gives_it():
    from vllm.v1.kv_cache_interface import FullAttentionSpec, MLAAttentionSpec

    config, rollout = preset("deepseek-v2"), RolloutConfig(dtype="bfloat16", tensor=8)
    page = MLAAttentionSpec(block_size=16, num_kv_heads=1, head_size=576, dtype=torch.bfloat16).page_size_bytes
    assert cache_per_token(model_of(config), rollout, False) == 60 * page / 16
    page = FullAttentionSpec(block_size=16, num_kv_heads=1, head_size=128, dtype=torch.bfloat16).page_size_bytes
    assert cache_per_token(model_of(LLAMA_8B), rollout, False) == 32 * page / 16
    # On the CPU MLA is off, and 128 heads are cached, 16 on a rank, padded to the size of a key.
    page = FullAttentionSpec(block_size=16, num_kv_heads=16, head_size=192, dtype=torch.bfloat16).page_size_bytes
    assert cache_per_token(model_of(config), rollout, True) == 60 * page / 16


# -- seconds ----------------------------------------------------------------------------------------------------------


def test_seconds_of_training_are_flops_and_what_communication_adds():
    model, machines = model_of(LLAMA_8B), cluster("2x8xH100-80GB")
    work = Work(groups=16, rows=1, prompt=0, new=4096, longest=4096)
    weights, attention = 8.03e9 - 128256 * 4096, 2 * 32 * 4096 * 32 * 256  # the mask skips nothing
    train = TrainConfig(shard=16, dtype="bfloat16", tokens_per_rank=4096)
    found = passes(model, train, machines, work, 1, 1)
    flops = 3 * 4096 * (2 * weights + attention)
    assert found["compute"] == pytest.approx(flops / (0.4 * 989e12), rel=2e-3)
    # Eight adapters of 50 GB/s carry what leaves a host: slower than NVLink's 450.
    moved = 8.03e9 * (2 + 4) * 15 / 16 / (0.7 * 400e9)
    assert moved < found["compute"] and found["gathering"] == 0 and found["all-to-all"] == 0
    short = replace(work, new=64, longest=64)
    found = passes(model, train, machines, short, 1, 1)
    assert found["gathering"] == pytest.approx(moved - found["compute"], rel=2e-3)


def test_seconds_of_decoding_are_bytes_read():
    model, machines = model_of(LLAMA_8B), cluster(H100)
    rollout = RolloutConfig(replicas=8, dtype="bfloat16", max_num_seqs=64, eager=False)
    work = Work(groups=64, rows=16, prompt=100, new=200, longest=200, samples=True)
    found = generation(model, rollout, machines, work, 100 * GIB)
    read = 2 * 8.03e9 + 64 * (100 + 100) * 131072
    assert found["decode"] == pytest.approx(2 * 200 * read / (0.6 * 3.35e12), rel=2e-3)  # two waves of 64
    assert found["engine"] == 2 * 200 * ASSUMED["engine_step"] and found["collectives"] == 0


# -- layouts, and what does not fit -----------------------------------------------------------------------------------


def test_the_best_layouts_fit_and_are_sorted():
    machines = cluster(H100)
    found = ranked(LITE, TRAIN, ROLLOUT, machines, [WORK])
    assert len(found) == 6 and [each.order for each in found] == sorted(each.order for each in found)
    for each in found:
        assert each.train.world == each.rollout.world * each.rollout.replicas == 8
        peaks = [peak["device"] for schedule in each.schedules.values() for peak in schedule.peaks.values()]
        assert max(peaks) <= machines.memory
    given = prospect(LITE, TrainConfig(shard=8, dtype="bfloat16"), ROLLOUT, machines, WORK).solved()
    assert given.error is not None or found[0].order <= given.order


def test_what_does_not_fit_says_what_to_change():
    machines = cluster("1x1xH200-141GB+128GiB")
    given = prospect(
        LITE, TRAIN.model_copy(update={"activation_checkpointing": False}), ROLLOUT, machines, WORK
    ).solved()
    assert given.error is not None and not given.schedules
    found = dict(remedies(LITE, given, machines, WORK))
    assert found["train.activation_checkpointing: true"] == 0 < found["rollout.memory: 0.225"]
    assert prospect(LITE, TRAIN, ROLLOUT, machines, WORK).solved().error is None


def test_split_placement_plans_each_side_by_itself():
    rollout = ROLLOUT.model_copy(update={"placement": "split", "replicas": 4})
    found = prospect(LITE, TRAIN.model_copy(update={"shard": 4}), rollout, cluster(H100), WORK)
    names = {side: {part.name for part in parts} for side, parts in found.parts.items()}
    assert "optimizer" in names["training device"] - names["rollout device"]
    assert "KV cache" in names["rollout device"] - names["training device"]


# -- the command ------------------------------------------------------------------------------------------------------

BAD = ["16x8", "16x8xH100", "0x8xH100-80GB", "eightxH100-80GB", "1x1xcpu", "1x1xH100-80GB+lots"]


@pytest.mark.parametrize("text", BAD)
def test_a_cluster_that_cannot_be_read_is_one_error_that_shows_the_form(text: str, capsys):
    assert main(["plan", str(RECIPES / "demo.yaml"), "--cluster", text]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert repr(text) in line and "16x8xH100-80GB" in line and "A100-80GB" in line


def test_cluster_strings_that_can_be_read():
    found = cluster(" 16X8xh800-80gb ")
    assert (found.hosts, found.devices, found.ranks, found.kind) == (16, 8, 128, "H800-80GB")
    assert cluster("1x1xH200-141GB+128GiB").host_memory == 128 * GIB
    here = cluster(None)
    assert here.on_cpu and here.ranks == len(os.sched_getaffinity(0)) and here.memory > GIB


def test_too_few_devices_and_layouts_that_do_not_fit_the_model_are_named(capsys):
    recipe = str(RECIPES / "deepseek_v2_cluster.yaml")
    assert main(["plan", recipe, "--cluster", H100, "--set", "train.expert=64"]) == 2
    error = capsys.readouterr().err
    assert "need 128 devices, the cluster has 8" in error and "64 ranks do not divide" in error
    assert "--set train.expert=64" in error and "deepseek_v2_cluster.yaml:7: train" in error


@pytest.mark.parametrize(
    ("recipe", "machines", "said"),
    [
        ("deepseek_v2_cluster", "16x8xH800-80GB", ["235.7B parameters", "weights", "object store", "expert 8"]),
        ("deepseek_v2_lite_one_gpu", "1x1xH200-141GB+128GiB", ["optimizer, host -> device and back", "on the host"]),
        ("deepseek_v2_lite_one_gpu", "1x1xA100-80GB", ["It does not fit", "GiB of device are missing", "train."]),
    ],
)
def test_recipes_are_planned_within_ten_seconds(recipe: str, machines: str, said: list[str]):
    command = [sys.executable, "-m", "recipes.cli", "plan", str(RECIPES / f"{recipe}.yaml"), "--cluster", machines]
    before = os.times()
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"COLUMNS": "160"})
    after = os.times()
    assert done.returncode == 0, done.stderr
    for text in said:
        assert text in done.stdout
    # Of the processor: others may have it, too.
    assert after.children_user + after.children_system - before.children_user - before.children_system < 10
