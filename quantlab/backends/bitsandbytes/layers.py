"""The two layers that stand in a ``nn.Linear``'s place: the library's own, made to take every shape and rank."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

from quantlab.errors import ModelError
from quantlab.vocabulary.dtypes import dtype_name

WEIGHTS_AT_ONCE = 1 << 20
"""What is made of weights on a CPU is made of so many at once; a multiple of every block size."""

if TYPE_CHECKING:
    import torch
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Params4bit
    from torch import Tensor


def library() -> ModuleType:
    import bitsandbytes

    return bitsandbytes


def dense_4bit(weight: Params4bit, dtype: torch.dtype) -> Tensor:
    """The dequantized weight, (out_features, in_features), in ``dtype``."""
    import torch

    bnb = library()
    state = weight.quant_state
    absmax = state.absmax
    if state.state2 is not None:
        absmax = bnb.functional.dequantize_blockwise(absmax, state.state2) + state.offset
    is_compiled = state.shape[-1] % 2 or state.blocksize >= 2048
    is_crossing = state.shape[-1] % state.blocksize  # blocks over the ends of rows, which its CPU kernel misreads
    if weight.device.type != "cpu" or not (is_compiled or is_crossing):
        return torch.ops.bitsandbytes.dequantize_4bit.default(
            weight.data, absmax, state.blocksize, state.quant_type, state.shape, dtype
        )
    return decoded_4bit(weight, dtype)  # the library would compile C++ at each shape, or take other blocks' scales


def decoded_4bit(weight: Params4bit, dtype: torch.dtype, kept_in: torch.dtype | None = None) -> Tensor:
    """The same by the format's definition, without a kernel of the library: what read-back holds its layers against.

    ``kept_in``: the dtype of the result, whose values are those of ``dtype``; None: it too.

    Two codes a byte, the first in the high half, are indices into the 16 values of the type; times the block's scale,
    which with double quantization is itself an index into 256 values, times a scale a block of blocks, plus a mean.
    """
    import torch

    state, num = weight.quant_state, math.prod(weight.quant_state.shape)
    codes, absmax = weight.data.reshape(-1).view(torch.uint8), state.absmax
    if (nested := state.state2) is not None:
        scales = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code[absmax.int()] * scales + state.offset
    made = torch.empty(num, dtype=kept_in or dtype, device=codes.device)
    both = torch.stack((state.code.float().repeat_interleave(16), state.code.float().repeat(16)), dim=-1)
    table = both.view(torch.int64).reshape(-1)  # byte -> its two values, looked up as one number
    per_piece = WEIGHTS_AT_ONCE // state.blocksize  # whole, the indices alone would be four times the codes
    most = min(per_piece * state.blocksize, absmax.numel() * state.blocksize) // 2
    indices = torch.empty(most, dtype=torch.int32, device=codes.device)  # one piece's memory serves all
    found = torch.empty(most, dtype=torch.int64, device=codes.device)
    for first in range(0, absmax.numel(), per_piece):
        rows = slice(first * state.blocksize, min((first + per_piece) * state.blocksize, num))
        pairs = codes[rows.start // 2 : -(-rows.stop // 2)]
        index = indices[: len(pairs)].copy_(pairs)
        torch.index_select(table, 0, index, out=found[: len(pairs)])
        scales = absmax[first : first + per_piece]
        values = found.view(torch.float32)[: len(scales) * state.blocksize].view(-1, state.blocksize)
        made[rows] = values.mul_(scales[:, None]).reshape(-1)[: rows.stop - rows.start].to(dtype)
    return made.reshape(state.shape)


def _floating(input: Tensor) -> Tensor:
    """``input``; ModelError where it is of integers, as when a model casts to the dtype of this layer's codes."""
    if not input.is_floating_point():
        raise ModelError(
            f"modules_to_not_convert: a layer of bitsandbytes got inputs of {dtype_name(input.dtype)}, as the model "
            "casts them to the dtype of the layer's weight, which is codes now; exclude the layer (in T5: *.wo)"
        )
    return input


def _is_wanted(record: logging.LogRecord) -> bool:
    """The library logs its cast to float16 at every int8 product."""
    return "inputs will be cast from" not in record.getMessage()


@functools.cache
def layer_classes() -> dict[str, Any]:
    """The two layers, made at first use because their bases need torch."""
    import torch

    bnb = library()
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_wanted)

    class QuantizedLinear4bit(bnb.nn.Linear4bit):  # type: ignore[misc, name-defined]
        """Linear4bit that never repacks its weight, takes every shape, and leaves its bias as it is."""

        def __init__(self, codes: Tensor, state: QuantState, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
            out_features, in_features = state.shape
            super().__init__(
                in_features,
                out_features,
                bias is not None,
                compute_dtype,
                state.nested,
                state.quant_type,
                codes.dtype,
                device="meta",
            )
            # On CPUs with AVX512-BF16 the library's forward would repack codes and scales in place, lossily.
            self.support_avx512bf16_for_cpu = False
            self.weight = bnb.nn.Params4bit(
                codes,
                quant_state=state,
                blocksize=state.blocksize,
                compress_statistics=state.nested,
                quant_type=state.quant_type,
                quant_storage=codes.dtype,
                bnb_quantized=True,
            )
            self.bias = bias

        def forward(self, input: Tensor) -> Tensor:
            """input (..., in_features) -> (..., out_features), in its dtype; named as ``nn.Linear`` names it."""
            inputs = _floating(input).to(self.compute_dtype)
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            if input.device.type == "cpu":
                dense = dense_4bit(self.weight, self.compute_dtype)
                return torch.nn.functional.linear(inputs, dense, bias).to(input.dtype)
            return bnb.matmul_4bit(inputs, self.weight, bias=bias, quant_state=self.weight.quant_state).to(input.dtype)

    class QuantizedLinear8bit(bnb.nn.Linear8bitLt):  # type: ignore[misc, name-defined]
        """Linear8bitLt for inputs of any rank, the same in train and eval mode, that leaves its bias as it is."""

        def __init__(
            self, codes: Tensor, scales: Tensor, bias: Tensor | None, threshold: float, compute_dtype: torch.dtype
        ) -> None:
            out_features, in_features = codes.shape
            super().__init__(
                in_features, out_features, bias is not None, has_fp16_weights=False, threshold=threshold, device="meta"
            )
            self.weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
            self.init_8bit_state()
            self.state.is_training = False  # the library's train mode would not round the inputs
            self.bias = bias
            self.compute_dtype = compute_dtype

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
            super()._apply(fn, recurse)
            self.state.CB, self.state.SCB = self.weight.data, self.state.SCB.to(self.weight.device)
            return self

        def forward(self, input: Tensor) -> Tensor:
            """input (..., in_features) -> (..., out_features), in its dtype; named as ``nn.Linear`` names it."""
            # The CUDA kernel that rounds the inputs reads memory row after row, whatever the strides say.
            inputs = _floating(input).to(self.compute_dtype).reshape(-1, input.shape[-1]).contiguous()
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            state = self.state
            if self.in_features == 1:  # torch._int_mm returns unset memory on CPUs then: a column of zeros beside it
                inputs, state = torch.nn.functional.pad(inputs, (0, 1)), copy.copy(state)
                state.CB = torch.nn.functional.pad(state.CB, (0, 1))
            out = bnb.matmul(inputs, self.weight, bias=bias, state=state)
            self.state.idx = None  # the outliers' columns of this call, which would lie in the layer until the next
            return out.reshape(*input.shape[:-1], self.out_features).to(input.dtype)

    classes: dict[str, Any] = {c.__name__: c for c in (QuantizedLinear4bit, QuantizedLinear8bit)}
    for name, made in classes.items():
        made.__qualname__ = name  # found by pickle through __getattr__ below
    return classes


def __getattr__(name: str) -> Any:
    if name in ("QuantizedLinear4bit", "QuantizedLinear8bit"):
        return layer_classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
