"""Layers of libraries that are no backend: what compressed-tensors and SDNQ hold, read from their tensors.

The library's own code decodes the weight; format, group size and bits are counted from the tensors that it decodes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from quantlab.errors import ModelError
from quantlab.vocabulary.dtypes import DTYPES, E4M3_SCALE, dtype_name
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    from torch import Tensor, nn

_FLOATS = {"torch.float8_e4m3fn": "float8_e4m3", "torch.float8_e5m2": "float8_e5m2"}
_OF_SDNQ = (
    "scale",
    "scale_2",
    "scale_zero_point",
    "zero_point",
    "zero_point_scale",
    "zero_point_2",
    "svd_up",
    "svd_down",
)
WHOLE_MODEL = "its library unpacks it when the model first runs, so that its product alone was not tried"


def read_by_its_library(layer: nn.Module, key: str, dtype: str) -> StoredWeight | None:
    """What the layer's tensors show; None for a layer of another library, or a format that is not known here.

    ModelError, beginning with ``key``, for one that its library unpacks to another dtype than ``dtype``, in which its
    inputs come.
    """
    if hasattr(layer, "quantization_scheme"):
        return _compressed_tensors(layer, key, dtype)
    if hasattr(layer, "sdnq_dequantizer"):
        return _sdnq(layer)
    return None


def packed_integers(layer: nn.Module, num_rows: int, num_weights: int) -> tuple[str, int | None] | None:
    """Dtype and group size of the integers that layers of GPTQ, AWQ and AutoRound pack into words of 32 bits, by what
    their codes and scales occupy; None for other layers."""
    import torch

    codes, scales = getattr(layer, "qweight", None), getattr(layer, "scales", None)
    if not isinstance(codes, torch.Tensor) or not isinstance(scales, torch.Tensor) or not scales.numel():
        return None
    dtype = _name(codes, num_weights) if codes.dtype == torch.int32 else None
    if dtype is None or num_weights % scales.numel():
        return None
    return dtype, None if scales.numel() in (1, num_rows) else num_weights // scales.numel()


def _compressed_tensors(layer: Any, key: str, model_dtype: str) -> StoredWeight | None:
    import torch

    scheme = layer.quantization_scheme
    held = {**layer._parameters, **layer._buffers}
    scale, stored = held.get("weight_scale"), held.get("weight_packed", held.get("weight"))
    if scheme.weights is None or scale is None or stored is None or stored.dtype in (torch.float32, torch.bfloat16):
        return None
    base = importlib.import_module("compressed_tensors.compressors.base")
    kind = scheme.format or base.infer_module_format(type(layer), scheme)
    compressor = base.BaseCompressor.get_value_from_registry(getattr(kind, "value", kind))
    with torch.no_grad():
        tensors = {name: tensor.data for name, tensor in held.items() if tensor is not None}
        unpacked = compressor.decompress(tensors, scheme)["weight"]
    if (found := dtype_name(unpacked.dtype)) != model_dtype:
        raise ModelError(
            f"{key}: compressed-tensors unpacks {getattr(kind, 'value', kind)} to {found}, which a model in "
            f"{model_dtype} cannot run; pass model.dtype={found}"
        )
    dense = unpacked.float()
    is_nvfp4 = "weight_global_scale" in held
    dtype = "nvfp4" if is_nvfp4 and stored.dtype == torch.uint8 else _name(stored, dense.numel())
    inputs = scheme.input_activations
    if dtype is None or (is_nvfp4 and dtype != "nvfp4"):
        return None
    return StoredWeight(
        dtype=dtype,
        group_size=_group(dense, scale),
        dense=dense,
        span=dense.numel() if is_nvfp4 or scale.numel() == 1 else None,
        span_error=E4M3_SCALE if is_nvfp4 else None,
        activation_dtype="none" if inputs is None else _activations(inputs),
        activation_granularity="" if inputs is None else f"per-{getattr(inputs.strategy, 'value', inputs.strategy)}",
        note=WHOLE_MODEL,
    )


def _activations(inputs: Any) -> str:
    kind, bits = getattr(inputs.type, "value", inputs.type), inputs.num_bits
    return {"int8": "int8", "float8": "float8_e4m3", "float4": "nvfp4"}.get(f"{kind}{bits}", f"{kind}{bits}")


def _sdnq(layer: Any) -> StoredWeight | None:
    import torch

    dequantizer, weight = layer.sdnq_dequantizer, layer.weight.data
    if dequantizer.use_codebook or not (dequantizer.is_integer or str(weight.dtype) in _FLOATS):
        return None
    told = {name: getattr(layer, name, None) for name in _OF_SDNQ}
    with torch.no_grad():
        dense = dequantizer(weight, **told, skip_compile=True, dtype=torch.float32).float()
    dtype = _name(weight, dense.numel())
    if dtype is None:
        return None
    return StoredWeight(
        dtype=dtype,
        group_size=_group(dense, layer.scale),
        dense=dense,
        span=dense.numel() if layer.scale.numel() == 1 else None,
        activation_dtype=str(dequantizer.quantized_matmul_dtype) if dequantizer.use_quantized_matmul else "none",
    )


def _name(stored: Tensor, num_weights: int) -> str | None:
    """The format by the bits that a weight takes; None for one that has no name here."""
    if str(stored.dtype) in _FLOATS:
        return _FLOATS[str(stored.dtype)]
    bits = 8 * stored.numel() * stored.element_size() / num_weights
    name = f"int{bits:.0f}"
    return name if not stored.is_floating_point() and bits == int(bits) and name in DTYPES else None


def _group(dense: Tensor, scale: Tensor) -> int | None:
    """Weights that share a scale; None: one a row, or one for all."""
    return None if scale.numel() in (1, len(dense)) else dense.numel() // scale.numel()
