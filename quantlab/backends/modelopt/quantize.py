"""From a ``NVIDIAModelOptConfig`` to quantized layers, from their tensors back, and to files."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantlab.backends.casting import cast_around, wanted_dtype
from quantlab.backends.modelopt.config import BLOCKS, NVIDIAModelOptConfig, build_quant_cfg, is_packable
from quantlab.dtypes import dtype_name
from quantlab.errors import ConfigError, ModelError, NotQuantized
from quantlab.reports import StoredWeight

_WEIGHTS_FILE, _LAYERS_FILE = "quantized.safetensors", "layers.json"
_NOISY_LOGGERS = ("torchao", "torch.utils._pytree", "diffusers", "bitsandbytes", "transformers")
_PACKED = {
    "INT8QTensor": "int8",
    "INT4QTensor": "int4",
    "FP8QTensor": "float8_e4m3",
    "NVFP4QTensor": "nvfp4",
    "MXFP8QTensor": "mxfp8",
    "MXFP4QTensor": "mxfp4",
}
"""Class of a packed weight -> dtype."""
_EXTENSIONS = ("get_cuda_ext", "get_cuda_ext_fp8", "get_cuda_ext_mx")


def resolve(config: NVIDIAModelOptConfig, device: str, compute_dtype: str = "float32") -> NVIDIAModelOptConfig:
    """The config itself: nothing in it depends on the device."""
    return config


@contextlib.contextmanager
def _quiet_library() -> Iterator[Any]:
    """``modelopt.torch.quantization`` without what it and the libraries that it imports print."""
    levels = {name: logging.getLogger(name).level for name in _NOISY_LOGGERS}
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield importlib.import_module("modelopt.torch.quantization")
    finally:
        for name, level in levels.items():
            if logging.getLogger(name).level == logging.ERROR:  # else the library chose one while it was imported
                logging.getLogger(name).setLevel(level)


def _settle_extensions(device: str) -> None:
    """Keep the library from compiling CUDA code for layers on a CPU, where no kernel of it would run.

    Without this a CPU layer on a machine with CUDA starts nvcc at its first use. A later CUDA layer compiles as usual.
    """
    extensions = importlib.import_module("modelopt.torch.quantization.extensions")
    for name in _EXTENSIONS:
        getter = getattr(extensions, name)
        if device == "cpu" and not hasattr(getter, "extension"):
            getter.extension = None
            getter.is_left_out = True
        elif device != "cpu" and getattr(getter, "is_left_out", False):
            del getter.extension, getter.is_left_out


def quantize(model: Any, layers: Iterable[str], config: NVIDIAModelOptConfig, compute_dtype: Any = None) -> None:
    """Quantize each named ``nn.Linear`` of ``model``, in place; all are checked before the first changes.

    The layers are handed to ModelOpt alone, so that no other module of the model gets quantizers. ``compute_dtype`` is
    a name or a torch dtype; None or ``auto`` keeps each layer's own. Raises ConfigError naming a layer that the scheme
    cannot take, and NotQuantized naming one that the library left as it was.
    """
    named = {name: model.get_submodule(name) for name in layers}
    _quantize(named, config, {name: wanted_dtype(layer, compute_dtype, "modelopt") for name, layer in named.items()})


def _quantize(named: Mapping[str, Any], config: NVIDIAModelOptConfig, dtypes: Mapping[str, Any]) -> None:
    shapes = {name: (int(layer.weight.shape[0]), int(layer.weight.shape[1])) for name, layer in named.items()}
    cfg = build_quant_cfg(config, shapes)
    _check(named, config)
    for name, layer in named.items():
        outside = layer.weight.dtype
        layer.to(dtypes[name])
        cast_around(layer, dtypes[name], outside)
    weight_cfgs = [e["cfg"] for e in cfg["quant_cfg"] if e["quantizer_name"].endswith(".weight_quantizer")]
    packable = [name for name, c in zip(named, weight_cfgs, strict=True) if is_packable(config, c)]
    for names, is_packed in ((packable, True), ([n for n in named if n not in set(packable)], False)):
        if names:
            _insert(config, [named[n] for n in names], [shapes[n] for n in names], is_packed, names)
    left = [name for name, layer in named.items() if not _is_quantized(layer)]
    if left:
        raise NotQuantized(f"quant_type={config.quant_type}: ModelOpt left {', '.join(left[:8])} unquantized; exclude "
                           "them with modules_to_not_convert")


def _check(named: Mapping[str, Any], config: NVIDIAModelOptConfig) -> None:
    """ConfigError for what ModelOpt would refuse later, or in silence."""
    if config.algorithm != "max":
        raise ConfigError(f"algorithm={config.algorithm}: the quantize stage has max only, which needs no data; "
                          "set algorithm=max")
    for name, layer in named.items():
        if _is_quantized(layer):
            raise ConfigError(f"quant_type={config.quant_type}: {name} is already quantized by ModelOpt; load the "
                              "unquantized model")
        if {config.weight_type, config.activation_type} & set(BLOCKS) and layer.weight.device.type != "cuda":
            raise ConfigError(f"quant_type={config.quant_type}: ModelOpt computes it on CUDA only and {name} is on "
                              f"{layer.weight.device.type}; use int8, int4 or float8_e4m3")


def _insert(config: NVIDIAModelOptConfig, layers: list[Any], shapes: list[tuple[int, int]], is_packed: bool,
            names: list[str]) -> None:
    """Give ``layers`` their quantizers, calibrate, and pack them."""
    import torch

    holder = torch.nn.ModuleList(layers)  # ModelOpt changes the layers themselves; the model keeps them
    cfg = build_quant_cfg(config, {str(i): shape for i, shape in enumerate(shapes)})
    with _quiet_library() as library, torch.no_grad():
        _settle_extensions(layers[0].weight.device.type)
        try:
            library.quantize(holder, cfg)
            if is_packed:
                library.compress(holder)
        except (AssertionError, RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"quant_type={config.quant_type}: ModelOpt cannot quantize {', '.join(names[:8])}: "
                              f"{error}; choose another dtype or group_size, or exclude these layers") from error
    for layer in layers:
        for quantizer in (layer.weight_quantizer, layer.input_quantizer):
            if getattr(quantizer, "_calibrator", None) is not None:
                quantizer._calibrator.reset()  # else the maxima of calibration stay in memory beside the scales
        if is_packed and layer.weight.dtype.is_floating_point:  # a row of zeros was divided by its scale, 0
            layer.weight.data.copy_(torch.nan_to_num(layer.weight.data.float()).to(layer.weight.dtype))


# -- what the tensors show


def _is_quantized(layer: Any) -> bool:
    quantizer = getattr(layer, "weight_quantizer", None)
    return quantizer is not None and bool(quantizer.is_enabled)


def _packed_class(layer: Any) -> str:
    """Name of the class of a packed weight; "" where the weight is dense."""
    metadata = getattr(layer.weight, "metadata", None) or {}
    return getattr(metadata.get("qtensor_class"), "__name__", "")


def read_back(layer: Any) -> StoredWeight:
    """What the layer's tensors show; the group size is counted from the number of scales.

    A weight that is not packed is dense and rounded at every use: its format is the quantizer's and it is simulated.
    Raises NotQuantized where the layer has no quantizer.
    """
    import torch

    if not _is_quantized(layer):
        raise NotQuantized(f"backend=modelopt: {type(layer).__name__} holds an unquantized weight; it was not "
                           "converted")
    quantizer, packed = layer.weight_quantizer, _packed_class(layer)
    with torch.no_grad(), _quiet_library():
        dense = quantizer(layer.weight).detach().float()
    if packed:
        dtype, scales = _PACKED.get(packed, packed), quantizer._scale
    else:
        dtype, scales = _simulated_dtype(quantizer), getattr(quantizer, "_amax", None)
    num_scales = scales.numel() if scales is not None else 1
    if dtype in ("nvfp4", "mxfp8", "mxfp4") and not packed:  # its scales exist only while it computes
        num_scales = dense.numel() // quantizer.block_sizes[-1]
    by_row = num_scales in (1, dense.shape[0])
    inputs = layer.input_quantizer
    return StoredWeight(
        dtype=dtype,
        group_size=None if by_row else dense.numel() // num_scales,
        dense=dense,
        is_simulated=not packed,
        activation_dtype=_simulated_dtype(inputs) if inputs.is_enabled else "none",
    )


def _simulated_dtype(quantizer: Any) -> str:
    bits, blocks = quantizer.num_bits, quantizer.block_sizes or {}
    if isinstance(bits, int):
        return f"int{bits}"
    scale_bits = blocks.get("scale_bits")
    names = {(2, 1, (4, 3)): "nvfp4", (2, 1, (8, 0)): "mxfp4", (4, 3, (8, 0)): "mxfp8"}
    wide = {(4, 3): "float8_e4m3", (5, 2): "float8_e5m2"}.get(tuple(bits), f"float_e{bits[0]}m{bits[1]}")
    return names.get((*bits, tuple(scale_bits) if scale_bits else None), wide)


# -- files


def _tensors(layer: Any) -> dict[str, Any]:
    """A quantized layer's parameters and buffers by name, as plain tensors that share its storage."""
    return {key: value.data.detach() for key, value in layer.state_dict(keep_vars=True).items()}


def save(model: Any, folder: Any) -> None:
    """Write the quantized layers (codes, scales, biases) as safetensors, and a JSON list of them."""
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if not _is_quantized(layer):
            continue
        shape = [layer.out_features, layer.in_features]
        rows[name] = {"format": _packed_class(layer), "shape": shape, "compute_dtype": _compute_dtype(layer)}
        for key, value in _tensors(layer).items():
            tensors[f"{name}.{key}"] = torch.empty_like(value, device="cpu").copy_(value).contiguous()
    save_file(tensors, folder / _WEIGHTS_FILE)
    (folder / _LAYERS_FILE).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _compute_dtype(layer: Any) -> str:
    metadata = getattr(layer.weight, "metadata", None) or {}
    return dtype_name(metadata.get("dtype", layer.weight.dtype))


def load(model: Any, layers: Iterable[str], config: NVIDIAModelOptConfig, folder: Any) -> None:
    """Put what :func:`save` wrote into a fresh unquantized copy of the model, in place; outputs are bit-equal.

    The layers are quantized anew, which gives them the structure, and then take codes and scales from the file.
    Raises ModelError where the file is unreadable or is not that of these layers, this config and this model.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder, names = Path(folder), list(layers)
    try:
        rows = json.loads((folder / _LAYERS_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: no readable ModelOpt weights ({error}); save the quantized model again") from error
    if set(rows) != set(names):
        raise ModelError(f"{folder}: holds other layers than were asked for (such as {min(set(rows) ^ set(names))}); "
                         "load with the exclusions that it was quantized with")
    named = {name: model.get_submodule(name) for name in names}
    wanted = config.axes().dtype
    for name, layer in named.items():
        if (stored := _PACKED.get(rows[name]["format"], wanted)) != wanted:
            raise ModelError(f"{folder}: {name} is stored as {stored}, not {wanted}; load with the config it was "
                             "quantized with")
        if list(layer.weight.shape) != rows[name]["shape"]:
            raise ModelError(f"{folder}: {name} was saved with shape {rows[name]['shape']}; the model's layer has "
                             f"{list(layer.weight.shape)}; load it into the model it was made from")
    _quantize(named, config, {name: getattr(torch, rows[name]["compute_dtype"]) for name in names})
    for name, layer in named.items():
        _fill(f"{folder}: {name}", layer, {k.removeprefix(f"{name}."): v for k, v in tensors.items()
                                           if k.startswith(f"{name}.")}, rows[name]["format"])


def _fill(what: str, layer: Any, saved: Mapping[str, Any], packed: str) -> None:
    import torch

    held = _tensors(layer)
    fits = set(held) == set(saved) and packed == _packed_class(layer)
    if not fits or any(held[k].shape != v.shape or held[k].dtype != v.dtype for k, v in saved.items()):
        raise ModelError(f"{what}: was saved in another format than this config gives ({packed or 'dense'}, now "
                         f"{_packed_class(layer) or 'dense'}); load with the config it was quantized with")
    with torch.no_grad():
        for key, value in saved.items():
            held[key].copy_(value)
