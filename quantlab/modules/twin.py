"""A module without its values, beside the one that has them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from quantlab.modules.memory import storage_of

if TYPE_CHECKING:
    from torch import Tensor, nn


def on_meta(module: nn.Module) -> nn.Module:
    """The module with its parameters and buffers on the meta device, those of one storage in one; the other is not
    changed. Tensors that are held otherwise, and those of a library's own class, are the same in both: no value is
    copied."""
    import torch

    known: dict[int, object] = {}
    whole: dict[object, Tensor] = {}
    for part in module.modules():
        for tensor in _held(part):
            known.setdefault(id(tensor), _empty(tensor, whole))
    found: nn.Module = copy.deepcopy(module, known)
    assert isinstance(found, torch.nn.Module)
    return found


def _held(part: nn.Module) -> list[Tensor]:
    import torch

    own = (*part._parameters.values(), *part._buffers.values(), *vars(part).values())
    return [value for value in own if isinstance(value, torch.Tensor)]


def _empty(tensor: Tensor, whole: dict[object, Tensor]) -> Tensor:
    """A tensor of this shape, in the storage that stands for that of this one; of another class: itself."""
    import torch

    is_parameter = type(tensor) is torch.nn.Parameter
    if not is_parameter and type(tensor) is not torch.Tensor:
        return tensor
    num = tensor.untyped_storage().nbytes()
    key = storage_of(tensor)
    if key not in whole:
        whole[key] = torch.empty(num, dtype=torch.uint8, device="meta")
    found = torch.empty(0, dtype=tensor.dtype, device="meta")
    found.set_(whole[key].untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return torch.nn.Parameter(found, requires_grad=False) if is_parameter else found
