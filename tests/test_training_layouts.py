"""Every training layout does the arithmetic of one process, loads its share alone, and continues the others' runs."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import CONFIGS, run_ranks, tiny_model
from test_checkpoint import EXTRA, same, seed_all
from test_sharding import MAX_NORM, batch, full
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DeepseekV2Config, PreTrainedModel

from alignment.config import TrainConfig
from hybrid_engine import expert_parallel
from hybrid_engine.checkpoint import load_checkpoint, save_checkpoint
from hybrid_engine.loading import load_model
from hybrid_engine.sharding import clip_grad_norm, last_micro_batch, make_meshes, parameter_groups, shard_model

LAYOUTS = {
    2: [(1, 2, 1), (2, 1, 1), (1, 2, 2)],
    4: [(1, 4, 1), (1, 4, 2), (2, 2, 1), (2, 2, 2), (2, 2, 4)],
}
"""By number of ranks: (replicate, shard, expert)."""
FAMILIES = ("deepseek-v2", "deepseek-v3", "qwen3-moe", "mixtral", "llama-tied")
CELLS = [
    (family, shape)
    for family in FAMILIES
    for shapes in LAYOUTS.values()
    for shape in shapes
    if shape[2] == 1 or family != "llama-tied"
]
FAST = [
    (family, shape)
    for family, shape in CELLS
    if family == "deepseek-v2" or shape == (2, 2, 2 - (family == "llama-tied"))
]
SLOW = [cell for cell in CELLS if cell not in FAST]
PRECISE = {"float64": ("eager", torch.float64), "float32": ("grouped_mm", torch.float32)}
CONTINUED = [(1, 4, 1), (1, 4, 2), (2, 2, 4)]
"""Layouts whose checkpoints the others load."""


def layout(shape: tuple[int, int, int], **settings: bool) -> TrainConfig:
    return TrainConfig(replicate=shape[0], shard=shape[1], expert=shape[2], **settings)


def model_in(family: str, precision: str) -> PreTrainedModel:
    experts, dtype = PRECISE[precision]
    model = tiny_model(family).to(dtype).eval()
    if any(expert_parallel.expert_modules(model)):
        model.set_experts_implementation(experts)
    return model


def gradients(model: PreTrainedModel, share: slice, fault: float = 1.0) -> dict[str, object]:
    """Gradients of this rank's share of a batch, one micro-batch a sequence, and their norm over all ranks."""
    rows = batch(0)[share]
    for index, (ids, weights) in enumerate(rows):
        last_micro_batch(model, index == len(rows) - 1)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        (losses * weights.to(logits.dtype)).sum().backward()
    for experts in expert_parallel.expert_modules(model):
        experts.down_proj.grad.mul_(fault)
    found = {name: full(parameter.grad) for name, parameter in model.named_parameters()}
    return {"gradients": found, "norms": [clip_grad_norm(model.parameters(), MAX_NORM)]}


def run_of(model: PreTrainedModel) -> torch.optim.AdamW:
    return torch.optim.AdamW([{"params": group} for group in parameter_groups(model)], lr=1e-3, weight_decay=0.1)


def steps(model: PreTrainedModel, optimizer: torch.optim.AdamW, numbers: range) -> list[float]:
    """Clipped AdamW steps with these numbers; the losses, over all ranks, and the norms."""
    metrics = []
    for number in numbers:
        rows, total = batch(number)[dist.get_rank() :: dist.get_world_size()], torch.zeros(())
        for index, (ids, weights) in enumerate(rows):
            last_micro_batch(model, index == len(rows) - 1)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") * weights).sum()
            loss.backward()
            total += loss.detach()
        dist.all_reduce(total)
        metrics += [float(total), clip_grad_norm(model.parameters(), MAX_NORM)]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return metrics


def laid_out(family: str, shape: tuple[int, int, int], precision: str = "float32", **settings: bool) -> PreTrainedModel:
    model, train = model_in(family, precision), layout(shape, **settings)
    shard_model(model, make_meshes(train, "cpu"), train)
    return model


def on_ranks(folder: Path, cells: list[tuple[str, tuple[int, int, int]]]) -> None:
    world, found = dist.get_world_size(), {}
    share = slice(dist.get_rank(), None, world)
    for family, shape in cells:
        if shape[0] * shape[1] != world:
            continue
        for precision in PRECISE:
            model = laid_out(family, shape, precision, activation_checkpointing=shape[2] > 1)
            found[family, shape, precision] = gradients(model, share)
        loaded = load_model(folder / family, layout(shape), make_meshes(layout(shape), "cpu"), torch.device("cpu"))
        held = sum(t.to_local().numel() if isinstance(t, DTensor) else t.numel() for t in loaded.parameters())
        weights = {name: full(tensor) for name, tensor in loaded.state_dict().items()}
        found[family, shape, "loaded"] = (held, weights)
    if world == 4 and cells == FAST:
        found["fault"] = gradients(laid_out("deepseek-v2", (1, 4, 2)), share, fault=0.5)
        continue_each_other(folder, found)
    if dist.get_rank() == 0:
        torch.save(found, folder / f"found-{world}.pt")


def continue_each_other(folder: Path, found: dict) -> None:
    """Four steps in each layout, saved after the second; then the last two of them in every other layout."""
    for shape in CONTINUED:
        model = laid_out("deepseek-v2", shape)
        optimizer = run_of(model)
        seed_all(dist.get_rank())
        steps(model, optimizer, range(2))
        save_checkpoint(folder / f"{shape}" / "checkpoint", model, optimizer, EXTRA).result()
        dist.barrier()
        found["uninterrupted", shape] = steps(model, optimizer, range(2, 4))
    for source, target in product(CONTINUED, repeat=2):
        model = laid_out("deepseek-v2", target)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        optimizer = run_of(model)
        assert load_checkpoint(folder / f"{source}" / "checkpoint", model, optimizer) == EXTRA
        found["continued", source, target] = steps(model, optimizer, range(2, 4))


def matrix(make_folder: Callable[[str], Path], cells: list[tuple[str, tuple[int, int, int]]]) -> dict:
    """What the ranks of every layout computed, and one process's gradients under (family, precision)."""
    folder = make_folder("alone")
    run_ranks(alone, 1, folder)
    results = torch.load(folder / "found.pt")
    for ranks in LAYOUTS:
        folder = make_folder(f"ranks-{ranks}")
        for family in FAMILIES:
            tiny_model(family).save_pretrained(folder / family, max_shard_size="150KB")
        run_ranks(on_ranks, ranks, folder, cells)
        results |= torch.load(folder / f"found-{ranks}.pt")
    return results


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return matrix(tmp_path_factory.mktemp, FAST)


@pytest.fixture(scope="module")
def found_slowly(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return matrix(tmp_path_factory.mktemp, SLOW)


def alone(folder: Path) -> None:
    """In a process of its own, since other thread counts round otherwise."""
    single = {}
    for family, precision in product(FAMILIES, PRECISE):
        single[family, precision] = gradients(model_in(family, precision), slice(None))
    torch.save(single, folder / "found.pt")


def difference(found: dict, expected: dict) -> float:
    """Norm of the difference of all gradients, relative to the norm of the gradients."""
    squares = [(found["gradients"][n] - g).double().square().sum() for n, g in expected["gradients"].items()]
    return float(sum(squares)) ** 0.5 / expected["norms"][0]


def check_gradients(found: dict, family: str, shape: tuple[int, int, int]) -> None:
    assert difference(found[family, shape, "float64"], found[family, "float64"]) <= 1e-10
    assert found[family, shape, "float64"]["norms"] == pytest.approx(found[family, "float64"]["norms"], rel=1e-6)
    assert difference(found[family, shape, "float32"], found[family, "float32"]) <= 1e-5
    assert min(found[family, "float64"]["norms"]) > MAX_NORM


@pytest.mark.parametrize(("family", "shape"), FAST)
def test_gradients_are_those_of_one_process(found: dict, family: str, shape: tuple[int, int, int]) -> None:
    check_gradients(found, family, shape)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape"), SLOW)
def test_the_other_families_and_layouts_too(found_slowly: dict, family: str, shape: tuple[int, int, int]) -> None:
    check_gradients(found_slowly, family, shape)
    check_share(found_slowly, family, shape)


def test_an_experts_gradient_scaled_by_a_half_is_seen(found: dict) -> None:
    """The tests' own margin: the fault is a hundred times what they let pass."""
    assert difference(found["fault"], found["deepseek-v2", "float32"]) > 1e-3


@pytest.mark.parametrize(("family", "shape"), FAST)
def test_a_rank_reads_its_share_and_all_shares_are_the_model(
    found: dict, family: str, shape: tuple[int, int, int]
) -> None:
    check_share(found, family, shape)


def check_share(found: dict, family: str, shape: tuple[int, int, int]) -> None:
    held, weights = found[family, shape, "loaded"]
    model = tiny_model(family)
    assert same(weights, model.state_dict())
    # Rows that do not divide leave a rank with at most one row more than its part, of each parameter.
    most = sum(-(-p.shape[0] // shape[1]) * p[0].numel() for p in model.parameters())
    if shape[2] > shape[1]:
        experts = sum(p.numel() for m in expert_parallel.expert_modules(model) for p in m.parameters(recurse=False))
        most -= experts // shape[1] - experts // shape[2]
    assert held <= most


@pytest.mark.parametrize(("source", "target"), list(product(CONTINUED, repeat=2)))
def test_a_checkpoint_of_any_layout_continues_under_the_others(
    found: dict, source: tuple[int, int, int], target: tuple[int, int, int]
) -> None:
    tolerance = 0.0 if source == target else 1e-6
    assert found["continued", source, target] == pytest.approx(found["uninterrupted", source], rel=tolerance, abs=0.0)


def test_weights_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        meshes = make_meshes(TrainConfig(), "cpu")
        config = CONFIGS["deepseek-v2"].to_dict() | {"num_hidden_layers": 4}
        AutoModelForCausalLM.from_config(CONFIGS["deepseek-v2"]).save_pretrained(tmp_path / "three")
        for name, change, part in [
            ("missing", config, r"weight model\.layers\.3\S+ is missing"),
            (
                "shape",
                config | {"num_hidden_layers": 3, "hidden_size": 32},
                r"weight \S+ is \[101, 64\], the model's \(101, 32\)",
            ),
        ]:
            folder = tmp_path / name
            (tmp_path / "three").rename(folder)
            DeepseekV2Config(**change).save_pretrained(folder)
            with pytest.raises(ValueError, match=part):
                load_model(folder, TrainConfig(), meshes, torch.device("cpu"))
            folder.rename(tmp_path / "three")
        quantised = AutoModelForCausalLM.from_config(CONFIGS["llama"]).to(torch.float8_e4m3fn)
        quantised.save_pretrained(tmp_path / "fp8")
        with pytest.raises(ValueError, match="stored as F8_E4M3"):
            load_model(tmp_path / "fp8", TrainConfig(), meshes, torch.device("cpu"))
        CONFIGS["llama"].save_pretrained(tmp_path / "none")
        with pytest.raises(ValueError, match=r"no model\.safetensors and no model\.safetensors\.index\.json"):
            load_model(tmp_path / "none", TrainConfig(), meshes, torch.device("cpu"))
    finally:
        dist.destroy_process_group()
