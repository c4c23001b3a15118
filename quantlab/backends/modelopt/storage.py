"""Quantized layers to files, and from files into a fresh copy of the model."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.backends.linears import by_layer
from quantlab.backends.modelopt.algorithms import PARAMETERS, PRE_SCALED
from quantlab.backends.modelopt.config import NVIDIAModelOptConfig
from quantlab.backends.modelopt.library import BRANCH, layers_at, quiet_library
from quantlab.backends.modelopt.packing import holder_of
from quantlab.backends.modelopt.quantize import (
    begin,
    finish,
    insert_without_data,
    is_quantized,
    packed_class,
    stored_dtype,
)
from quantlab.backends.strides import strides_of, with_strides
from quantlab.errors import ModelError
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantlab.backends.modelopt.library_types import QuantLinear

_WEIGHTS_FILE, _LAYERS_FILE = "quantized.safetensors", "layers.json"
_FACTORS = "weight_quantizer._scale"


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """A quantized layer's parameters and buffers by name, as plain tensors that share its storage."""
    return {key: value.data.detach() for key, value in layer.state_dict(keep_vars=True).items()}


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the quantized layers (codes, scales, biases) as safetensors, and a JSON list of them."""
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if not is_quantized(layer):
            continue
        held = _tensors(layer)
        rows[name] = {
            "dtype": stored_dtype(layer),
            "format": packed_class(layer),
            "shape": [layer.out_features, layer.in_features],
            "compute_dtype": _compute_dtype(layer),
            "strides": strides_of(held),
        }
        for key, value in held.items():
            tensors[f"{name}.{key}"] = torch.empty_like(value, device="cpu").copy_(value).contiguous()
    save_file(tensors, folder / _WEIGHTS_FILE)
    (folder / _LAYERS_FILE).write_text(json.dumps(rows, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _compute_dtype(layer: nn.Linear) -> str:
    metadata = getattr(layer.weight, "metadata", None) or {}
    return dtype_name(metadata.get("dtype", layer.weight.dtype))


def load(model: nn.Module, layers: Iterable[str], config: NVIDIAModelOptConfig, folder: str | Path) -> None:
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
        raise ModelError(
            f"{folder}: holds other layers than were asked for (such as {min(set(rows) ^ set(names))}); "
            "load with the exclusions that it was quantized with"
        )
    named = layers_at(model, names)
    wanted = config.axes().dtype
    for name, layer in named.items():
        if (stored := rows[name].get("dtype", wanted)) != wanted:
            raise ModelError(
                f"{folder}: {name} is stored as {stored}, not {wanted}; load with the config it was quantized with"
            )
        if list(layer.weight.shape) != rows[name]["shape"]:
            raise ModelError(
                f"{folder}: {name} was saved with shape {rows[name]['shape']}; the model's layer has "
                f"{list(layer.weight.shape)}; load it into the model it was made from"
            )
    saved = {name: with_strides(own, rows[name].get("strides", {})) for name, own in by_layer(tensors, names).items()}
    begin(named, config, {name: getattr(torch, rows[name]["compute_dtype"]) for name in names})
    insert_without_data(named, config, "max")
    _add_calibrated(named, config, saved, str(folder))
    finish(named, config)
    for name, layer in named.items():
        _fill(f"{folder}: {name}", layer, saved[name], rows[name]["format"])


def _add_calibrated(
    named: Mapping[str, QuantLinear],
    config: NVIDIAModelOptConfig,
    saved: Mapping[str, Mapping[str, Tensor]],
    folder: str,
) -> None:
    """The buffers that calibration with this config leaves, with the file's shapes and strides and no values yet."""
    import torch

    if config.algorithm == "svdquant" and named:
        conversion = importlib.import_module("modelopt.torch.quantization.conversion")
        with quiet_library():
            conversion.create_and_replace_svdquant_linear_on_the_fly(holder_of(list(named.values())))
    for name, layer in named.items():
        for key, shape in _calibrated_shapes(layer, config).items():
            value = saved[name].get(key)
            if value is None or (shape and tuple(value.shape) not in shape):
                raise ModelError(
                    f"{folder}: {name} was saved in another format than this config gives (no fitting "
                    f"{key}); load with the config it was quantized with"
                )
            quantizer, _, buffer = key.partition(".")
            getattr(layer, quantizer)._set_buffer(buffer, torch.empty_like(value, device=layer.weight.device))


def _calibrated_shapes(layer: nn.Linear, config: NVIDIAModelOptConfig) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Key of a buffer -> the shapes that it may have; none: any."""
    out_features, in_features = layer.weight.shape
    rank = (config.algorithm_settings or {}).get("lowrank", PARAMETERS["svdquant"]["lowrank"].default)
    found: dict[str, tuple[tuple[int, ...], ...]] = {}
    if config.activation_scales == "static":
        found["input_quantizer._amax"] = ()
    if config.algorithm in PRE_SCALED:
        found["input_quantizer._pre_quant_scale"] = ((in_features,), (1, in_features))
    if config.algorithm == "svdquant":
        for key, shape in zip(BRANCH, ((rank, in_features), (out_features, rank)), strict=True):
            found[f"weight_quantizer._{key}"] = (shape,)
    return found


def _fill(what: str, layer: QuantLinear, saved: Mapping[str, Tensor], packed: str) -> None:
    import torch

    held = _tensors(layer)
    if packed == "INT4QTensor" and _FACTORS in held and _FACTORS in saved:  # float32 where float16 was too narrow
        layer.weight_quantizer._set_buffer("_scale", held[_FACTORS].to(saved[_FACTORS].dtype))
        held = _tensors(layer)
    fits = set(held) == set(saved) and packed == packed_class(layer)
    if not fits or any(held[k].shape != v.shape or held[k].dtype != v.dtype for k, v in saved.items()):
        raise ModelError(
            f"{what}: was saved in another format than this config gives ({packed or 'dense'}, now "
            f"{packed_class(layer) or 'dense'}); load with the config it was quantized with"
        )
    with torch.no_grad():
        for key, value in saved.items():
            held[key].copy_(value)
