"""The training layout: FSDP2 or HSDP over all ranks, experts spread over the same ranks, gradients summed (not
averaged), one norm over all of them."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import PreTrainedModel

from alignment.config import TrainConfig
from hybrid_engine.expert_parallel import expert_modules, spread_experts
from hybrid_engine.layout import expert_layout


@dataclass(frozen=True, slots=True)
class Meshes:
    """The ranks as the parameters lie over them. dense: (replicate, shard), or (shard) alone. experts: the same for the
    ranks that hold the same experts, and parallel: the ranks that hold all experts between them; both None without
    expert parallelism."""

    dense: DeviceMesh
    experts: DeviceMesh | None = None
    parallel: DeviceMesh | None = None


def make_meshes(train: TrainConfig, device: str) -> Meshes:
    """Meshes over all ranks of the process group; every rank calls it."""
    shape, names = (train.replicate, train.shard), ("replicate", "shard")
    first = 0 if train.replicate > 1 else 1
    dense = init_device_mesh(device, shape[first:], mesh_dim_names=names[first:])
    if train.expert == 1:
        return Meshes(dense)
    whole = init_device_mesh(device, layout := expert_layout(train), mesh_dim_names=(*names, "parallel"))
    return Meshes(dense, whole[names if layout.replicate > 1 else "shard"], whole["parallel"])


def shard_model(model: PreTrainedModel, meshes: Meshes, train: TrainConfig) -> None:
    """Bring a model into the training layout, in place: one FSDP2 group per decoder layer, one for the rest, and with
    expert parallelism one per layer's experts.

    Parameters, gradients and optimiser states stay float32; in bfloat16 forward and backward compute in bfloat16 and
    gradients are reduced in float32. One rank in float32 stays a plain model; one rank in bfloat16 is "sharded" over
    itself, so that the precision of every operation is the same for any number of ranks.
    Without activation checkpointing a layer is gathered once per update instead of twice, for its memory.
    A model on the `meta` device stays there. The forward must go through `model(...)`: FSDP gathers parameters in that
    call's hooks. Raises ValueError when a parameter is less precise than float32."""
    for name, parameter in model.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name} is {parameter.dtype}: load the model with dtype=torch.float32 to train it")
    if train.activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.base_model.layers:
            layer.training = True  # Transformers recomputes in training mode alone; dropout below stays as it is
    policy = MixedPrecisionPolicy()
    if train.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif meshes.dense.size() == 1:
        return
    options = {"mp_policy": policy, "reshard_after_forward": train.activation_checkpointing}
    if meshes.parallel is not None:
        for experts in expert_modules(model):
            spread_experts(experts, meshes.parallel)
            # Over another dimension than the one that the ranks share the experts along: a whole then has no strides.
            # Its inputs are cast by the layer; the gate weights among them stay float32, as in every other layout.
            kept = {"mp_policy": replace(policy, cast_forward_inputs=False)}
            fully_shard(experts, mesh=meshes.experts, shard_placement_fn=lambda _: Shard(1), **options | kept)
            _sum_gradients(experts)
    for module in (*model.base_model.layers, model):
        fully_shard(module, mesh=meshes.dense, **options)
        _sum_gradients(module)


def parameter_groups(model: PreTrainedModel) -> list[list[torch.nn.Parameter]]:
    """The experts' parameters and the others, in any layout: an optimiser's fused steps want one mesh per group."""
    experts = [parameter for module in expert_modules(model) for parameter in module.parameters(recurse=False)]
    known = set(map(id, experts))
    others = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [group for group in (others, experts) if group]


def _sum_gradients(module: FSDPModule) -> None:
    """Undo FSDP's averaging: a loss is a sum over all ranks' tokens and is normalised once, by the driver."""
    module.set_gradient_divide_factor(1.0)
    # Without this a factor becomes ReduceOp.PREMUL_SUM, which gloo does not have.
    module.set_force_sum_reduction_for_comms(True)


def last_micro_batch(model: torch.nn.Module, last: bool) -> None:
    """Say before each micro-batch's forward whether its backward ends the update (as `RankPolicy` does).

    Ranks then communicate before the first and after the last micro-batch alone: until the last, parameters and
    summed gradients stay unsharded; with activation checkpointing, which is for models that would not fit so, every
    micro-batch gathers and reduces its own. Every rank must run as many as the others. Nothing on a plain model."""
    if isinstance(model, FSDPModule):
        now = last or model.is_gradient_checkpointing
        model.set_requires_gradient_sync(now)
        model.set_reshard_after_backward(now)


def reshard(model: torch.nn.Module) -> None:
    """Free gathered parameters: after a forward without a backward they would be used again, stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients in place so that their 2-norm over all parameters and ranks is at most `max_norm`.

    Returns the norm before clipping, the same on every rank. Sharded gradients are summed over the ranks; replicated
    and plain ones count once. Raises FloatingPointError when the norm is not finite (nothing is scaled then)."""
    plain: list[torch.Tensor] = []
    shards: dict[int, list[torch.Tensor]] = {}  # by how many ranks hold the same
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor):
            sizes = zip(grad.device_mesh.shape, grad.placements, strict=True)
            copies = math.prod(size for size, placement in sizes if not placement.is_shard())
            shards.setdefault(copies, []).append(grad.to_local())
        elif grad is not None:
            plain.append(grad)
    square = _sum_of_squares(plain)
    if shards:  # one sum over all ranks: DTensor's own norm takes one per mesh dimension
        device = next(iter(shards.values()))[0].device
        over_ranks = sum(_sum_of_squares(tensors).to(device) / copies for copies, tensors in shards.items())
        dist.all_reduce(over_ranks)
        square = square.to(over_ranks.device) + over_ranks
    norm = math.sqrt(square.item())
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: the loss or a gradient of this update is not finite")
    scale = max_norm / (norm + 1e-6)  # torch's own formula, so that one rank does what every other trainer does
    if scale < 1:
        torch._foreach_mul_(plain + [tensor for tensors in shards.values() for tensor in tensors], scale)
    return norm


def _sum_of_squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Scalar in float64; an empty shard (fewer rows than ranks) counts as 0."""
    if not (present := [tensor for tensor in tensors if tensor.numel()]):
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(present)).double().square().sum()
