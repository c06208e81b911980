"""How training tensors and a checkpoint's tensors correspond: as views, and as blocks that a rank holds of them."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


@dataclass(frozen=True, slots=True)
class View:
    """A checkpoint tensor as a strided view of one training tensor; offset and stride in elements."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def order(self) -> list[int]:
        """The checkpoint tensor's dimensions in the order that they have in the training tensor."""
        return sorted(range(len(self.shape)), key=lambda axis: -self.stride[axis])


def checkpoint_views(model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, tuple[View, ...]]:
    """For each training tensor, the tensors that `save_pretrained` makes of it, as views; no data is touched.

    Transformers' own conversion runs over tensors without data, and where it would copy one it goes on with the
    original: offset and strides of what comes out then say which elements each checkpoint tensor consists of.
    Raises ValueError when a checkpoint tensor is made in another way (two tensors joined, say).
    """
    with torch.no_grad(), _NoCopies():
        stand_ins = {name: torch.empty(tensor.shape, device="meta") for name, tensor in tensors.items()}
        owners = {tensor.untyped_storage()._cdata: name for name, tensor in stand_ins.items()}
        converted = revert_weight_conversion(model, stand_ins)
        views: dict[str, list[View]] = {name: [] for name in tensors}
        for name, tensor in converted.items():
            owner = owners.get(tensor.untyped_storage()._cdata)
            if owner is None:
                raise ValueError(
                    f"{type(model).__name__}: checkpoint tensor {name} is not a view of a single training tensor, "
                    "so this model's weights cannot be handed over; choose another model family"
                )
            views[owner].append(View(name, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()))
    covered = {name: sum(prod(view.shape) for view in parts) for name, parts in views.items()}
    missing = [name for name, tensor in tensors.items() if covered[name] != tensor.numel()]
    assert not missing, f"the conversion to checkpoint names lost parts of {missing}"
    return {name: tuple(sorted(parts, key=lambda view: view.offset)) for name, parts in views.items()}


def local_block(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[int, ...]]:
    """What this rank holds of a tensor, and where in the whole it begins."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), (0,) * tensor.ndim
    _, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.detach().to_local(), offset


def intersect(view: View, tensor: torch.Tensor) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where a checkpoint tensor, a `view` of a contiguous `tensor`, meets what this rank holds of that: slices of the
    local block, and slices of the checkpoint tensor; None where they do not meet."""
    shape, (local, offset) = tensor.shape, local_block(tensor)
    rest, block, part = view.offset, [], [slice(None)] * len(view.shape)
    for dim, stride in enumerate(torch.empty(shape, device="meta").stride()):
        first, rest = divmod(rest, stride)
        axes = [axis for axis, size in enumerate(view.shape) if view.stride[axis] == stride and size > 1 < shape[dim]]
        length = view.shape[axes[0]] if axes else 1
        assert len(axes) < 2 and first + length <= shape[dim], f"{view.name} is no block of its training tensor"
        start, end = max(first, offset[dim]), min(first + length, offset[dim] + local.shape[dim])
        if start >= end:
            return None
        block.append(slice(start - offset[dim], end - offset[dim]))
        if axes:
            part[axes[0]] = slice(start - first, end - first)
    return tuple(block), tuple(part)


class _NoCopies(TorchDispatchMode):
    """`clone` returns the tensor itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0] if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))
