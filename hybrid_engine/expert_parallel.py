"""Expert parallelism: each rank of a group keeps an equal share of a layer's routed experts, and tokens travel to them.

A token's hidden state goes once to every rank that holds at least one of its experts, the sum of what those experts
make of it (each weighted by its gate) comes back, and the token's rank adds the sums up. It is the same function as the
layer's own, forward and backward; on the way back gradients travel the other way."""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils.stateless import _reparametrize_module
from transformers import PreTrainedModel

Experts = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""(hidden [N, H], expert ids [N, K], gate weights [N, K]) -> [N, H], as Transformers' experts modules compute it."""


def expert_modules(model: PreTrainedModel) -> Iterator[torch.nn.Module]:
    """Every layer's routed experts: the modules that hold them stacked, [experts, out, in]."""
    return (module for module in model.modules() if hasattr(module, "_is_expert_parallel"))


def spread_experts(experts: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Keep this rank's share of the experts, in place, as DTensors that still know the whole. mesh: one dimension, over
    the ranks that together hold all experts; it must divide their number."""
    count, rank = experts.num_experts // mesh.size(), mesh.get_local_rank()
    assert count * mesh.size() == experts.num_experts, "layout.misfits comes first"
    for name, parameter in list(experts.named_parameters(recurse=False)):
        mine = parameter.detach()[rank * count : (rank + 1) * count].clone()
        setattr(experts, name, torch.nn.Parameter(DTensor.from_local(mine, mesh, [Shard(0)], run_check=False)))
    experts.num_experts = count
    experts.forward = partial(_forward, experts, experts.forward, mesh)


def _forward(
    experts: torch.nn.Module, compute: Experts, mesh: DeviceMesh,
    hidden_NH: torch.Tensor, ids_NK: torch.Tensor, weights_NK: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    ranks, count = mesh.size(), experts.num_experts
    # An id past the last expert stands for none: its column is cut off.
    wanted_NR = torch.zeros(len(ids_NK), ranks + 1, dtype=torch.bool, device=ids_NK.device)
    wanted_NR = wanted_NR.scatter_(1, ids_NK // count, True)[:, :ranks]
    rank_S, token_S = wanted_NR.T.nonzero(as_tuple=True)  # S: tokens to send, rank by rank
    sent = wanted_NR.sum(0)
    received = all_to_all_single(sent, None, None, mesh)
    there, back = (received.tolist(), sent.tolist()), (sent.tolist(), received.tolist())
    arrived_AH = all_to_all_single_autograd(hidden_NH[token_S], *there, mesh)  # A: tokens that arrived
    gates_AK = all_to_all_single_autograd(weights_NK[token_S], *there, mesh)
    ids_AK = all_to_all_single(ids_NK[token_S], *there, mesh) - mesh.get_local_rank() * count
    slot, row = ((ids_AK >= 0) & (ids_AK < count)).T.nonzero(as_tuple=True)
    parameters = {name: parameter.to_local() for name, parameter in experts.named_parameters(recurse=False)}
    with _reparametrize_module(experts, parameters):  # this rank's experts, with the gradient's way back
        output = compute(arrived_AH[row], ids_AK[row, slot][:, None], gates_AK[row, slot][:, None])
        if not len(row):  # a rank without work takes part in the backward's collectives all the same
            output = output + 0 * sum(tensor.sum() for tensor in (arrived_AH, gates_AK, *parameters.values()))
    summed_AH = _add_up(output.float() if output.dtype == torch.bfloat16 else output, row, slot, len(arrived_AH))
    returned_SH = all_to_all_single_autograd(summed_AH.to(hidden_NH.dtype), *back, mesh)
    return _add_up(returned_SH, token_S, rank_S, len(hidden_NH))


def _add_up(values: torch.Tensor, targets: torch.Tensor, parts: torch.Tensor, size: int) -> torch.Tensor:
    """[size, H] sums of `values` [S, H] by `targets` [S], one of the sorted `parts` [S] after the other: within one no
    target comes twice, so the order of every sum is fixed, on CUDA too."""
    total = values.new_zeros(size, values.shape[1])
    lengths = torch.bincount(parts).tolist()
    for value, target in zip(values.split(lengths), targets.split(lengths), strict=True):
        total = total.index_add(0, target, value)
    return total
