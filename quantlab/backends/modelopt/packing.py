"""From calibrated scales to packed weights, in ModelOpt's own packed classes.

The library's ``compress`` takes the scales of 8- and 4-bit integers from each block's maximum once more, and so drops
what ``mse``, ``awq_clip``, ``gptq`` and ``local_hessian`` found. Here the codes are those of the calibrated maxima.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantlab.backends.modelopt.library_types import BaseQuantizedTensor, QuantLinear, TensorQuantizer

CODES_AT_ONCE, ON_A_GPU = 2**18 - 2**10, 2**20
"""Pairs of 4-bit codes that are packed or unpacked together: just below 1 MiB for each of the 16-bit tensors between
them. From there on the system has a tensor back at once while a model is streamed, and the next one's pages are new;
below they are those of the one before. On a GPU, where each slice is a handful of launches, 4 MiB."""


def pack(layers: list[QuantLinear], is_max: bool) -> None:
    """Replace the dense weights of calibrated layers by codes and scales, in place.

    ``is_max``: the scales are the maxima's, and the library packs as its ``compress`` does, bit for bit. That rounds a
    few ties otherwise than the simulation.
    """
    import torch

    in_slices()
    compress = importlib.import_module("modelopt.torch.quantization.compress")
    on_cpu = layers[0].weight.device.type == "cpu"  # no kernel of the library multiplies packed weights there
    config = importlib.import_module("modelopt.torch.quantization.config").CompressConfig(quant_gemm=not on_cpu)
    wrapper = importlib.import_module("modelopt.torch.quantization.qtensor").QTensorWrapper
    compress.compress_convert(holder_of(layers), config, skip_real_quantize_weight=True)
    with torch.no_grad():
        for layer in layers:
            layer.weight = wrapper(_packed(layer.weight_quantizer, layer.weight, is_max))
            if layer.weight.dtype.is_floating_point:  # a row of zeros was divided by its scale, 0
                layer.weight.data.copy_(torch.nan_to_num(layer.weight.data.float()).to(layer.weight.dtype))


@functools.cache
def in_slices() -> None:
    """Let the library pack and unpack 4-bit integers some rows at a time. It unpacks by way of 64-bit integers, which
    for a whole layer are four times its weight in 16 bits; here the result's own memory is all that is used. The same
    operations on the same numbers: the same bits."""
    import torch

    packed_class: Any = importlib.import_module("modelopt.torch.quantization.qtensor").INT4QTensor
    own, own_packing = packed_class.dequantize, packed_class.quantize.__func__

    @functools.wraps(own_packing)
    def quantize(cls: Any, input: Tensor, block_size: int) -> tuple[Any, Tensor]:
        rows = _rows_at_once(input, input.shape[-1] // 2)
        if input.ndim != 2 or input.shape[1] % block_size or len(input) <= rows:
            found: tuple[Any, Tensor] = own_packing(cls, input, block_size)
            return found
        parts = [own_packing(cls, some, block_size) for some in torch.split(input, rows)]
        codes = torch.cat([part._quantized_data for part, _ in parts])
        return cls(input.shape, input.dtype, codes), torch.cat([scales for _, scales in parts])

    @functools.wraps(own)
    def dequantize(self: Any, dtype: torch.dtype | None = None, **given: Any) -> Tensor:
        codes, shape, scales = self._quantized_data, tuple(self.metadata["shape"]), given["scale"]
        size, step = given["block_sizes"][-1], _rows_at_once(codes, codes.shape[-1])
        is_plain = codes.ndim == 2 and shape == (len(codes), 2 * codes.shape[1]) and shape[1] % size == size % 2 == 0
        if not is_plain or scales.numel() * size != 2 * codes.numel() or not scales.is_floating_point():
            found: Tensor = own(self, dtype, **given)
            return found
        made = torch.empty(len(codes), shape[1] // size, size, dtype=scales.dtype, device=codes.device)
        factors = scales.reshape(*made.shape[:2], 1)
        for part, some, factor in zip(*(torch.split(t, step) for t in (made, codes, factors)), strict=True):
            for half, code in enumerate((some >> 4, some & 15)):
                part[:, :, half::2] = code.view(*part.shape[:2], size // 2)
            part.sub_(8).div_(factor)  # whole numbers up to 15, exact in each dtype of scales
        return made.view(shape).to(dtype or self.metadata["dtype"])

    packed_class.dequantize, packed_class.quantize = dequantize, classmethod(quantize)


def _rows_at_once(tensor: Tensor, columns: int) -> int:
    return max(1, (CODES_AT_ONCE if tensor.device.type == "cpu" else ON_A_GPU) // max(1, columns))


def holder_of(layers: list[QuantLinear]) -> nn.ModuleList:
    """The layers in a module that the library takes for one it has converted."""
    import torch

    holder = torch.nn.ModuleList(layers)
    importlib.import_module("modelopt.torch.opt.conversion").ModeloptStateManager(holder, init_state=True)
    return holder


def _packed(quantizer: TensorQuantizer, weight: Tensor, is_max: bool) -> BaseQuantizedTensor:
    """The library's packed tensor of ``weight``; its scale goes to the quantizer."""
    packers = {8: _packed_int8, 3: _packed_int8, 2: _packed_int8, 4: _packed_int4, (4, 3): _packed_float8}
    has_blocks = bool(quantizer.block_sizes) and not isinstance(quantizer.num_bits, int)
    if quantizer.num_bits not in packers or has_blocks or (amax := quantizer.amax) is None:
        return quantizer(weight)
    by_library = is_max and quantizer.num_bits not in (2, 3) and not _needs_wide_factor(quantizer, amax, weight)
    if by_library:
        return quantizer(weight)  # for floats in blocks, too, the library uses the calibrated maximum
    tensor, scale = packers[quantizer.num_bits](quantizer, amax, weight)
    quantizer._set_buffer("_scale", scale)
    quantizer._dequantize = True
    return tensor


def _packed_int8(quantizer: TensorQuantizer, amax: Tensor, weight: Tensor) -> tuple[BaseQuantizedTensor, Tensor]:
    """Codes in a byte each, -128 to 127 for 8 bits, and scales, ``amax / 127``: (rows, 1), or (rows, blocks).

    3 and 2 bits, which the library only simulates, take no more codes than they have and a byte for each too. The
    library divides by the scale, the simulation multiplies by its inverse: this rounds ties as the latter does.
    """
    import torch

    qtensor = importlib.import_module("modelopt.torch.quantization.qtensor").INT8QTensor
    bound = 2 ** (cast("int", quantizer.num_bits) - 1) - 1
    scale = amax.to(weight.dtype) / bound
    if quantizer.block_sizes:
        scale = scale.reshape(weight.shape[0], -1)
    amax = amax.float().reshape(scale.shape)
    factor = bound / amax.masked_fill(amax == 0, 1)  # a block of zeros
    rows = weight.float().reshape(*factor.shape, -1) if quantizer.block_sizes else weight.float()
    codes = (rows * (factor.unsqueeze(-1) if quantizer.block_sizes else factor)).round().clamp(-bound - 1, bound)
    return qtensor(weight.shape, weight.dtype, codes.to(torch.int8).reshape(weight.shape)), scale


def _packed_int4(quantizer: TensorQuantizer, amax: Tensor, weight: Tensor) -> tuple[BaseQuantizedTensor, Tensor]:
    """Two codes a byte, the first in the high half, each code + 8; and factors, ``7 / amax``, (blocks, 1).

    The factors are of the weight's dtype, or float32 where that is too narrow for one of them.
    """
    import torch

    qtensor = importlib.import_module("modelopt.torch.quantization.qtensor").INT4QTensor
    dtype = torch.float32 if _needs_wide_factor(quantizer, amax, weight) else weight.dtype
    factor = 7 / amax.to(dtype).reshape(-1, 1)  # infinite for a block of zeros, which it divides
    blocks = weight.reshape(len(factor), -1)
    codes = torch.nan_to_num((blocks * factor).round()).clamp(-8, 7).add(8).to(torch.uint8).reshape(-1, 2)
    data = torch.bitwise_or(codes[:, 0] << 4, codes[:, 1]).reshape(weight.shape[0], -1)
    return qtensor(weight.shape, weight.dtype, data), factor


def _needs_wide_factor(quantizer: TensorQuantizer, amax: Tensor, weight: Tensor) -> bool:
    """Whether float16 would take the factor of a block of 4-bit codes for infinite, which are then read as zeros."""
    import torch

    is_small = (amax > 0) & ~(7 / amax.to(weight.dtype)).isfinite()
    return quantizer.num_bits == 4 and weight.dtype == torch.float16 and bool(is_small.any())


def _packed_float8(quantizer: TensorQuantizer, amax: Tensor, weight: Tensor) -> tuple[BaseQuantizedTensor, Tensor]:
    """Codes as ``float8_e4m3fn`` and scales, ``amax / 448``: (rows, 1), or one number; ties as for 8-bit integers."""
    import torch

    qtensor = importlib.import_module("modelopt.torch.quantization.qtensor").FP8QTensor
    wide = amax.float()
    codes = (weight.float() * (448.0 / wide.masked_fill(wide == 0, 1))).clamp(-448, 448).to(torch.float8_e4m3fn)
    return qtensor(weight.shape, weight.dtype, codes), amax / 448.0
