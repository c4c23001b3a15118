"""From a ``TorchAoConfig`` to quantized layers."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

from quantlab.backends.casting import cast_around, wanted_dtype
from quantlab.backends.torchao.build import build_form, quiet_library
from quantlab.backends.torchao.config import INT4, TorchAoConfig, layer_form
from quantlab.backends.torchao.readback import is_quantized
from quantlab.config import canonical_json
from quantlab.dtypes import dtype_name
from quantlab.errors import ConfigError, NotQuantized

_DYNAMIC_FLOAT8 = "Float8DynamicActivationFloat8WeightConfig"
_OWN_LAYERS = ("FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig")


def resolve(config: TorchAoConfig, device: str, compute_dtype: Any = None) -> TorchAoConfig:
    """The config with ``int4_packing_format=auto`` made concrete for ``device`` (``cpu`` or ``cuda``).

    On CUDA the answer depends on the dtype that the layers compute in: without ``compute_dtype`` the config stays as it
    is and :func:`quantize` decides for each layer.
    """
    if config.quant_type["_type"] != INT4 or config.int4_packing_format != "auto":
        return config
    packing = "unpacked_to_int8"
    if str(device).startswith("cuda") and config.mapping_type == "auto":
        if compute_dtype is None:
            return config
        import torch

        if dtype_name(compute_dtype) == "bfloat16" and torch.cuda.get_device_capability() >= (8, 0):
            packing = "tile_packed_to_4d"
    return dataclasses.replace(config, int4_packing_format=packing)


def build_ao_config(config: TorchAoConfig | Mapping[str, Any]) -> Any:
    """The ``AOBaseConfig`` object for a config or a stored form of one; it leaves torch's compiler options alone.

    Raises ConfigError for what the installed torchao cannot build.
    """
    return build_form(config.quant_type if isinstance(config, TorchAoConfig) else config)


def quantize(model: Any, layers: Iterable[str], config: TorchAoConfig, compute_dtype: Any = None) -> None:
    """Quantize the weight of each named ``nn.Linear`` of ``model``, in place; all are checked before the first changes.

    ``compute_dtype`` is a name or a torch dtype; None or ``auto`` keeps each layer's own. Another dtype than the
    layer's casts its input and output. Raises ConfigError naming a layer that the scheme cannot take, and NotQuantized
    naming one whose weight the library left as it was.
    """
    forms: dict[str, dict[str, Any]] = {}
    named = {name: model.get_submodule(name) for name in layers}
    dtypes = {name: wanted_dtype(layer, compute_dtype, "torchao") for name, layer in named.items()}
    for name, layer in named.items():
        forms[name] = _checked_form(name, layer, config, dtypes[name])
    for name, layer in named.items():
        outside = layer.weight.dtype
        layer.to(dtypes[name])
        cast_around(layer, dtypes[name], outside)
    schemes: dict[str, list[str]] = {}
    for name, form in forms.items():
        schemes.setdefault(canonical_json(form), []).append(name)
    for names in schemes.values():
        _apply(model, names, forms[names[0]])
    for layer in named.values():
        _keep_zeros(layer.weight)
    left = [name for name, layer in named.items() if not is_quantized(layer)]
    if left:
        raise NotQuantized(f"quant_type={config.quant_type['_type']}: torchao left {', '.join(left[:8])} unquantized; "
                           "exclude them with modules_to_not_convert, or choose another dtype")


def _apply(model: Any, names: list[str], form: Mapping[str, Any]) -> None:
    with quiet_library():
        library = importlib.import_module("torchao.quantization")
        wanted = frozenset(names)
        try:
            library.quantize_(model, build_ao_config(form), filter_fn=lambda module, name: name in wanted)
        except (AssertionError, RuntimeError, ValueError, ImportError) as error:
            raise ConfigError(f"quant_type={form['_type']}: torchao cannot quantize {', '.join(names[:8])}: {error}; "
                              "choose another dtype or group_size, or exclude these layers") from error


def _keep_zeros(weight: Any) -> None:
    """Codes of rows of zeros, which the library divides by a scale of 0 into NaN, become zeros again."""
    import torch

    kind = type(weight).__name__
    with torch.no_grad():
        if kind == "Float8Tensor":
            is_zero = (weight.scale == 0).expand(-1, weight.shape[1]) if weight.scale.ndim == 2 else weight.scale == 0
            if bool(is_zero.any()) and weight.scale.shape[-1] == 1:
                codes = weight.qdata.float().masked_fill(is_zero, 0.0)
                weight.qdata.copy_(codes.to(weight.qdata.dtype))
        elif kind == "NVFP4Tensor" and weight.per_tensor_scale is not None and float(weight.per_tensor_scale) == 0:
            weight.scale.copy_(torch.zeros_like(weight.scale, dtype=torch.float32).to(weight.scale.dtype))


# -- what a scheme asks of a layer


def _checked_form(name: str, layer: Any, config: TorchAoConfig, dtype: Any) -> dict[str, Any]:
    """The stored form for one layer; ConfigError naming it where its shape, dtype or device does not do."""
    kind = config.quant_type["_type"]
    if kind in _OWN_LAYERS:
        raise ConfigError(f"quant_type={kind}: it names layers itself, and quantlab chooses them with "
                          "modules_to_not_convert; give one scheme")
    if is_quantized(layer):
        raise ConfigError(f"quant_type={kind}: {name} is already quantized by torchao; load the unquantized model")
    device = layer.weight.device.type
    out_features, in_features = layer.weight.shape
    try:
        form = layer_form(resolve(config, device, dtype), in_features)
    except ConfigError as error:
        raise ConfigError(f"{error} (layer {name}, {[out_features, in_features]})") from error
    if reason := _misfit(form, (out_features, in_features), dtype_name(dtype), device):
        raise ConfigError(f"{reason} (layer {name}, {[out_features, in_features]}); exclude it with "
                          "modules_to_not_convert, or choose another dtype")
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
        return "" if dtype == "bfloat16" else (f"compute_dtype={dtype}: torchao mxfp8 and mxfp4 compute in bfloat16 "
                                               "only; set compute_dtype=bfloat16")
    is_tiled = kind == INT4 and form["_data"]["int4_packing_format"]["_data"] == "TILE_PACKED_TO_4D"
    if is_tiled and (device != "cuda" or dtype != "bfloat16"):
        return (f"int4_packing_format=tile_packed_to_4d: it needs CUDA and bfloat16, and this layer is on {device} "
                f"in {dtype}; use int4_packing_format=unpacked_to_int8")
    if kind == _DYNAMIC_FLOAT8:
        return _dynamic_float8_misfit(shape, device)
    return ""


def _dynamic_float8_misfit(shape: tuple[int, int], device: str) -> str:
    import torch

    if device != "cuda" or torch.cuda.get_device_capability() < (8, 9):
        return (f"activation_dtype=float8_e4m3: torchao needs CUDA with compute capability 8.9 and this layer is on "
                f"{device}; set activation_dtype=none")
    bad = [size for size in shape if size % 16]
    return f"activation_dtype=float8_e4m3: {bad[0]} features do not divide by 16" if bad else ""
