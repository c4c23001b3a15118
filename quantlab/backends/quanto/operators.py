"""Three operators of the library, replaced once per process."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor


WEIGHTS_AT_ONCE = 1 << 18
"""That are rounded together; of a whole layer the library makes two copies in its weight's dtype, and one for codes."""


@functools.cache
def override_operators() -> torch.library.Library:
    """Replace three operators of the library; returns what keeps the replacement alive.

    ``qbytes_mm`` on a CPU hands bfloat16 products with int8 weights to ``torch._weight_int8pack_mm``, which reads
    past rows that are not aligned to 16 bytes: a crash, or infinities; on a GPU it takes rounded activations of 2 or 3
    dimensions only. ``unpack`` is compiled at its first use, by a C++ or CUDA compiler that a user need not have.
    ``quantize_affine`` holds several copies of a whole layer. Each becomes a few tensor operations, with the same
    result.
    """
    import warnings

    import optimum.quanto  # noqa: F401  (defines the operators)
    import torch

    library: Any = torch.library.Library("quanto", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():  # that a kernel is overridden is the purpose
        warnings.simplefilter("ignore", UserWarning)
        for device in ("CPU", "CUDA"):
            library.impl("qbytes_mm", _qbytes_mm, device, allow_override=True)
            library.impl("unpack", _unpack, device, allow_override=True)
            library.impl("quantize_affine", _quantize_affine, device, allow_override=True)
    return library


def _qbytes_mm(activations: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """(..., k), (n, k) and (n, 1) -> (..., n) in the dtype of ``scales``."""
    import torch

    if activations.dtype.itemsize > 1:
        return torch.matmul(activations.to(scales.dtype), (weights.to(scales.dtype) * scales).t())
    rows = activations.reshape(-1, activations.shape[-1])
    is_integer = rows.dtype == weights.dtype == torch.int8
    is_aligned = len(rows) > 16 and not (len(rows) % 8 or rows.shape[1] % 8 or len(weights) % 8)  # what the kernel asks
    if is_integer and is_aligned and rows.is_cuda:
        sums = torch._int_mm(rows, weights.t()).float()
    else:  # sums are kept in float32, as 8-bit kernels do
        sums = torch.matmul(rows.float(), weights.float().t())
    return (sums * scales.t().float()).to(scales.dtype).reshape(*activations.shape[:-1], len(weights))


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """Codes of ``bits`` bits, (rows, ...) -> (8 / bits * rows, ...): first the lowest of each byte."""
    import torch

    made = packed.new_empty(8 // bits, *packed.shape)
    for i, part in enumerate(made):
        torch.bitwise_right_shift(packed, bits * i, out=part).bitwise_and_((1 << bits) - 1)
    return made.flatten(0, 1)


def _quantize_affine(
    base: Tensor, bits: int, axis: int, group_size: int | None, scale: Tensor, shift: Tensor
) -> Tensor:
    """Codes, one a byte, in the shape of ``base``, or of its groups: (groups, group_size) for ``axis=0``."""
    import torch
    from optimum.quanto.tensor.grouped import group

    weight = base if group_size is None else group(base, axis=axis, group_size=group_size)
    step = max(1, len(weight) if axis else WEIGHTS_AT_ONCE // max(1, weight.shape[1]))
    made = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    scales, shifts = ([t] if axis else torch.split(t, step) for t in (scale, shift))
    for out, some, factor, least in zip(
        torch.split(made, step), torch.split(weight, step), scales, shifts, strict=True
    ):
        if shift.dtype.is_floating_point:
            codes = ((some + least) / factor).round_()
        else:
            codes = (some / factor).round_() + least
        out.copy_(codes.clamp_(0, 2**bits - 1))
    return made
