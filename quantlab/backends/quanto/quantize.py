"""From a ``QuantoConfig`` to quantized layers, and from their tensors back."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.casting import wanted_dtype
from quantlab.backends.linears import linear_at
from quantlab.backends.quanto.config import ACTIVATIONS, DTYPES, QuantoConfig
from quantlab.backends.quanto.layers import empty_layer, library_qtype
from quantlab.backends.quanto.operators import override_operators
from quantlab.backends.unseen import never_ran, only_zeros
from quantlab.errors import ConfigError, NotQuantized
from quantlab.modules.feed import CalibrationFeed
from quantlab.modules.layers import places_of, replace_layer
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.utils.hooks import RemovableHandle

    from quantlab.backends.quanto.library_types import QLinear, QTensor, qtype


def resolve(config: QuantoConfig, device: str, compute_dtype: str = "float32") -> QuantoConfig:
    """The config itself: nothing in it depends on the device."""
    return config


def calibrate(
    model: nn.Module,
    layers: Sequence[str],
    config: QuantoConfig,
    compute_dtype: str | torch.dtype | None,
    feed: CalibrationFeed,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> the scales of its input (of the largest value over one pass of ``feed``) and of its output (1, unused).

    The layers become quanto layers, in place, as :func:`quantize` makes them, so that each is measured on what the
    quantized layers before it give. The library's own calibration keeps a moving average of the calls' maxima, which
    depends on their order and cuts what lies above it. Raises ConfigError naming a layer whose inputs are not finite
    or all zero, or that never ran.
    """
    import torch

    _convert(model, layers, config, compute_dtype)
    made = {name: cast("QLinear", model.get_submodule(name)) for name in layers}
    found: dict[str, Tensor] = {}
    for layer in made.values():  # as of no batch, if an earlier attempt ran out of memory
        layer.input_scale, layer.output_scale = torch.ones_like(layer.input_scale), torch.ones_like(layer.output_scale)
    handles = [_before_rounding(layer, functools.partial(_measure, found, name)) for name, layer in made.items()]
    try:
        feed(model)
    finally:
        for handle in handles:
            handle.remove()
    for name, scale in found.items():  # in the order of the calls: where it began
        if not bool(torch.isfinite(scale.to(made[name].weight.dtype))):
            raise ConfigError(
                f"calibration: {name} got NaN or infinities; use other data, or exclude it with modules_to_not_convert"
            )
    if missing := [name for name in layers if name not in found]:
        raise never_ran(missing[:1])
    if silent := [name for name in layers if not found[name]]:
        raise only_zeros(silent[:1])
    for name, layer in made.items():
        if not found[name].to(layer.weight.dtype):
            raise ConfigError(
                f"calibration: the largest inputs of {name} give a scale of {float(found[name]):.2g}, which "
                f"{dtype_name(layer.weight.dtype)} takes for 0; set compute_dtype=float32 or bfloat16, or exclude it"
            )
    return {name: (layer.input_scale, layer.output_scale) for name, layer in made.items()}


def quantize(
    model: nn.Module,
    layers: Iterable[str],
    config: QuantoConfig,
    compute_dtype: str | torch.dtype | None = None,
    calibrated: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> None:
    """Replace each named ``nn.Linear`` of ``model`` by a frozen quanto layer, in place.

    ``compute_dtype`` is a name or a torch dtype; None or ``auto`` keeps each layer's own. Another dtype than the
    layer's casts its input and output. ``calibrated`` is what :func:`calibrate` returned. Raises NotQuantized naming a
    layer that did not become what was asked for, ConfigError for activations without their scales.
    """
    layers = list(layers)
    if config.activations is not None and calibrated is None:
        name = ACTIVATIONS[config.activations]
        raise ConfigError(
            f"activation_dtype={name}: quanto rounds activations by scales measured on calibration data, "
            "and there is none; give calibration data, or leave activation_dtype at none"
        )
    if config.activations is not None and (missing := [n for n in layers if n not in (calibrated or {})]):
        raise never_ran(missing[:1])
    _convert(model, layers, config, compute_dtype)
    if config.activations is not None:
        for name in layers:
            layer, scales = cast("QLinear", model.get_submodule(name)), dict(calibrated or {})[name]
            layer.input_scale, layer.output_scale = (s.to(layer.weight.device, layer.weight.dtype) for s in scales)


def read_back(layer: nn.Module) -> StoredWeight:
    """What the layer's tensors show; NotQuantized where it holds no quanto weight."""
    kind: qtype | None = getattr(getattr(layer, "weight", None), "qtype", None)
    if kind is None or kind.name not in DTYPES:
        raise NotQuantized(f"backend=quanto: {type(layer).__name__} holds an unquantized weight; it was not converted")
    weight = cast("QTensor", layer.weight)
    num_scales, num_rows = weight._scale.numel(), weight.shape[0]
    group_size = None if num_scales in (1, num_rows) else weight.numel() // num_scales
    activation = _activation_dtype(cast("QLinear", layer))
    return StoredWeight(
        dtype=DTYPES[kind.name],
        group_size=group_size,
        dense=weight.dequantize().detach(),
        activation_dtype=activation,
        activation_granularity="" if activation == "none" else "per-tensor static",
        span=weight.numel() if num_scales == 1 else None,
    )


def adopt(layer: nn.Module, compute_dtype: str) -> nn.Module:
    """A layer that another library loaded, as it is; the operators are replaced that it needs a compiler for."""
    override_operators()
    return layer


# -- one layer


def _convert(
    model: nn.Module, layers: Iterable[str], config: QuantoConfig, compute_dtype: str | torch.dtype | None
) -> None:
    """Put frozen quanto layers in the places of the named ones that are none yet; activations get no scales here."""
    import torch

    override_operators()
    weights, activations = library_qtype(config.weights_dtype), library_qtype(config.activations)
    places = places_of(model)
    for name in layers:
        layer = linear_at(model, name)
        if getattr(layer, "frozen", False):  # calibration made it
            continue
        with torch.no_grad():
            new = empty_layer(layer, weights, activations, wanted_dtype(layer, compute_dtype, "quanto"))
            new.weight = torch.nn.Parameter(_quantized(new, config.optimizer), requires_grad=layer.weight.requires_grad)
        if not new.frozen or cast("QTensor", new.weight).qtype != weights:
            raise NotQuantized(
                f"dtype={config.axes().dtype}: {name} ({type(layer).__name__}) kept its weight in "
                f"{new.weight.dtype}; add it to modules_to_not_convert"
            )
        replace_layer(model, name, new, places)


def _before_rounding(layer: QLinear, hook: Callable[..., None]) -> RemovableHandle:
    """Register ``hook`` after what users hung on the layer, which may change its input, and before it is rounded."""
    handle = layer.register_forward_pre_hook(hook)
    hooks = layer._forward_pre_hooks
    ids = list(hooks)
    for own in ids[ids.index(layer._quantize_hooks["input"].id) : -1]:
        hooks[own] = hooks.pop(own)
    return handle


def _measure(found: dict[str, Tensor], name: str, layer: QLinear, args: tuple[Any, ...]) -> None:
    """Runs before a batch is rounded, with the largest scale so far; a batch may be empty.

    Where all inputs were 0 until now the scale that is rounded with is 1: 0 would give NaN.
    """
    import torch
    from optimum.quanto import absmax_scale

    if not args[0].numel():
        return
    scale = absmax_scale(args[0].detach().float(), layer.activation_qtype)
    found[name] = torch.maximum(found[name], scale) if name in found else scale
    scale = found[name].to(layer.weight.dtype)
    layer.input_scale = torch.where(scale == 0, torch.ones_like(scale), scale)


def _activation_dtype(layer: QLinear) -> str:
    """What the layer rounds its inputs to, by the hook that does it."""
    from optimum.quanto.nn import QModuleMixin

    hooks = [getattr(hook, "__func__", None) for hook in layer._forward_pre_hooks.values()]
    kind = layer.activation_qtype
    return DTYPES[kind.name] if kind is not None and QModuleMixin.quantize_input in hooks else "none"


def _quantized(layer: QLinear, optimizer: str) -> QTensor:
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
