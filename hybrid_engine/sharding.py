"""The training layout: FSDP2 over one mesh of ranks, gradients summed (not averaged), one norm over all ranks."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def shard_model(
    model: PreTrainedModel,
    mesh: DeviceMesh | None,
    *,
    dtype: torch.dtype,
    activation_checkpointing: bool = False,
    reshard_after_forward: bool = False,
) -> None:
    """Bring a float32 model into the training layout, in place: one FSDP2 group per decoder layer, one for the rest.

    Parameters, gradients and optimiser states stay float32; with `dtype` bfloat16 forward and backward compute in
    bfloat16 and gradients are reduced in float32. One rank in float32 stays a plain model; one rank in bfloat16 is
    "sharded" over itself, so that the precision of every operation is the same for any number of ranks.
    Without resharding after the forward a layer is gathered once per update instead of twice, for its memory.

    mesh: one dimension, over all training ranks; None is one rank in float32, and needs no process group.
    The forward must go through `model(...)`: FSDP gathers parameters in that call's hooks.
    Raises ValueError when a parameter is not float32, or for bfloat16 without a mesh.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name} is {parameter.dtype}: load the model with dtype=torch.float32 to train it")
    if activation_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.base_model.layers:
            layer.training = True  # Transformers recomputes in training mode alone; dropout below stays as it is
    if dtype == torch.float32 and (mesh is None or mesh.size() == 1):
        return
    if mesh is None:
        raise ValueError("bfloat16 compute needs a device mesh, also on one rank: init_device_mesh(device, (1,))")
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32)
    for module in (*model.base_model.layers, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
        _sum_gradients(module)


def _sum_gradients(module: FSDPModule) -> None:
    """Undo FSDP's averaging: a loss is a sum over all ranks' tokens and is normalised once, by the driver."""
    module.set_gradient_divide_factor(1.0)
    # Without this a factor becomes ReduceOp.PREMUL_SUM, which gloo does not have.
    module.set_force_sum_reduction_for_comms(True)


def last_micro_batch(model: torch.nn.Module, last: bool) -> None:
    """Say before each micro-batch's forward whether its backward ends the update (as `RankPolicy` does).

    Ranks then communicate before the first and after the last micro-batch alone: until the last, parameters and
    summed gradients stay unsharded. Every rank must run as many micro-batches as the others. Nothing on a plain model.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)


def reshard(model: torch.nn.Module) -> None:
    """Free gathered parameters. Needed after a forward without a backward if the weights change next:
    what is still gathered would be used again, stale."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> float:
    """Scale gradients in place so that their 2-norm over all parameters and ranks is at most `max_norm`.

    Returns the norm before clipping, the same on every rank. Sharded gradients are summed over the ranks of their
    mesh; plain ones count once. Raises FloatingPointError when the norm is not finite (nothing is scaled then).
    """
    shards: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    mesh: DeviceMesh | None = None
    for parameter in parameters:
        grad = parameter.grad
        if isinstance(grad, DTensor):
            assert mesh in (None, grad.device_mesh) and all(p.is_shard() for p in grad.placements)
            mesh = grad.device_mesh
            shards.append(grad.to_local())
        elif grad is not None:
            plain.append(grad)
    square = _sum_of_squares(plain)
    if mesh is not None:
        over_ranks = _sum_of_squares(shards).to(shards[0].device)
        dist.all_reduce(over_ranks, group=mesh.get_group())
        square = square + over_ranks.to(square.device)
    norm = math.sqrt(square.item())
    if not math.isfinite(norm):
        raise FloatingPointError(f"the gradient norm is {norm}: the loss or a gradient of this update is not finite")
    scale = max_norm / (norm + 1e-6)  # torch's own formula, so that one rank does what every other trainer does
    if scale < 1:
        torch._foreach_mul_(plain + shards, scale)
    return norm


def _sum_of_squares(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Scalar in float64; an empty shard (fewer rows than ranks) counts as 0."""
    tensors = [t for t in tensors if t.numel()]
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(tensors)).double().square().sum()
