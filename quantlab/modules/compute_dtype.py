"""The dtype in which a component computes, read from its parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, dtype_name

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str | torch.dtype) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``."""
    import torch

    dtype = getattr(torch, dtype_name(name))
    assert isinstance(dtype, torch.dtype), name
    return dtype


_STANDS_FOR = "_quantlab_stands_for"
"""Attribute of a quantized layer: dtype and number of elements of the weight in whose place its codes are."""


def stand_for(layer: torch.nn.Module, weight: torch.Tensor) -> None:
    """Note on a layer that was quantized which weight it stands for."""
    if dtype_name(weight.dtype) in COMPUTE_DTYPES:
        object.__setattr__(layer, _STANDS_FOR, (dtype_name(weight.dtype), weight.numel()))


def component_dtype(component: torch.nn.Module, default: str = "float32") -> torch.dtype:
    """The torch dtype in which a component wants its floating inputs.

    It is the dtype of most parameter elements among float32, bfloat16 and float16, so that a few norms kept in float32
    do not outvote the rest; a quantized layer votes with the weight that it stands for (:func:`stand_for`), whatever
    its codes are. ``default`` names it where there is nothing to go by.
    """
    votes: Counter[str] = Counter()
    for part in component.modules():
        stood_for = getattr(part, _STANDS_FOR, None)
        if stood_for is not None:
            votes[stood_for[0]] += stood_for[1]
            continue
        for parameter in part.parameters(recurse=False):
            if dtype_name(parameter.dtype) in COMPUTE_DTYPES:
                votes[dtype_name(parameter.dtype)] += parameter.numel()
    return torch_dtype(votes.most_common(1)[0][0] if votes else default)


def cast(
    module: torch.nn.Module, dtype: torch.dtype, others: Mapping[str, torch.dtype] = MappingProxyType({})
) -> torch.nn.Module:
    """The module in a floating dtype, in place, the tensors at the paths ``others`` in that which stands there; its
    complex numbers, of which ``module.to`` keeps the real parts alone, stay as they are."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    wanted = {id(tensor): others.get(path, dtype) for path, tensor in named if tensor.is_floating_point()}
    apply: Any = module._apply
    apply(lambda tensor: tensor.to(wanted.get(id(tensor), tensor.dtype)))
    return module
