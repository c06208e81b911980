"""One rank, two ranks sharded by FSDP2 and one plain process do the same arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks, tiny_model
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from alignment.config import TrainConfig
from alignment.routing import Routing
from hybrid_engine import sharding
from hybrid_engine.sharding import clip_grad_norm, last_micro_batch, make_meshes, reshard, shard_model
from hybrid_engine.weight_sync import WeightPacker
from rollout.config import RolloutConfig
from rollout.weights import whole_tensors

LENGTHS = (9, 3, 17, 5, 12, 0, 7, 2)  # tokens with loss, per sequence; one has none, as on a rank that ran out of rows
STEPS, MAX_NORM = 3, 0.5


def batch(step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(token ids [1, T], weights [T-1]) of each sequence; weights sum to 1 over all of them."""
    generator = torch.Generator().manual_seed(step)
    rows = []
    for length in LENGTHS:
        ids = torch.randint(101, (1, max(length, 1) + 1), generator=generator)
        rows.append((ids, torch.full((ids.shape[1] - 1,), (length > 0) / sum(LENGTHS))))
    return rows


def backward(model: torch.nn.Module, row: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, weights = row
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    (torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none") * weights).sum().backward()


def full(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: torch.nn.Module, share: slice) -> dict[str, object]:
    """Three clipped AdamW steps on this rank's share of each batch: first gradients, norms, final parameters."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    gradients, norms = {}, []
    for step in range(STEPS):
        rows = batch(step)[share]
        with torch.no_grad():
            model(input_ids=rows[0][0], use_cache=False)  # old log-probabilities: gathers, and has no backward
        for index, row in enumerate(rows):
            last_micro_batch(model, index == len(rows) - 1)
            backward(model, row)
        if step == 0:
            gradients = {name: full(p.grad) for name, p in model.named_parameters() if p.requires_grad}
        norms.append(clip_grad_norm(model.parameters(), MAX_NORM))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    return {"gradients": gradients, "norms": norms, "parameters": {n: full(p) for n, p in model.named_parameters()}}


def collectives(model: torch.nn.Module) -> list[int]:
    """How many collectives each of three micro-batches of an update makes."""
    counts = []
    for index, row in enumerate(batch(0)[:3]):
        last_micro_batch(model, index == 2)
        with CommDebugMode() as comm:
            backward(model, row)
        counts.append(comm.get_total_counts())
    return counts


def logits_after_change(model: torch.nn.Module, action: Callable[[torch.nn.Module], None]) -> torch.Tensor:
    """A forward without a backward, weights that change behind it, `action`, and the logits of another forward."""
    ids, parameters = batch(0)[0][0], list(model.parameters())
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        for parameter in parameters:
            parameter.mul_(1.5)
        action(model)
        return model(input_ids=ids, use_cache=False).logits.clone()


def sharded(**settings: bool | str) -> torch.nn.Module:
    model, layout = tiny_model("deepseek-v2"), TrainConfig(shard=dist.get_world_size(), **settings)
    shard_model(model.eval(), make_meshes(layout, "cpu"), layout)
    return model


def on_two_ranks(folder: Path) -> None:
    share = slice(dist.get_rank(), None, 2)
    found: dict[str, object] = {"float32": train(sharded(), share)}
    found["checkpointed"] = train(sharded(activation_checkpointing=True), share)
    found["bfloat16"] = train(sharded(dtype="bfloat16"), share)
    found["collectives"] = collectives(sharded())
    found["saving"] = collectives(sharded(activation_checkpointing=True))
    found["stale"] = logits_after_change(sharded(), lambda model: None)
    found["resharded"] = logits_after_change(sharded(), reshard)
    model = sharded()
    packer = WeightPacker(model, RolloutConfig(dtype="bfloat16"))
    with torch.no_grad():
        model(input_ids=batch(0)[0][0], use_cache=False)  # now the modules hold gathered parameters
    torch.save(packer.pack(3), folder / f"packed-{dist.get_rank()}.pt")
    with pytest.MonkeyPatch.context() as fault:  # gloo lacks FSDP's default operation, so averaging takes this form
        fault.setattr(sharding, "_sum_gradients", lambda module: module.set_force_sum_reduction_for_comms(True))
        found["averaged"] = train(sharded(), share)
    model = sharded()
    Routing(model, TrainConfig(router="freeze"))
    before = {name: full(parameter) for name, parameter in model.named_parameters()}
    train(model, share)
    after = {name: full(parameter) for name, parameter in model.named_parameters()}
    found["frozen"] = {name for name in before if torch.equal(after[name], before[name])}
    if dist.get_rank() == 0:
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("two_ranks")
    run_ranks(on_two_ranks, 2, folder)
    packed = [torch.load(folder / f"packed-{rank}.pt", weights_only=False) for rank in range(2)]
    return torch.load(folder / "found.pt") | {"packed": packed}


@pytest.fixture(scope="module")
def plain() -> dict:
    """One process, no wrapper, torch's own clipping: what all layouts are compared with."""
    model = tiny_model("deepseek-v2").train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    gradients, norms = {}, []
    for step in range(STEPS):
        for row in batch(step):
            backward(model, row)
        gradients = gradients or {name: full(p.grad) for name, p in model.named_parameters()}
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return {"gradients": gradients, "norms": norms, "parameters": {n: full(p) for n, p in model.named_parameters()}}


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradient_error(found: dict, expected: dict) -> float:
    """Largest difference of any gradient element, relative to the norm of all gradients."""
    largest = max(float((found["gradients"][n] - g).abs().max()) for n, g in expected["gradients"].items())
    return largest / expected["norms"][0]


def parameter_error(found: dict, expected: dict) -> float:
    return max(float((found["parameters"][n] - p).abs().max()) for n, p in expected["parameters"].items())


@pytest.mark.parametrize("layout", ["float32", "checkpointed"])
def test_two_ranks_sum_gradients_and_step_like_one_process(two_ranks: dict, plain: dict, layout: str):
    assert min(plain["norms"]) > MAX_NORM, "the comparison must include clipping"
    assert gradient_error(two_ranks[layout], plain) < 1e-6
    assert two_ranks[layout]["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    assert parameter_error(two_ranks[layout], plain) < 5e-6


def test_averaged_gradients_would_be_seen(two_ranks: dict, plain: dict):
    assert two_ranks["averaged"]["norms"][0] == pytest.approx(plain["norms"][0] / 2, rel=1e-5)
    assert gradient_error(two_ranks["averaged"], plain) > 1e-2


def test_one_rank_in_float32_stays_a_plain_model(plain: dict, one_rank: None):
    found = train(sharded(), slice(None))
    assert gradient_error(found, plain) == 0
    assert found["norms"] == pytest.approx(plain["norms"], rel=1e-6)
    assert parameter_error(found, plain) < 1e-7


def test_bfloat16_computes_alike_on_one_and_two_ranks(two_ranks: dict, plain: dict, one_rank: None):
    found = train(sharded(dtype="bfloat16"), slice(None))
    assert gradient_error(found, plain) > 1e-4, "this is not bfloat16"
    assert gradient_error(two_ranks["bfloat16"], found) < 1e-6
    assert two_ranks["bfloat16"]["norms"][0] == pytest.approx(found["norms"][0], rel=1e-6)


def test_only_the_first_and_last_micro_batch_communicate(two_ranks: dict):
    first, middle, last = two_ranks["collectives"]
    assert first > 0 and middle == 0 and last > 0


def test_with_checkpointing_no_micro_batch_leaves_gathered_weights_behind(two_ranks: dict):
    first, middle, last = two_ranks["saving"]
    assert first == middle == last > 0


def test_gathered_weights_are_stale_until_resharded(two_ranks: dict):
    expected = logits_after_change(tiny_model("deepseek-v2").train(), reshard)
    assert (two_ranks["resharded"] - expected).abs().max() < 1e-5
    assert (two_ranks["stale"] - expected).abs().max() > 1e-2, "reshard() is no longer needed"


def test_frozen_routers_stay_as_they_are_and_nothing_else_does(two_ranks: dict):
    names = [name for name, _ in tiny_model("deepseek-v2").named_parameters()]
    assert two_ranks["frozen"] == {name for name in names if name.endswith("mlp.gate.weight")} != set()


def test_packed_weights_of_two_ranks_make_those_of_one(two_ranks: dict):
    one = dict(whole_tensors([WeightPacker(tiny_model("deepseek-v2"), RolloutConfig(dtype="bfloat16")).pack(3)[None]]))
    both = dict(whole_tensors([packed[None] for packed in two_ranks["packed"]]))
    assert both.keys() == one.keys()
    assert all(torch.equal(both[name], one[name]) for name in one)
    half = [packed[None].manifest.nbytes for packed in two_ranks["packed"]]
    assert max(half) < 0.51 * sum(half), "each rank sends what it holds, and no more"


@pytest.mark.parametrize("recompute", [False, True])
def test_activation_checkpointing_recomputes_each_layer(recompute: bool, one_rank: None):
    model, calls = sharded(activation_checkpointing=recompute), []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    backward(model, batch(0)[0])
    assert len(calls) == len(model.model.layers) * (1 + recompute)


def test_norm_counts_every_gradient_once_and_small_ones_stay():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (2, 1, 3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([1.0, 2.0]), torch.tensor([2.0])
    assert clip_grad_norm(parameters, 4.0) == pytest.approx(3.0, rel=1e-7)
    assert parameters[0].grad.tolist() == [1.0, 2.0]
    assert clip_grad_norm(parameters, 1.5) == pytest.approx(3.0, rel=1e-7)
    assert parameters[1].grad.tolist() == pytest.approx([1.0], rel=1e-6)


def test_a_gradient_that_is_not_finite_is_an_error():
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([1.0, float("nan")])
    with pytest.raises(FloatingPointError, match="the gradient norm is nan"):
        clip_grad_norm([parameter], 1.0)


def test_wrong_dtypes_are_refused(one_rank: None):
    with pytest.raises(ValueError, match=r"dtype=torch\.float32"):
        shard_model(tiny_model("llama").bfloat16(), make_meshes(TrainConfig(), "cpu"), TrainConfig(dtype="bfloat16"))
