"""From a ``NVIDIAModelOptConfig`` to quantized layers, and from their tensors back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, TypeGuard

from quantlab.backends.casting import cast_around, wanted_dtype
from quantlab.backends.modelopt.config import NVIDIAModelOptConfig
from quantlab.backends.modelopt.library import BRANCH, insert, layers_at, named_failure, quiet_library, settle, shape_of
from quantlab.backends.modelopt.packing import pack
from quantlab.backends.modelopt.quantizers import BLOCKS, activation_cfg, build_quant_cfg, is_packable, weight_cfg
from quantlab.errors import ConfigError, NotQuantized
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.dtypes import E4M3_SCALE
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from quantlab.backends.modelopt.library_types import QuantLinear, TensorQuantizer

PACKED = {
    "INT8QTensor": "int8",
    "INT4QTensor": "int4",
    "FP8QTensor": "float8_e4m3",
    "NVFP4QTensor": "nvfp4",
    "MXFP8QTensor": "mxfp8",
    "MXFP4QTensor": "mxfp4",
}
"""Class of a packed weight -> dtype."""


def resolve(config: NVIDIAModelOptConfig, device: str, compute_dtype: str = "float32") -> NVIDIAModelOptConfig:
    """The config itself: nothing in it depends on the device."""
    return config


def quantize(
    model: nn.Module,
    layers: Iterable[str],
    config: NVIDIAModelOptConfig,
    compute_dtype: str | torch.dtype | None = None,
    calibrated: None = None,
) -> None:
    """Quantize each named ``nn.Linear`` of ``model``, in place; all are checked before the first changes.

    The layers are handed to ModelOpt alone, so that no other module of the model gets quantizers. ``compute_dtype`` is
    a name or a torch dtype; None or ``auto`` keeps each layer's own. Layers of a config that needs data are those that
    ``calibrate`` has been through: they hold their scales themselves, and ``calibrated`` is not read.

    Raises ConfigError naming a layer that the scheme cannot take or that was not calibrated, and NotQuantized naming
    one that the library left as it was.
    """
    named = layers_at(model, layers)
    if config.needs_data:
        _require_calibrated(named, config)
    else:
        begin(named, config, {name: wanted_dtype(layer, compute_dtype, "modelopt") for name, layer in named.items()})
        insert_without_data(named, config, None)
    finish(named, config)


def _require_calibrated(named: Mapping[str, QuantLinear], config: NVIDIAModelOptConfig) -> None:
    left = [name for name, layer in named.items() if getattr(layer, "calibrated_by", None) != config]
    if not left:
        return
    key, plain = (
        (f"algorithm={config.algorithm}", "algorithm=max")
        if config.algorithm not in ("max", "mse")
        else ("activation_scales=static", "activation_scales=dynamic")
    )
    raise ConfigError(
        f"{key}: {some_of(left)} saw no calibration data, which it needs; give calibration data, or set {plain}"
    )


def begin(named: Mapping[str, QuantLinear], config: NVIDIAModelOptConfig, dtypes: Mapping[str, torch.dtype]) -> None:
    """Check all layers, then bring each into the dtype that it shall compute in."""
    build_quant_cfg(config, {name: shape_of(layer) for name, layer in named.items()})
    for name, layer in named.items():
        if is_quantized(layer):
            raise ConfigError(
                f"quant_type={config.quant_type}: {name} is already quantized by ModelOpt; load the unquantized model"
            )
        if {config.weight_type, config.activation_type} & set(BLOCKS) and layer.weight.device.type != "cuda":
            raise ConfigError(
                f"quant_type={config.quant_type}: ModelOpt computes it on CUDA only and {name} is on "
                f"{layer.weight.device.type}; use int8, int4 or float8_e4m3"
            )
    for name, layer in named.items():
        outside = layer.weight.dtype
        layer.to(dtypes[name])
        cast_around(layer, dtypes[name], outside)


def insert_without_data(named: Mapping[str, QuantLinear], config: NVIDIAModelOptConfig, algorithm: str | None) -> None:
    """Quantizers with scales from the weights alone, by ``config``'s algorithm or another."""
    if not named:
        return
    insert(named, config, algorithm)
    for layer in named.values():
        settle(layer, config, activation_cfg(config))


def finish(named: Mapping[str, QuantLinear], config: NVIDIAModelOptConfig) -> None:
    """Pack what ModelOpt has a packed form of; NotQuantized naming the layers without a quantizer."""
    told = {name: weight_cfg(config, name, shape_of(layer)) for name, layer in named.items()}
    packable = {name: layer for name, layer in named.items() if is_packable(config, told[name])}
    if packable:
        with quiet_library(), named_failure(config, list(packable)):
            pack(list(packable.values()), config.algorithm == "max")
    for layer in named.values():
        layer.__dict__.pop("calibrated_by", None)
    left = [name for name, layer in named.items() if not is_quantized(layer)]
    if left:
        raise NotQuantized(
            f"quant_type={config.quant_type}: ModelOpt left {some_of(left)} unquantized; exclude "
            "them with modules_to_not_convert"
        )


# -- what the tensors show


def is_quantized(layer: nn.Module) -> TypeGuard[QuantLinear]:
    """Whether the layer has a weight quantizer that is switched on."""
    quantizer = getattr(layer, "weight_quantizer", None)
    return quantizer is not None and bool(quantizer.is_enabled)


def packed_class(layer: nn.Linear) -> str:
    """Name of the class of a packed weight; "" where the weight is dense."""
    metadata = getattr(layer.weight, "metadata", None) or {}
    return getattr(metadata.get("qtensor_class"), "__name__", "")


def read_back(layer: nn.Module) -> StoredWeight:
    """What the layer's tensors show; the group size is counted from the number of scales.

    ``dense`` is the weight in effect: scales of the input's channels and a low-rank branch are part of it.

    A weight that is not packed is dense and rounded at every use: its format is the quantizer's and it is simulated.
    Raises NotQuantized where the layer has no quantizer.
    """
    import torch

    if not is_quantized(layer):
        raise NotQuantized(
            f"backend=modelopt: {type(layer).__name__} holds an unquantized weight; it was not converted"
        )
    quantizer, packed = layer.weight_quantizer, packed_class(layer)
    with torch.no_grad(), quiet_library():
        dense = _effective(layer, quantizer(layer.weight).detach())
    dtype, blocks = stored_dtype(layer), quantizer.block_sizes
    scales: Tensor | None = quantizer._scale if packed else getattr(quantizer, "_amax", None)
    num_scales = scales.numel() if scales is not None else 1
    if dtype in ("nvfp4", "mxfp8", "mxfp4") and not packed and blocks:  # its scales exist only while it computes
        num_scales = dense.numel() // blocks[-1]
    by_row = num_scales in (1, dense.shape[0])
    inputs = layer.input_quantizer
    pre_scale = inputs.pre_quant_scale
    return StoredWeight(
        dtype=dtype,
        group_size=None if by_row else dense.numel() // num_scales,
        dense=dense,
        column_scale=None if pre_scale is None else 1 / pre_scale.float().flatten(),
        span=dense.numel() if num_scales == 1 or dtype == "nvfp4" else None,
        span_error=E4M3_SCALE if dtype == "nvfp4" else None,
        is_simulated=not packed or dtype != PACKED.get(packed),
        activation_dtype=_simulated_dtype(inputs) if inputs.is_enabled else "none",
        activation_granularity=_granularity(inputs) if inputs.is_enabled else "",
    )


def stored_dtype(layer: QuantLinear) -> str:
    """The format of a layer's weight; integers of fewer bits are packed as 8, and only the quantizer knows."""
    packed = packed_class(layer)
    return PACKED[packed] if packed in PACKED and packed != "INT8QTensor" else _simulated_dtype(layer.weight_quantizer)


def _effective(layer: QuantLinear, dense: Tensor) -> Tensor:
    """What the layer multiplies its input by: the rounded weight with the low-rank branch and the input's scales."""
    down, up = (getattr(layer.weight_quantizer, key, None) for key in BRANCH)
    if down is not None and up is not None:
        dense = dense.float() + up.float() @ down.float()
    scale = layer.input_quantizer.pre_quant_scale
    return dense if scale is None else dense.float() * scale.float().reshape(1, -1)


def _granularity(inputs: TensorQuantizer) -> str:
    if inputs.block_sizes:
        return "per-block"
    return ("per-tensor" if inputs.axis is None else "per-token") + " static" * (not inputs._dynamic)


def _simulated_dtype(quantizer: TensorQuantizer) -> str:
    bits, blocks = quantizer.num_bits, quantizer.block_sizes or {}
    if isinstance(bits, int):
        return f"int{bits}"
    scale_bits = blocks.get("scale_bits")
    names: dict[object, str] = {(2, 1, (4, 3)): "nvfp4", (2, 1, (8, 0)): "mxfp4", (4, 3, (8, 0)): "mxfp8"}
    wide: dict[tuple[int, ...], str] = {(4, 3): "float8_e4m3", (5, 2): "float8_e5m2"}
    plain = wide.get(tuple(bits), f"float_e{bits[0]}m{bits[1]}")
    return names.get((*bits, tuple(scale_bits) if scale_bits else None), plain)
