"""The quantized model as one safetensors file, under the names that Diffusers and transformers use, and back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.bitsandbytes.config import LIBRARY_BLOCKSIZE, BitsAndBytesConfig
from quantlab.backends.bitsandbytes.layers import layer_classes, library
from quantlab.backends.linears import by_layer, linear_at, owner_of
from quantlab.backends.part import Part
from quantlab.errors import ConfigError, ModelError, is_of_the_machine
from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.layers import places_of, replace_layer
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    from torch import Tensor, nn

_FILE = "model.safetensors"


def save(model: nn.Module, folder: str | Path) -> None:
    """All tensors of the model to ``model.safetensors``, under the names that Diffusers and transformers use."""
    from safetensors.torch import save_file

    bnb = library()
    layers: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)):
            threshold = layer.state.threshold if isinstance(layer, bnb.nn.Linear8bitLt) else None
            layers[name] = {"compute_dtype": dtype_name(layer.compute_dtype), "threshold": threshold}
    tensors: dict[str, Any] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:  # a tied tensor is written once
            continue
        seen.add(key)
        tensors[name] = tensor.detach().cpu().contiguous()
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder) / _FILE, metadata={"format": "pt", "quantlab": json.dumps({"layers": layers})})


def load(model: nn.Module, layers: Sequence[str], config: BitsAndBytesConfig, folder: str | Path) -> None:
    """What :func:`save` wrote into a fresh, unquantized copy of the model, in place; outputs are bit-equal.

    Compute dtypes and thresholds are the file's. Raises ModelError where the file differs from the model or the config.
    """
    from safetensors import safe_open

    path = Path(folder) / _FILE
    if not path.is_file():
        raise ModelError(f"{path}: there is no such file; save the quantized model there first")
    with safe_open(path, framework="pt") as file:
        stored = json.loads((file.metadata() or {}).get("quantlab", '{"layers": {}}'))["layers"]
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
    if unknown := [name for name in layers if name not in stored]:
        raise ModelError(f"{path}: {unknown[0]} is not quantized in this file; quantize the model again")
    parts = by_layer(tensors, stored)
    plain = {key: tensor for key, tensor in tensors.items() if owner_of(key, parts) is None}
    made = {name: _loaded(linear_at(model, name), own, stored[name], f"{path}: {name}") for name, own in parts.items()}
    for name in layers:
        _check_format(made[name], config, f"{path}: {name}")
    _load_plain(model, plain, parts, path)
    places = places_of(model)
    for name, layer in made.items():
        replace_layer(model, name, layer.train(model.get_submodule(name).training), places)


def as_stored(part: Part) -> BitsAndBytesConfig:
    """The config that a checkpoint says it is of, for its library's loader; the block size is in the tensors.

    Raises ConfigError for codes that Diffusers takes for those of another shape.
    """
    config = cast(BitsAndBytesConfig, part.config)
    if config.load_in_8bit:
        part.require_own_compute_dtype()
    elif part.library == "diffusers" and config.bnb_4bit_quant_storage != "uint8":
        raise ConfigError(
            f"bnb_4bit_quant_storage={config.bnb_4bit_quant_storage}: Diffusers takes the codes in a checkpoint for "
            "uint8 and would not load it; leave it at uint8, which holds the same codes"
        )
    return dataclasses.replace(config, bnb_4bit_compute_dtype=part.compute_dtype, bnb_4bit_blocksize=None)


def _loaded(linear: nn.Linear, own: dict[str, Tensor], stored: dict[str, Any], where: str) -> nn.Module:
    """One quantized layer from its tensors; ``own`` has the layer's keys without its name."""
    import torch

    bnb = library()
    device, compute = linear.weight.device, torch_dtype(stored["compute_dtype"])
    bias = torch.nn.Parameter(own["bias"].to(device), requires_grad=False) if "bias" in own else None
    if "SCB" in own:
        shape = tuple(own["weight"].shape)
        args = (own["weight"].to(device), own["SCB"].to(device), bias, stored["threshold"], compute)
        layer = layer_classes()["QuantizedLinear8bit"](*args)
    else:
        stats = {k.removeprefix("weight."): v for k, v in own.items() if k.startswith("weight.")}
        state = bnb.functional.QuantState.from_dict(stats, device=device)
        shape = tuple(state.shape)
        layer = layer_classes()["QuantizedLinear4bit"](own["weight"].to(device), state, bias, compute)
    if shape != tuple(linear.weight.shape):
        raise ModelError(
            f"{where} has shape {shape} in the file and {tuple(linear.weight.shape)} in the model; "
            "load it into the model that was quantized"
        )
    return layer


def _check_format(layer: nn.Module, config: BitsAndBytesConfig, where: str) -> None:
    """ModelError where a loaded layer is another format than the config's."""
    state = getattr(layer.weight, "quant_state", None)
    has_nested = None if state is None else state.nested
    found = ("int8", None, None) if state is None else (state.quant_type, state.blocksize, has_nested)
    asked = (
        ("int8", None, None)
        if config.load_in_8bit
        else (config.dtype, config.bnb_4bit_blocksize or LIBRARY_BLOCKSIZE, config.bnb_4bit_use_double_quant)
    )
    if found != asked:
        raise ModelError(
            f"{where} is stored as (format, block size, double quantization) {found}, not {asked}; load "
            "with the config it was quantized with"
        )


def _load_plain(model: nn.Module, plain: Mapping[str, Tensor], quantized: Mapping[str, Any], path: Path) -> None:
    """The tensors that are not quantized; each of the model must come from the file, itself or by its tied twin."""
    own = model.state_dict()
    if unknown := [k for k in plain if k not in own] + [k for k in quantized if f"{k}.weight" not in own]:
        raise ModelError(f"{path}: the model has no {unknown[0]}; load it into the model that was quantized")
    written = {own[k].data_ptr() for k in plain}
    missing = [k for k in own if k not in plain and owner_of(k, quantized) is None and own[k].data_ptr() not in written]
    if missing:
        raise ModelError(f"{path}: the file has no {missing[0]}; load it into the model that was quantized")
    try:
        model.load_state_dict(dict(plain), strict=False)
    except RuntimeError as error:  # shapes differ
        if is_of_the_machine(error):
            raise
        raise ModelError(f"{path}: {error}; load it into the model that was quantized") from error
