"""From a ``TorchAoConfig`` to quantized layers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.casting import cast_around, wanted_dtype
from quantlab.backends.linears import linear_at
from quantlab.backends.torchao.build import build_form, quiet_library
from quantlab.backends.torchao.calibrate import LayerScales, measure, rounded_by_gptq
from quantlab.backends.torchao.config import TorchAoConfig, layer_form
from quantlab.backends.torchao.forms import FLOAT8, INT4, Form
from quantlab.backends.torchao.layers import take_any_input
from quantlab.backends.torchao.readback import is_quantized
from quantlab.backends.torchao.rules import FLOAT8_STATIC, OPAQUE
from quantlab.errors import ConfigError, NotQuantized, is_of_the_machine
from quantlab.modules.feed import CalibrationFeed
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.native import canonical_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torchao.core.config import AOBaseConfig

    from quantlab.backends.torchao.library_types import Float8Tensor, NVFP4Tensor, TorchAOBaseTensor

_DYNAMIC_FLOAT8 = "Float8DynamicActivationFloat8WeightConfig"


def resolve(config: TorchAoConfig, device: str, compute_dtype: str | torch.dtype | None = None) -> TorchAoConfig:
    """The config with ``int4_packing_format=auto`` made concrete for ``device`` (``cpu`` or ``cuda``).

    On CUDA the answer depends on the dtype that the layers compute in: without ``compute_dtype`` the config stays as it
    is and :func:`quantize` decides for each layer.
    """
    if config.quant_type["_type"] != INT4 or config.int4_packing_format != "auto":
        return config
    is_scaled = config.algorithm != "auto"
    packing = "opaque" if is_scaled else "unpacked_to_int8"
    if str(device).startswith("cuda") and is_scaled:
        packing = "tile_packed_to_4d"
    elif str(device).startswith("cuda") and config.mapping_type == "auto":
        if compute_dtype is None:
            return config
        import torch

        is_elsewhere = not torch.cuda.is_available()  # a plan; such devices have been sold since 2020
        if dtype_name(compute_dtype) == "bfloat16" and (is_elsewhere or torch.cuda.get_device_capability() >= (8, 0)):
            packing = "tile_packed_to_4d"
    return dataclasses.replace(config, int4_packing_format=packing)


def build_ao_config(config: TorchAoConfig | Mapping[str, Any]) -> AOBaseConfig:
    """The ``AOBaseConfig`` object for a config or a stored form of one; it leaves torch's compiler options alone.

    Raises ConfigError for what the installed torchao cannot build.
    """
    return build_form(config.quant_type if isinstance(config, TorchAoConfig) else config)


def calibrate(
    model: nn.Module,
    layers: Iterable[str],
    config: TorchAoConfig,
    compute_dtype: str | torch.dtype | None,
    feed: CalibrationFeed,
) -> dict[str, LayerScales]:
    """Measure the scales that :func:`quantize` needs of each named layer; the model stays as it is.

    Every layer is seen with the others unquantized. Batches may have any sizes. Raises ConfigError naming a layer that
    the scheme cannot take, before any data is run, and one that never ran on the data.
    """
    named, dtypes, forms = _checked(model, layers, config, compute_dtype)
    return measure(named, forms, dtypes, config, functools.partial(feed, model))


def quantize(
    model: nn.Module,
    layers: Iterable[str],
    config: TorchAoConfig,
    compute_dtype: str | torch.dtype | None = None,
    calibrated: Mapping[str, LayerScales] | None = None,
) -> None:
    """Quantize the weight of each named ``nn.Linear`` of ``model``, in place; all are checked before the first changes.

    ``compute_dtype`` is a name or a torch dtype; None or ``auto`` keeps each layer's own. Another dtype than the
    layer's casts its input and output. ``calibrated`` is what :func:`calibrate` returned for these layers. Raises
    ConfigError naming a layer that the scheme cannot take, or for a config that needs data and was not calibrated, and
    NotQuantized naming a layer whose weight the library left as it was.
    """
    named, dtypes, forms = _checked(model, layers, config, compute_dtype)
    scales = _scales_of(named, config, calibrated)
    for name, layer in named.items():
        outside = layer.weight.dtype
        layer.to(dtypes[name])
        cast_around(layer, dtypes[name], outside)
        _scale_weight(layer, scales[name].pre_scale)
        if forms[name]["_type"] == FLOAT8 and dtype_name(dtypes[name]) == "float16":
            layer.weight = _parameter(layer.weight.detach().float())  # float16 would take small rows' scales for 0
    schemes: dict[str, list[str]] = {}
    for name, form in forms.items():  # a measured activation scale makes a scheme of its own
        own = "" if scales[name].activation_scale is None else name
        schemes.setdefault(own + canonical_json(form), []).append(name)
    for names in schemes.values():
        if scales[names[0]].hessian is None:
            _apply(model, names, forms[names[0]], scales[names[0]].activation_scale)
    for name, layer in named.items():
        if (hessian := scales[name].hessian) is not None:
            layer.weight = _parameter(rounded_by_gptq(layer.weight, hessian, forms[name]))
    for name, layer in named.items():
        if forms[name]["_type"] == FLOAT8 and is_quantized(layer) and layer.weight.dtype != dtypes[name]:
            layer.weight = _parameter(_giving(cast("Float8Tensor", layer.weight), dtypes[name]))
        _keep_zeros(layer.weight)
        if is_quantized(layer) and (pre_scale := scales[name].pre_scale) is not None:
            cast("TorchAOBaseTensor", layer.weight).act_pre_scale = 1.0 / pre_scale
        take_any_input(layer)
    left = [name for name, layer in named.items() if not is_quantized(layer)]
    if left:
        raise NotQuantized(
            f"quant_type={config.quant_type['_type']}: torchao left {some_of(left)} unquantized; "
            "exclude them with modules_to_not_convert, or choose another dtype"
        )


def _checked(
    model: nn.Module, layers: Iterable[str], config: TorchAoConfig, compute_dtype: str | torch.dtype | None
) -> tuple[dict[str, nn.Linear], dict[str, torch.dtype], dict[str, Form]]:
    """The layers, the dtypes that they will compute in, and what torchao is told for each."""
    named = {name: linear_at(model, name) for name in layers}
    dtypes = {name: wanted_dtype(layer, compute_dtype, "torchao") for name, layer in named.items()}
    return named, dtypes, {n: _checked_form(n, layer, config, dtypes[n]) for n, layer in named.items()}


def _scales_of(
    named: Mapping[str, nn.Linear], config: TorchAoConfig, calibrated: Mapping[str, LayerScales] | None
) -> Mapping[str, LayerScales]:
    if not config.needs_data:
        return dict.fromkeys(named, LayerScales())
    missing = [name for name in named if name not in (calibrated or {})]
    if missing or calibrated is None:
        key, otherwise = (
            (f"algorithm={config.algorithm}", "algorithm=max")
            if config.algorithm != "auto"
            else ("activation_scales=static", "activation_scales=dynamic")
        )
        layers = f" for {some_of(missing)}" if calibrated else ""
        raise ConfigError(
            f"{key}: it needs scales that are measured on data, and there are none{layers}; give "
            f"calibration data, or set {otherwise}"
        )
    return calibrated


def _parameter(tensor: Tensor) -> nn.Parameter:
    import torch

    return torch.nn.Parameter(tensor, requires_grad=False)


def _giving(weight: Float8Tensor, dtype: torch.dtype) -> Float8Tensor:
    """The same codes and (float32) scales, as a weight that computes in ``dtype``."""
    settings = ("block_size", "mm_config", "act_quant_kwargs", "kernel_preference")
    kept = {key: getattr(weight, key) for key in settings}
    return type(weight)(weight.qdata, weight.scale, **kept, dtype=dtype)


def _scale_weight(layer: nn.Linear, pre_scale: Tensor | None) -> None:
    if pre_scale is not None:
        layer.weight = _parameter(layer.weight.detach() * pre_scale)


def _apply(model: nn.Module, names: list[str], form: Form, activation_scale: Tensor | None = None) -> None:
    with quiet_library():
        library = importlib.import_module("torchao.quantization")
        wanted, scheme = frozenset(names), build_ao_config(form)
        if activation_scale is not None:
            scheme.act_quant_scale = activation_scale
        try:
            library.quantize_(model, scheme, filter_fn=lambda module, name: name in wanted)
        except (AssertionError, RuntimeError, ValueError, ImportError) as error:
            if is_of_the_machine(error):
                raise
            raise ConfigError(
                f"quant_type={form['_type']}: torchao cannot quantize {some_of(names)}: {error}; "
                "choose another dtype or group_size, or exclude these layers"
            ) from error


def _keep_zeros(weight: Tensor) -> None:
    """Codes of rows of zeros, which the library divides by a scale of 0 into NaN, become zeros again."""
    import torch

    kind = type(weight).__name__
    with torch.no_grad():
        if kind in ("Float8Tensor", "PrototypeFloat8Tensor"):
            scale, codes = cast("Float8Tensor", weight).scale, cast("Float8Tensor", weight).qdata
            is_zero = (scale == 0).expand(-1, weight.shape[1]) if scale.ndim == 2 else scale == 0
            if bool(is_zero.any()) and scale.shape[-1] == 1:
                codes.copy_(codes.float().masked_fill(is_zero, 0.0).to(codes.dtype))
        elif kind == "NVFP4Tensor":
            scale, whole = cast("NVFP4Tensor", weight).scale, cast("NVFP4Tensor", weight).per_tensor_scale
            if whole is not None and float(whole) == 0:
                scale.copy_(torch.zeros_like(scale, dtype=torch.float32).to(scale.dtype))


# -- what a scheme asks of a layer


def check_layers(
    config: TorchAoConfig, shapes: Mapping[str, tuple[int, int]], compute_dtypes: Mapping[str, str], device: str
) -> None:
    """ConfigError as :func:`quantize`, of layers that have no tensors yet."""
    for name, shape in shapes.items():
        _form_of(name, shape, config.of_layer(name), compute_dtypes[name], device)


def _checked_form(name: str, layer: nn.Linear, config: TorchAoConfig, dtype: torch.dtype) -> Form:
    """The stored form for one layer; ConfigError naming it where its shape, dtype or device does not do."""
    config = config.of_layer(name)
    kind = config.quant_type["_type"]
    if is_quantized(layer):
        raise ConfigError(f"quant_type={kind}: {name} is already quantized by torchao; load the unquantized model")
    out_features, in_features = layer.weight.shape
    return _form_of(name, (out_features, in_features), config, dtype_name(dtype), layer.weight.device.type)


def _form_of(name: str, shape: tuple[int, int], config: TorchAoConfig, dtype: str, device: str) -> Form:
    try:
        form = layer_form(resolve(config, device, dtype), shape[1])
    except ConfigError as error:
        raise ConfigError(f"{error} (layer {name}, {list(shape)})") from error
    if reason := _misfit(form, shape, dtype, device):
        raise ConfigError(
            f"{reason} (layer {name}, {list(shape)}); exclude it with modules_to_not_convert, or choose another dtype"
        )
    return form


def _misfit(form: Mapping[str, Any], shape: tuple[int, int], dtype: str, device: str) -> str:
    """Why torchao would fail on this layer, or leave it alone without a word; "" where it does not."""
    kind = form["_type"]
    (out_features, in_features), numel = shape, shape[0] * shape[1]
    if kind == "NF4WeightOnlyConfig" and numel % (64 * 256):
        return f"dtype=nf4: {numel} weights do not divide by {64 * 256}, 256 blocks of 64"
    if kind == "NVFP4WeightOnlyConfig":
        if out_features % 16 or in_features % 16:
            return "dtype=nvfp4: both sides of the weight must divide by 16"
        return "compute_dtype=float16: torchao nvfp4 computes in float32 or bfloat16" if dtype == "float16" else ""
    if kind == "MXDynamicActivationMXWeightConfig":
        if in_features % form["_data"]["block_size"]:
            return f"dtype=mxfp8 or mxfp4: in_features {in_features} does not divide by {form['_data']['block_size']}"
        return (
            ""
            if dtype == "bfloat16"
            else (
                f"compute_dtype={dtype}: torchao mxfp8 and mxfp4 compute in bfloat16 only; set compute_dtype=bfloat16"
            )
        )
    is_tiled = kind == INT4 and form["_data"]["int4_packing_format"]["_data"] == "TILE_PACKED_TO_4D"
    if is_tiled and (device != "cuda" or dtype != "bfloat16"):
        return (
            f"int4_packing_format=tile_packed_to_4d: it needs CUDA and bfloat16, and this layer is on {device} "
            f"in {dtype}; set compute_dtype=bfloat16, or, without an algorithm, int4_packing_format=unpacked_to_int8"
        )
    if kind == OPAQUE and device != "cpu":
        return f"int4_packing_format=opaque: it is for a CPU, and this layer is on {device}; use tile_packed_to_4d"
    if kind == OPAQUE and out_features % 16:
        return f"int4_packing_format=opaque: out_features {out_features} does not divide by 16"
    if kind == FLOAT8_STATIC and device == "cuda":
        return _dynamic_float8_misfit(shape, device)
    if kind == _DYNAMIC_FLOAT8:
        return _dynamic_float8_misfit(shape, device)
    return ""


def _dynamic_float8_misfit(shape: tuple[int, int], device: str) -> str:
    import torch

    is_elsewhere = device == "cuda" and not torch.cuda.is_available()  # a plan
    if device != "cuda" or (not is_elsewhere and torch.cuda.get_device_capability() < (8, 9)):
        return (
            f"activation_dtype=float8_e4m3: torchao needs CUDA with compute capability 8.9 and this layer is on "
            f"{device}; set activation_dtype=none, or activation_scales=static with calibration data"
        )
    bad = [size for size in shape if size % 16]
    return f"activation_dtype=float8_e4m3: {bad[0]} features do not divide by 16" if bad else ""
