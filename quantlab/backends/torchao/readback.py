"""What the tensors of a torchao layer show."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from quantlab.errors import NotQuantized
from quantlab.vocabulary.dtypes import E4M3_SCALE, dtype_name
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantlab.backends.torchao.library_types import (
        Float8Tensor,
        Int4OpaqueTensor,
        Int4TilePackedTo4dTensor,
        Int8Tensor,
        IntxUnpackedToInt8Tensor,
        MXTensor,
        NF4Tensor,
        NVFP4Tensor,
    )


def is_quantized(layer: nn.Module) -> bool:
    """Whether the layer's weight is one of torchao's tensor classes."""
    return any(kind.__name__ in _READERS for kind in type(getattr(layer, "weight", None)).__mro__)


def read_back(layer: nn.Module) -> StoredWeight:
    """What the layer's tensors show; the group size is counted from the number of scales.

    Raises NotQuantized where the layer holds no weight of torchao, or one whose scales do not add up.
    """
    if not is_quantized(layer):
        raise NotQuantized(f"backend=torchao: {type(layer).__name__} holds an unquantized weight; it was not converted")
    weight = cast("Tensor", layer.weight)
    kind = _kind(weight)
    dtype, num_scales, activation = _READERS[kind](weight)
    numel, num_rows = weight.numel(), weight.shape[0]
    if num_scales not in (1, num_rows) and numel % num_scales:
        raise NotQuantized(f"dtype={dtype}: {num_scales} scales for {numel} weights do not add up; report this layer")
    span, span_error = _span(weight, kind, num_scales)
    pre_scale: Tensor | None = getattr(weight, "act_pre_scale", None)
    return StoredWeight(
        dtype=dtype,
        group_size=None if num_scales in (1, num_rows) else numel // num_scales,
        dense=_dense(weight, kind),
        column_scale=None if pre_scale is None else 1 / pre_scale.float().flatten(),
        span=span,
        span_error=span_error,
        is_simulated=kind == "IntxUnpackedToInt8Tensor" and dtype != "int8",
        activation_dtype=activation,
        activation_granularity=_granularity(weight) if activation != "none" else "",
    )


def _granularity(weight: Any) -> str:
    """Which activations share a scale, by what the weight tells the library to do with them."""
    if getattr(weight, "act_quant_scale", None) is not None:
        return "per-tensor static"
    told = getattr(weight, "act_quant_kwargs", None)
    if told is None:
        return "per-token"  # of the integer formats that dequantize: their only kind
    if hasattr(told, "block_size"):
        return "per-block"
    return "per-tensor" if type(told.granularity).__name__ == "PerTensor" else "per-token"


def _span(weight: Tensor, kind: str, num_scales: int) -> tuple[int | None, float | None]:
    """``StoredWeight.span`` and ``span_error``."""
    if kind == "NF4Tensor":  # the blocks' scales less their mean are 8-bit integers, with a scale for 256 of them
        nested = cast("NF4Tensor", weight)
        return nested.scaler_block_size * nested.block_size, 1 / 127
    if kind == "NVFP4Tensor" and cast("NVFP4Tensor", weight).per_tensor_scale is not None:
        return weight.numel(), E4M3_SCALE
    return weight.numel() if num_scales == 1 else None, None


def stored_dtype(weight: Tensor) -> str:
    """The format of a weight of one of torchao's tensor classes."""
    return _READERS[_kind(weight)](weight)[0]


def _kind(weight: Tensor) -> str:
    return next(k.__name__ for k in type(weight).__mro__ if k.__name__ in _READERS)


def _read_int8(weight: Int8Tensor) -> tuple[str, int, str]:
    dtype = dtype_name(weight.qdata.dtype)
    return dtype, weight.scale.numel(), "none" if weight.act_quant_kwargs is None else "int8"


def _read_intx(weight: IntxUnpackedToInt8Tensor) -> tuple[str, int, str]:
    activation = weight.activation_quantization
    return dtype_name(weight.target_dtype), weight.scale.numel(), "none" if activation is None else "int8"


def _read_tile_packed(weight: Int4TilePackedTo4dTensor) -> tuple[str, int, str]:
    """The scales stand in a (padded in_features / group, padded out_features, 2) tensor beside the zero points."""
    num_groups = weight.scale_and_zero.shape[-3]
    padded_in_features = weight.qdata.shape[-3] * 128  # inner_k_tiles 8 times a tile of 16
    num_scales = weight.shape[0] * max(1, weight.shape[1] * num_groups // padded_in_features)
    return "int4", num_scales, "none"


def _read_float8(weight: Float8Tensor) -> tuple[str, int, str]:
    dtype = _float8_name(weight.qdata.dtype)
    return dtype, weight.scale.numel(), "none" if weight.act_quant_kwargs is None else dtype


def _float8_name(dtype: torch.dtype) -> str:
    return {"float8_e4m3fn": "float8_e4m3"}.get(dtype_name(dtype), dtype_name(dtype))


def _read_opaque(weight: Int4OpaqueTensor) -> tuple[str, int, str]:
    """The scales stand beside the zero points, (in_features / group, out_features, 2)."""
    return "int4", weight.scale_and_zero.numel() // 2, "none"


def _read_nf4(weight: NF4Tensor) -> tuple[str, int, str]:
    return "nf4", weight.quantized_scalers.numel(), "none"


def _read_nvfp4(weight: NVFP4Tensor) -> tuple[str, int, str]:
    return "nvfp4", _num_blocks(weight, "nvfp4"), "none" if weight.act_quant_kwargs is None else "nvfp4"


def _read_mx(weight: MXTensor) -> tuple[str, int, str]:
    dtype = {"float8_e4m3fn": "mxfp8", "float4_e2m1fn_x2": "mxfp4"}.get(dtype_name(weight.elem_dtype), "mx")
    return dtype, _num_blocks(weight, dtype), "none" if weight.act_quant_kwargs is None else dtype


def _num_blocks(weight: NVFP4Tensor | MXTensor, dtype: str) -> int:
    """Blocks of an MX or NVFP4 weight; its swizzled scales are padded to tiles of 128 rows and 4 columns (cuBLAS)."""
    num_rows, num_columns = weight.shape[0], weight.shape[1] // weight.block_size
    padded = -(-num_rows // 128) * 128 * (-(-num_columns // 4) * 4)
    if weight.scale.numel() not in (num_rows * num_columns, padded):
        raise NotQuantized(
            f"dtype={dtype}: {weight.scale.numel()} scales do not cover blocks of {weight.block_size}; "
            "report this layer"
        )
    return num_rows * num_columns


_READERS: dict[str, Callable[[Any], tuple[str, int, str]]] = {
    "Int8Tensor": _read_int8,
    "IntxUnpackedToInt8Tensor": _read_intx,
    "Int4TilePackedTo4dTensor": _read_tile_packed,
    "Int4OpaqueTensor": _read_opaque,
    "Float8Tensor": _read_float8,
    "PrototypeFloat8Tensor": _read_float8,
    "NF4Tensor": _read_nf4,
    "NVFP4Tensor": _read_nvfp4,
    "MXTensor": _read_mx,
}
"""Tensor class of torchao -> (dtype, number of scales, activation dtype) of a weight of it."""


def _dense(weight: Tensor, kind: str) -> Tensor:
    """The weight that a layer multiplies its own input with: dequantized, its columns scaled as the input is."""
    import torch

    with torch.no_grad():
        dense = _dequantized(weight, kind)
        pre_scale: Tensor | None = getattr(weight, "act_pre_scale", None)
        return dense if pre_scale is None else dense.float() * pre_scale.float()


def _dequantized(weight: Tensor, kind: str) -> Tensor:
    import torch

    with torch.no_grad():
        if kind == "Int4OpaqueTensor":
            return _from_opaque(cast("Int4OpaqueTensor", weight))
        if kind == "NF4Tensor":
            return cast("NF4Tensor", weight).get_original_weight()
        if kind == "Int4TilePackedTo4dTensor":
            return _from_tiles(cast("Int4TilePackedTo4dTensor", weight))
        return weight.dequantize()


def _from_tiles(weight: Int4TilePackedTo4dTensor) -> Tensor:
    """Codes from the layout of ``aten::_convert_weight_to_int4pack``, whose product would have hidden its own faults.

    A tile is 8 rows by 16 columns, as a warp's 32 lanes take operand B of ``mma.m16n8k16``; a lane holds pairs of
    neighbouring columns, 8 apart, of two tiles in one 32-bit word: first the even columns', then the odd ones'.
    """
    import torch

    num_tiles, num_outer, _, num_words = weight.qdata.shape
    shifts = torch.tensor([0, 16, 4, 20, 8, 24, 12, 28], device=weight.qdata.device, dtype=torch.int32)
    codes = ((weight.qdata.unsqueeze(-1) >> shifts) & 15).reshape(num_tiles, num_outer, 8, 4, num_words, 4, 2)
    codes = codes.permute(0, 2, 1, 4, 5, 3, 6).reshape(num_tiles * 8, -1)
    group = codes.shape[1] // weight.scale_and_zero.shape[0]
    scales, zeros = weight.scale_and_zero.float().repeat_interleave(group, dim=0).transpose(0, 1).unbind(-1)
    dense = ((codes - 8) * scales[: len(codes)] + zeros[: len(codes)]).to(torch.bfloat16)
    return dense[: weight.shape[0], : weight.shape[1]]


def _from_opaque(weight: Int4OpaqueTensor) -> Tensor:
    """Its layout differs between processors, so the kernel itself unpacks it: codes times the identity.

    With scales of 1 and zero points of 0 the products are the codes minus 8, whole numbers that bfloat16 holds exactly;
    the weight's own scales and zero points are applied to them as the kernel does.
    """
    import torch

    group, in_features = weight.block_size[1], weight.shape[1]
    ones_and_zeros = torch.zeros(weight.scale_and_zero.shape, dtype=torch.bfloat16)
    ones_and_zeros[..., 0] = 1
    eye = torch.eye(in_features, dtype=torch.bfloat16)
    codes = torch.ops.aten._weight_int4pack_mm_for_cpu(eye, weight.qdata, group, ones_and_zeros)
    scales, zeros = weight.scale_and_zero.float().repeat_interleave(group, dim=0).unbind(-1)
    return (codes.float() * scales + zeros).t().contiguous()
