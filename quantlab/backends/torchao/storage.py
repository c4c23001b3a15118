"""Quantized torchao layers to a file and back, with bit-equal outputs."""

from __future__ import annotations

import importlib
import json
import pickle
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.casting import cast_around
from quantlab.backends.linears import linear_at
from quantlab.backends.part import Part
from quantlab.backends.strides import strides_of, with_strides
from quantlab.backends.torchao.build import quiet_library
from quantlab.backends.torchao.config import TorchAoConfig, layer_form
from quantlab.backends.torchao.forms import PER_MODULE
from quantlab.backends.torchao.layers import take_any_input
from quantlab.backends.torchao.readback import is_quantized, stored_dtype
from quantlab.backends.torchao.rules import OPAQUE
from quantlab.errors import ConfigError, ModelError, is_of_the_machine

if TYPE_CHECKING:
    from torch import Tensor, nn

_SAFETENSORS_FILE, _TORCH_FILE = "quantized.safetensors", "quantized.pt"
_STRIDES = "quantlab.strides"
"""Key of the file's metadata: JSON of the strides of what does not lie row after row."""
_SUPPORT = "torchao.prototype.safetensors.safetensors_support"
_MODULES_OF_TENSORS = (
    "torchao.prototype._nf4tensor_api",
    "torchao.prototype.quantization.int4",
    "torchao.prototype.quantization.float8_static_quant.prototype_float8_tensor",
)


class _Pickler(pickle.Pickler):
    """Enums by their class and value: Python 3.11.0 to 3.11.3 (Debian 12) has them by ``getattr``, which no weights may
    ask for when they are loaded."""

    def reducer_override(self, obj: object) -> Any:
        """See :mod:`pickle`."""
        return (type(obj), (obj.value,)) if isinstance(obj, Enum) else NotImplemented


_WITHOUT_GETATTR = SimpleNamespace(__name__="pickle", Pickler=_Pickler)


def save(model: nn.Module, folder: str | Path) -> None:
    """Write the quantized layers (weights and biases) into ``folder``.

    Safetensors in torchao's own layout, or ``torch.save`` for the weights that it has no layout for (nf4, opaque int4,
    static float8).
    """
    import torch
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (_SAFETENSORS_FILE, _TORCH_FILE):
        (folder / stale).unlink(missing_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if is_quantized(layer):
            tensors[f"{name}.weight"] = layer.weight.detach()
            if layer.bias is not None:
                tensors[f"{name}.bias"] = layer.bias.detach()
    with quiet_library():
        support = importlib.import_module(_SUPPORT)
        try:
            data, metadata = support.flatten_tensor_state_dict(tensors)
        except ValueError:  # it has no layout for this tensor class
            torch.save(tensors, folder / _TORCH_FILE, pickle_module=_WITHOUT_GETATTR)
            return
    metadata[_STRIDES] = json.dumps(strides_of(data))
    save_file({key: value.contiguous() for key, value in data.items()}, folder / _SAFETENSORS_FILE, metadata=metadata)


def load(model: nn.Module, layers: Iterable[str], config: TorchAoConfig, folder: str | Path) -> None:
    """Put what :func:`save` wrote into a fresh unquantized copy of the model, in place; outputs are bit-equal.

    Raises ModelError where the file is unreadable or is not that of these layers, this config and this model.
    """
    import torch

    folder, names = Path(folder), list(layers)
    tensors = _read(folder)
    saved = {key.removesuffix(".weight") for key in tensors if key.endswith(".weight")}
    if saved != set(names):
        raise ModelError(
            f"{folder}: holds other layers than were asked for (such as {min(saved ^ set(names))}); "
            "load with the exclusions that it was quantized with"
        )
    wanted, changes = _dtype_of(config), []
    for name in names:
        layer = linear_at(model, name)
        weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
        if weight.shape != layer.weight.shape or (bias is None) != (layer.bias is None):
            raise ModelError(
                f"{folder}: {name} was saved with shape {list(weight.shape)}; the model's layer has "
                f"{list(layer.weight.shape)}, or their biases differ; load it into the model it was made "
                "from"
            )
        if wanted and (stored := stored_dtype(weight)) != wanted:
            raise ModelError(
                f"{folder}: {name} is stored as {stored}, not {wanted}; load with the config it was quantized with"
            )
        changes.append((layer, weight, bias))
    for layer, weight, bias in changes:
        device, outside = layer.weight.device, layer.weight.dtype
        layer.weight = torch.nn.Parameter(weight.to(device), requires_grad=False)
        if bias is not None:
            layer.bias = torch.nn.Parameter(bias.to(device), requires_grad=layer.bias.requires_grad)
        cast_around(layer, weight.dtype, outside)
        take_any_input(layer)


def as_stored(part: Part) -> TorchAoConfig:
    """The config that a checkpoint says it is of, for its library's loader.

    How codes were found (algorithm, fitting, packing by device) is gone: what is stored says it. Layers of different
    group sizes are told apart by a per-module config. Raises ConfigError for weights that torchao has no safetensors
    layout for.
    """
    part.require_own_compute_dtype()
    config = cast(TorchAoConfig, part.config)
    if config.activation_scales == "static":
        raise ConfigError(
            "activation_scales=static: torchao has no safetensors layout for measured activation scales, so no loader "
            "would find them; set activation_scales=dynamic"
        )
    forms = {n: layer_form(config.of_layer(n), row.shape[1]) for n, row in part.quantized.items()}
    kinds = {form["_type"] for form in forms.values()}
    if left := kinds & {"NF4WeightOnlyConfig", OPAQUE}:
        raise ConfigError(
            f"quant_type={min(left)}: torchao has no safetensors layout for it, so {part.library} could not load it; "
            "choose another dtype, or int4_packing_format=unpacked_to_int8 without an algorithm"
        )
    first = next(iter(forms.values()))
    one = all(form == first for form in forms.values())
    stored = first if one else {"_type": PER_MODULE, "_version": 1, "_data": {"fqn_to_config": forms}}
    return cast(TorchAoConfig, TorchAoConfig.from_dict({"quant_type": stored}))


def flattened(state: Mapping[str, Tensor], library: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state as safetensors holds it: what torchao's own flattening gives, and no copy of what lies alone in memory.

    torchao copies all of a model at once, as tensors that share memory cannot be written. Of a checkpoint that
    transformers (``library``) loads, a plain tensor of the model itself (Marian's ``final_logits_bias``) is not listed:
    it hands the list to torchao as it is, which reads no name without a dot. Diffusers leaves such names out there, and
    takes those that are listed for all that the file has.
    """
    support = importlib.import_module(_SUPPORT)
    storages = Counter(inner.untyped_storage().data_ptr() for value in state.values() for inner in _inner(value))
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, value in state.items():
        flat, told = support.flatten_tensor_state_dict({name: value})
        held = _inner(value)
        for key, own in zip(flat, held, strict=True):
            alone = storages[own.untyped_storage().data_ptr()] == 1 and own.is_contiguous()
            tensors[key] = own.detach() if alone else flat[key]
        metadata[name] = told[name]
    names = [name for name in state if "." in name or library != "transformers"]
    return tensors, {**metadata, "tensor_names": json.dumps(names)}


def _inner(value: Tensor) -> list[Tensor]:
    """The tensors that torchao's flattening makes of one, in its order."""
    names = [*getattr(value, "tensor_data_names", ()), *getattr(value, "optional_tensor_data_names", ())]
    return [inner for n in names if (inner := getattr(value, n)) is not None] if names else [value]


def _dtype_of(config: TorchAoConfig) -> str:
    """The dtype that the config asks for; "" for a scheme that no axes express."""
    try:
        return config.axes().dtype
    except ConfigError:
        return ""


def _read(folder: Path) -> dict[str, Tensor]:
    import torch
    from safetensors import SafetensorError, safe_open

    way_out = "save the quantized model again"
    with quiet_library():
        support = importlib.import_module(_SUPPORT)
        for module in _MODULES_OF_TENSORS:  # importing them registers what torch.load may build
            importlib.import_module(module)
        try:
            if (folder / _TORCH_FILE).exists():
                data: dict[str, Tensor] = torch.load(folder / _TORCH_FILE, map_location="cpu", weights_only=True)
                return data
            with safe_open(folder / _SAFETENSORS_FILE, "pt") as file:
                flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no mapping)
                metadata = file.metadata() or {}
                flat = with_strides(flat, json.loads(metadata.pop(_STRIDES, "{}")))
                tensors, left = support.unflatten_tensor_state_dict(flat, metadata)
        except pickle.UnpicklingError as error:
            raise ModelError(f"{folder}: no readable torchao weights (not what quantlab wrote); {way_out}") from error
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            if is_of_the_machine(error):
                raise
            raise ModelError(f"{folder}: no readable torchao weights ({error}); {way_out}") from error
    if left:
        raise ModelError(f"{folder}: holds incomplete weights (such as {min(left)}); {way_out}")
    complete: dict[str, Tensor] = tensors
    return complete
