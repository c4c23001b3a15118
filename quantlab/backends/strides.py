"""The layout of saved tensors. A file holds a tensor row after row; what is loaded from it lies as it did when saved.

A kernel's sums depend on the layout of what it multiplies: on some processors the same values in another one give other
bits. Weights need not lie row after row: a low-rank branch comes transposed from its decomposition, and a model's own
weight may be a transposed view.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

Strides = Mapping[str, list[int]]


def strides_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    """Name -> strides of the tensors that copies keep in another layout than row after row."""
    import torch

    kept = {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
    return {name: list(copy.stride()) for name, copy in kept.items() if not copy.is_contiguous()}


def with_strides(tensors: Mapping[str, Tensor], strides: Strides) -> dict[str, Tensor]:
    """The tensors, those that ``strides`` names laid out so."""
    return {name: _laid_out(value, strides[name]) if name in strides else value for name, value in tensors.items()}


def _laid_out(tensor: Tensor, stride: list[int]) -> Tensor:
    import torch

    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
