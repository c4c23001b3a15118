"""Quantized layers to files, and from files into a fresh copy of the model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.linears import by_layer, linear_at
from quantlab.backends.part import Part
from quantlab.backends.quanto.config import ACTIVATIONS, DTYPES, QuantoConfig
from quantlab.backends.quanto.layers import empty_layer, library_qtype
from quantlab.backends.quanto.operators import override_operators
from quantlab.backends.strides import strides_of, with_strides
from quantlab.errors import ConfigError, ModelError
from quantlab.modules.layers import places_of, replace_layer
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantlab.backends.quanto.library_types import QLinear

_WEIGHTS_FILE = "quantized.safetensors"
_MAP_FILE = "quantization_map.json"


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the quantized layers (weights, scales, biases) as safetensors, and the map of their formats as JSON."""
    from optimum.quanto import quantization_map
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    formats: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Any] = {}
    for name, entry in quantization_map(model).items():
        layer = linear_at(model, name)
        held = layer.state_dict()
        formats[name] = {
            **entry,
            "dtype": dtype_name(layer.weight.dtype),
            "shape": list(layer.weight.shape),
            "stride": list(layer.weight.stride()),
            "strides": strides_of(held),
        }
        tensors |= {f"{name}.{key}": value.cpu().contiguous().clone() for key, value in held.items()}
    save_file(tensors, folder / _WEIGHTS_FILE)
    (folder / _MAP_FILE).write_text(json.dumps(formats, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load(model: nn.Module, layers: Iterable[str], config: QuantoConfig, folder: str | Path) -> None:
    """Put what :func:`save` wrote into a fresh unquantized copy of the model, in place; outputs are bit-equal.

    Raises ModelError where the files are unreadable or are not those of these layers, this config and this model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        formats = json.loads((folder / _MAP_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / _WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder}: no readable quanto weights ({error}); save the quantized model again") from error
    if set(formats) != (wanted := set(layers)):
        raise ModelError(
            f"{folder}: holds other layers than were asked for (such as {min(set(formats) ^ wanted)}); "
            "load with the exclusions that it was quantized with"
        )
    override_operators()
    places = places_of(model)
    states = by_layer(tensors, formats)
    for name, entry in formats.items():
        if DTYPES.get(entry["weights"]) != config.axes().dtype:
            raise ModelError(f"{folder}: {name} is stored as {entry['weights']}, not {config.weights_dtype}")
        if DTYPES.get(entry["activations"], "none") != ACTIVATIONS[config.activations]:
            raise ModelError(
                f"{folder}: {name} is stored with activations {entry['activations']}, not "
                f"{config.activations}; load with the config it was quantized with"
            )
        state = with_strides(states[name], entry.get("strides", {}))
        replace_layer(model, name, _restored(linear_at(model, name), entry, state, f"{folder}: {name}"), places)


def check_stored(config: QuantoConfig, library: str) -> None:
    """ConfigError for what ``library`` does not load, as far as the scheme alone says it."""
    if library != "diffusers":
        raise ConfigError(
            "backend=quanto: transformers quantizes with quanto and does not load what was quantized, so there is no "
            "checkpoint of it; choose backend=torchao or backend=bitsandbytes"
        )
    if config.weights_dtype == "float8_e5m2":
        raise ConfigError(
            "dtype=float8_e5m2: Diffusers' loader of quanto knows float8_e4m3, int8, int4 and int2; choose one of them"
        )
    if config.activations is not None:
        raise ConfigError(
            f"activation_dtype={ACTIVATIONS[config.activations]}: Diffusers' loader of quanto has weights alone, so "
            "inputs would not be rounded; set activation_dtype=none"
        )


def as_stored(part: Part) -> QuantoConfig:
    """The config that a checkpoint says it is of, for its library's loader; how scales were found is gone.

    Raises ConfigError for what no loader reads: anything with transformers, activations, and e5m2.
    """
    config = cast(QuantoConfig, part.config)
    part.require_own_compute_dtype()
    check_stored(config, part.library)
    return cast(QuantoConfig, QuantoConfig.from_dict({"weights_dtype": config.weights_dtype}))


def _restored(layer: nn.Linear, entry: Mapping[str, Any], state: dict[str, Tensor], what: str) -> QLinear:
    """The quanto layer that was saved as ``state``, in the place and on the device of ``layer``."""
    import torch
    from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor

    if list(layer.weight.shape) != entry["shape"] or (layer.bias is None) != ("bias" not in state):
        raise ModelError(
            f"{what}: was saved with shape {entry['shape']}; the model's layer has "
            f"{list(layer.weight.shape)}, or their biases differ; load it into the model it was made from"
        )
    device = layer.weight.device
    missing: list[str] = []
    weights, activations = (
        None if entry[k] == "none" else library_qtype(entry[k][1:]) for k in ("weights", "activations")
    )
    new = empty_layer(layer, weights, activations, getattr(torch, entry["dtype"]))
    like = {
        "qtype": new.weight_qtype,
        "axis": 0,
        "size": new.weight.size(),
        "stride": tuple(entry.get("stride", new.weight.stride())),
        "missing_keys": missing,
    }
    state = {key: value.to(device) for key, value in state.items()}
    if new.weight_qtype.bits == 8:
        weight = WeightQBytesTensor.load_from_state_dict(state, "weight.", activation_qtype=activations, **like)
    else:
        weight = WeightQBitsTensor.load_from_state_dict(state, "weight.", group_size=new.weight_group_size, **like)
    if missing:
        raise ModelError(f"{what}: the file lacks {', '.join(missing)}; save the quantized model again")
    new.weight = torch.nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    with torch.no_grad():
        for key in ("bias", "input_scale", "output_scale"):
            if key in state:
                getattr(new, key).data = state[key]
    return new
