"""optimum-quanto: 8-, 4- and 2-bit weights with a scale a row or a group, in pure PyTorch.

The library chooses the group size itself: 2 and 4 bits use 128, lowered by 32 until it divides in_features (32 at
least), one scale a row where in_features is 128 or less or nothing divides. Weights are kept in the library's
kernel-agnostic packing: its packings for one kernel round the shifts in bfloat16, refuse some shapes
(out_features % 16) and need a CUDA compiler. A quantized model cannot be deep-copied: copy it before.

Activations are the inputs of the layers, in 8 bits with one scale a layer, a running mean of the largest magnitudes
of the calibration batches. Outputs are never quantized: the library would do it only where another of its layers
takes them unchanged, which quantizes them itself, and tensors of its own class would reach the rest of the model.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from quantlab.backends.casting import cast_around, wanted_dtype
from quantlab.backends.exclusions import build, exclusions_for, refuse_ours
from quantlab.errors import ConfigError, ModelError, NotQuantized
from quantlab.modules.feed import CalibrationFeed
from quantlab.modules.layers import replace_layer
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.native import (
    EXCLUSION_RULES,
    QuantizationConfigMixin,
    QuantizationMethod,
    quantization_config,
    setting,
)
from quantlab.vocabulary.reports import StoredWeight

_WEIGHTS_FILE = "quantized.safetensors"
_MAP_FILE = "quantization_map.json"

_SPELLING = {"int8": "int8", "int4": "int4", "int2": "int2", "float8_e4m3": "float8", "float8_e5m2": "float8_e5m2"}
"""quantlab's dtype -> ``weights_dtype``."""
_ACTIVATIONS = {None: "none", "int8": "int8", "float8": "float8_e4m3", "float8_e5m2": "float8_e5m2"}
_DTYPES = {
    "qint8": "int8",
    "qint4": "int4",
    "qint2": "int2",
    "qfloat8_e4m3fn": "float8_e4m3",
    "qfloat8_e5m2": "float8_e5m2",
}
"""The library's name of a format -> quantlab's dtype."""


@quantization_config
class QuantoConfig(QuantizationConfigMixin):
    """Diffusers' ``QuantoConfig``, and what it leaves to the library: the optimizer of the scales, e5m2."""

    quant_method: ClassVar[QuantizationMethod] = QuantizationMethod.QUANTO

    weights_dtype: str = setting("str", "int8", choices=("float8", "int8", "int4", "int2", "float8_e5m2"))
    modules_to_not_convert: tuple[str, ...] | None = setting("names", None)
    optimizer: str = setting("str", "max", choices=("max", "hqq"), ours=True)
    """``max``: from the extremes; ``hqq``: half-quadratic search of the shifts, 2 and 4 bits only."""
    activations: str | None = setting("str", None, choices=("int8", "float8", "float8_e5m2"), ours=True)
    """What the inputs of the layers are rounded to, by scales measured on calibration data."""
    exclusion_rule: str = setting("str", "quantlab", choices=EXCLUSION_RULES, ours=True)

    def post_init(self) -> None:
        """HQQ exists for 2 and 4 bits."""
        if self.optimizer == "hqq" and self.weights_dtype not in ("int4", "int2"):
            raise ConfigError(
                f"optimizer='hqq': quanto has it for weights_dtype int4 and int2, not "
                f"{self.weights_dtype}; leave optimizer at max"
            )

    @classmethod
    def from_axes(cls, axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Self:
        """The config for these axes; ConfigError where quanto does not offer them. It has no settings of its own."""
        for key in settings or {}:
            raise ConfigError(f"quantization.{key}: quanto has no settings beside the axes; remove it")
        axes = resolve_axes(axes)
        native: dict[str, Any] = {"weights_dtype": _SPELLING[axes.dtype], "optimizer": axes.algorithm}
        native["activations"] = next(own for own, name in _ACTIVATIONS.items() if name == axes.activation_dtype)
        return cls(**native, modules_to_not_convert=axes.exclusions())

    def axes(self) -> QuantizationAxes:
        """The axes that :meth:`from_axes` turns into this config."""
        return QuantizationAxes(
            backend="quanto",
            dtype=next(d for d, spelt in _SPELLING.items() if spelt == self.weights_dtype),
            activation_dtype=_ACTIVATIONS[self.activations],
            algorithm=self.optimizer,
            modules_to_not_convert=self._exclusion_axes(),
        )

    @property
    def needs_data(self) -> bool:
        """The scales of activations are measured."""
        return self.activations is not None

    def to_diffusers(self, model: Any = None) -> Any:
        """``diffusers.QuantoConfig``; it has no activations, no optimizer and no e5m2."""
        import diffusers

        refuse_ours(self, "diffusers")
        names = exclusions_for(self, model, "diffusers")
        arguments = {"weights_dtype": self.weights_dtype, "modules_to_not_convert": names}
        return build(diffusers.QuantoConfig, arguments, f"weights_dtype={self.weights_dtype}")

    def to_transformers(self, model: Any = None) -> Any:
        """``transformers.QuantoConfig``; it has activations, but no optimizer and no e5m2."""
        import transformers

        refuse_ours(self, "transformers", ("activations",) if self.activations in (None, "int8", "float8") else ())
        names = exclusions_for(self, model, "transformers")
        arguments = {"weights": self.weights_dtype, "activations": self.activations, "modules_to_not_convert": names}
        return build(transformers.QuantoConfig, arguments, f"weights_dtype={self.weights_dtype}")

    @classmethod
    def _read_dict(cls, data: dict[str, Any]) -> dict[str, Any]:
        """transformers writes ``weights`` for ``weights_dtype``."""
        if "weights" in data:
            if "weights_dtype" in data:
                raise ConfigError(
                    f"weights={data['weights']!r}: weights_dtype={data['weights_dtype']!r} is given too; "
                    "keep one of the two"
                )
            data["weights_dtype"] = data.pop("weights")
        return data


Config = QuantoConfig


def resolve(config: QuantoConfig, device: str, compute_dtype: str = "float32") -> QuantoConfig:
    """The config itself: nothing in it depends on the device."""
    return config


def calibrate(
    model: Any, layers: Sequence[str], config: QuantoConfig, compute_dtype: Any, feed: CalibrationFeed
) -> dict[str, tuple[Any, Any]]:
    """Layer -> the scales of its input and output, over one pass of ``feed``.

    The layers become quanto layers, in place, as :func:`quantize` makes them, so that each is measured on what the
    quantized layers before it give. Raises ConfigError naming a layer whose inputs are not finite or that never ran.
    """
    import torch
    from optimum.quanto import Calibration

    _convert(model, layers, config, compute_dtype)
    made, ran = {name: model.get_submodule(name) for name in layers}, {}  # type: ignore[var-annotated]
    for layer in made.values():  # as of no batch, if an earlier attempt ran out of memory
        layer.input_scale, layer.output_scale = torch.ones_like(layer.input_scale), torch.ones_like(layer.output_scale)
    hooks = {name: functools.partial(_before_measured_call, ran, name) for name in layers}
    handles = [made[name].register_forward_pre_hook(hook, prepend=True) for name, hook in hooks.items()]
    try:
        with Calibration(streamline=False):
            feed(model)
    finally:
        for handle in handles:
            handle.remove()
    for name in ran:  # in the order of the calls: where it began
        if not bool(torch.isfinite(made[name].input_scale)):
            raise ConfigError(
                f"calibration: {name} got NaN or infinities; use other data, or exclude it with modules_to_not_convert"
            )
    for name in layers:
        if name not in ran:
            raise _never_ran(name)
    return {name: (layer.input_scale, layer.output_scale) for name, layer in made.items()}


def quantize(
    model: Any,
    layers: Iterable[str],
    config: QuantoConfig,
    compute_dtype: Any = None,
    calibrated: Mapping[str, tuple[Any, Any]] | None = None,
) -> None:
    """Replace each named ``nn.Linear`` of ``model`` by a frozen quanto layer, in place.

    ``compute_dtype`` is a name or a torch dtype; None or ``auto`` keeps each layer's own. Another dtype than the
    layer's casts its input and output. ``calibrated`` is what :func:`calibrate` returned. Raises NotQuantized naming a
    layer that did not become what was asked for, ConfigError for activations without their scales.
    """
    layers = list(layers)
    if config.activations is not None and calibrated is None:
        name = _ACTIVATIONS[config.activations]
        raise ConfigError(
            f"activation_dtype={name}: quanto rounds activations by scales measured on calibration data, "
            "and there is none; give calibration data, or leave activation_dtype at none"
        )
    if config.activations is not None and (missing := [n for n in layers if n not in (calibrated or {})]):
        raise _never_ran(missing[0])
    _convert(model, layers, config, compute_dtype)
    if config.activations is not None:
        for name in layers:
            layer, scales = model.get_submodule(name), dict(calibrated or {})[name]
            layer.input_scale, layer.output_scale = (s.to(layer.weight.device, layer.weight.dtype) for s in scales)


def read_back(layer: Any) -> StoredWeight:
    """What the layer's tensors show; NotQuantized where it holds no quanto weight."""
    weight: Any = getattr(layer, "weight", None)
    qtype = getattr(weight, "qtype", None)
    if qtype is None or qtype.name not in _DTYPES:
        raise NotQuantized(f"backend=quanto: {type(layer).__name__} holds an unquantized weight; it was not converted")
    num_scales, num_rows = weight._scale.numel(), weight.shape[0]
    group_size = None if num_scales in (1, num_rows) else weight.numel() // num_scales
    return StoredWeight(
        dtype=_DTYPES[qtype.name],
        group_size=group_size,
        dense=weight.dequantize().detach().float(),
        activation_dtype=_activation_dtype(layer),
    )


def save(model: Any, folder: Any) -> None:
    """Write the quantized layers (weights, scales, biases) as safetensors, and the map of their formats as JSON."""
    from optimum.quanto import quantization_map
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    formats: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Any] = {}
    for name, entry in quantization_map(model).items():
        layer = model.get_submodule(name)
        formats[name] = {**entry, "dtype": dtype_name(layer.weight.dtype), "shape": list(layer.weight.shape)}
        tensors |= {f"{name}.{key}": value.cpu().contiguous().clone() for key, value in layer.state_dict().items()}
    save_file(tensors, folder / _WEIGHTS_FILE)
    (folder / _MAP_FILE).write_text(json.dumps(formats, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def load(model: Any, layers: Iterable[str], config: QuantoConfig, folder: Any) -> None:
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
    _override_operators()
    for name, entry in formats.items():
        if _DTYPES.get(entry["weights"]) != config.axes().dtype:
            raise ModelError(f"{folder}: {name} is stored as {entry['weights']}, not {config.weights_dtype}")
        if _DTYPES.get(entry["activations"], "none") != _ACTIVATIONS[config.activations]:
            raise ModelError(
                f"{folder}: {name} is stored with activations {entry['activations']}, not "
                f"{config.activations}; load with the config it was quantized with"
            )
        prefix = f"{name}."
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        replace_layer(model, name, _restored(model.get_submodule(name), entry, state, f"{folder}: {name}"))


# -- one layer


def _qtype(name: str | None) -> Any:
    """The library's object for ``weights_dtype`` or ``activations``."""
    from optimum.quanto import qtypes

    return None if name is None else qtypes["qfloat8_e4m3fn" if name == "float8" else f"q{name}"]


def _convert(model: Any, layers: Iterable[str], config: QuantoConfig, compute_dtype: Any) -> None:
    """Put frozen quanto layers in the places of the named ones that are none yet; activations get no scales here."""
    import torch

    _override_operators()
    weights, activations = _qtype(config.weights_dtype), _qtype(config.activations)
    for name in layers:
        layer = model.get_submodule(name)
        if getattr(layer, "frozen", False):  # calibration made it
            continue
        with torch.no_grad():
            new = _empty_layer(layer, weights, activations, wanted_dtype(layer, compute_dtype, "quanto"))
            new.weight = torch.nn.Parameter(_quantized(new, config.optimizer), requires_grad=layer.weight.requires_grad)
        if not new.frozen or new.weight.qtype != weights:
            raise NotQuantized(
                f"dtype={config.axes().dtype}: {name} ({type(layer).__name__}) kept its weight in "
                f"{new.weight.dtype}; add it to modules_to_not_convert"
            )
        replace_layer(model, name, new)


def _empty_layer(layer: Any, weights: Any, activations: Any, dtype: Any) -> Any:
    """A quanto layer with ``layer``'s unquantized weight and bias in ``dtype``, and its input and output dtype."""
    import torch
    from optimum.quanto.nn import QLinear

    source = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    source.weight = layer.weight if layer.weight.dtype == dtype else torch.nn.Parameter(layer.weight.detach().to(dtype))
    if layer.bias is not None:
        source.bias = layer.bias if layer.bias.dtype == dtype else torch.nn.Parameter(layer.bias.detach().to(dtype))
    new = QLinear.from_module(source, weights=weights, activations=activations)
    new.train(layer.training)
    if activations is not None:
        new.disable_output_quantization()
        new._quantize_hooks["input"].remove()  # to come after the cast
    cast_around(new, dtype, layer.weight.dtype)
    if activations is not None:
        new._quantize_hooks["input"] = new.register_forward_pre_hook(new.quantize_input)
        if dtype == torch.float16:  # the library would multiply the two scales, which float16 is too narrow for
            new.register_forward_pre_hook(_multiply_values)
    return new


def _multiply_values(layer: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (args[0].dequantize(),)


def _before_measured_call(ran: dict[str, None], name: str, layer: Any, args: tuple[Any, ...]) -> None:
    """Runs between the library's measurement of a batch and the rounding of it.

    The scale takes the layer's dtype (the input may have another), and is not 0, which would give NaN, where all
    inputs were: it is 1 then, which the library takes for not yet measured.
    """
    import torch

    ran[name] = None
    scale = layer.input_scale.to(layer.weight.dtype)
    layer.input_scale = torch.where(scale == 0, torch.ones_like(scale), scale)


def _never_ran(name: str) -> ConfigError:
    return ConfigError(f"calibration: {name} never ran on the calibration data; exclude it with modules_to_not_convert")


def _activation_dtype(layer: Any) -> str:
    """What the layer rounds its inputs to, by the hook that does it."""
    from optimum.quanto.nn import QModuleMixin

    hooks = [getattr(hook, "__func__", None) for hook in layer._forward_pre_hooks.values()]
    return _DTYPES[layer.activation_qtype.name] if QModuleMixin.quantize_input in hooks else "none"


def _quantized(layer: Any, optimizer: str) -> Any:
    """The quantized weight of a quanto layer, in the packing that no kernel dictates."""
    import torch
    from optimum.quanto.tensor import quantize_weight
    from optimum.quanto.tensor.grouped import group
    from optimum.quanto.tensor.optimizers import HqqOptimizer

    weight, qtype, group_size = layer.weight.detach(), layer.weight_qtype, layer.weight_group_size
    if qtype.bits == 8:
        scale, shift = layer.optimizer(weight, qtype=qtype, axis=0), None
    else:
        # called below its front door, which gives a single row one scale per weight
        search = HqqOptimizer() if optimizer == "hqq" else layer.optimizer
        scale, shift = search.optimize(group(weight, 0, group_size) if group_size else weight, qtype, 0)
    # where all weights of a scale are equal it may be 0, and 0 / 0 would be stored as NaN
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    return quantize_weight(weight, qtype, axis=0, scale=scale, shift=shift, group_size=group_size, optimized=False)


def _restored(layer: Any, entry: Mapping[str, Any], state: dict[str, Any], what: str) -> Any:
    """The quanto layer that was saved as ``state``, in the place and on the device of ``layer``."""
    import torch
    from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor

    if list(layer.weight.shape) != entry["shape"] or (layer.bias is None) != ("bias" not in state):
        raise ModelError(
            f"{what}: was saved with shape {entry['shape']}; the model's layer has "
            f"{list(layer.weight.shape)}, or their biases differ; load it into the model it was made from"
        )
    device, missing = layer.weight.device, []  # type: ignore[var-annotated]
    weights, activations = (None if entry[k] == "none" else _qtype(entry[k][1:]) for k in ("weights", "activations"))
    new = _empty_layer(layer, weights, activations, getattr(torch, entry["dtype"]))
    like = {
        "qtype": new.weight_qtype,
        "axis": 0,
        "size": new.weight.size(),
        "stride": new.weight.stride(),
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


# -- two operators of the library, replaced once per process


@functools.cache
def _override_operators() -> Any:
    """Replace two operators of the library; returns what keeps the replacement alive.

    ``qbytes_mm`` on a CPU hands bfloat16 products with int8 weights to ``torch._weight_int8pack_mm``, which reads
    past rows that are not aligned to 16 bytes: a crash, or infinities; on a GPU it takes rounded activations of 2 or 3
    dimensions only. ``unpack`` is compiled at its first use, by a C++ or CUDA compiler that a user need not have. Both
    become a few tensor operations with the same result.
    """
    import warnings

    import optimum.quanto  # noqa: F401  (defines the operators)
    import torch

    library: Any = torch.library.Library("quanto", "IMPL")  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():  # that a kernel is overridden is the purpose
        warnings.simplefilter("ignore", UserWarning)
        for device in ("CPU", "CUDA"):
            library.impl("qbytes_mm", _qbytes_mm, device, allow_override=True)
            library.impl("unpack", _unpack, device, allow_override=True)
    return library


def _qbytes_mm(activations: Any, weights: Any, scales: Any) -> Any:
    """(..., k), (n, k) and (n, 1) -> (..., n) in the dtype of ``scales``."""
    import torch

    if activations.dtype.itemsize > 1:
        return torch.matmul(activations.to(scales.dtype), (weights.to(scales.dtype) * scales).t())
    rows = activations.reshape(-1, activations.shape[-1])
    is_integer = rows.dtype == weights.dtype == torch.int8
    is_aligned = len(rows) > 16 and not (len(rows) % 8 or rows.shape[1] % 8 or len(weights) % 8)  # what the kernel asks
    if is_integer and is_aligned and rows.is_cuda:
        sums = torch._int_mm(rows, weights.t()).float()
    else:  # sums are kept in float32, as 8-bit kernels do
        sums = torch.matmul(rows.float(), weights.float().t())
    return (sums * scales.t().float()).to(scales.dtype).reshape(*activations.shape[:-1], len(weights))


def _unpack(packed: Any, bits: int) -> Any:
    import torch

    mask = (1 << bits) - 1
    return torch.cat([(packed >> (bits * i)) & mask for i in range(8 // bits)])
