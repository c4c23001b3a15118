"""Quantize: choose the layers, hand them to the backend, and read back from the tensors what they became.

A backend's word is not evidence. Every layer that was asked for is looked at afterwards; one that is not what was
asked for is an error that names it, unless ``quantization.on_mismatch`` says otherwise; and so is one with rows that
are farther from the original weights than the format rounds (:mod:`quantlab.stages.weight_errors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.exclusions import expand, kept_in_float32
from quantlab.backends.scheme import Format, Scheme
from quantlab.backends.table import held_packages, offers
from quantlab.errors import ConfigError, NotQuantized
from quantlab.modules.compute_dtype import stand_for
from quantlab.modules.hooks import check_forwards, check_offloading
from quantlab.modules.layers import layers_left_alone, linear_layers, resolve_exclusions
from quantlab.modules.memory import layer_memory
from quantlab.modules.reached import check_weights_are_here, other_matrices
from quantlab.stages.weight_errors import WeightErrors, weight_errors
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, FLOAT16_SCALE, dtype_name
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.reports import LayerReport, QuantizationReport, StoredWeight

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class QuantizationRequest:
    """What is asked of the stage for one component."""

    component: str
    scheme: Scheme
    compute_dtype: str
    """Of the component; or of the layers, where the scheme's axes say one."""
    device: str
    default_exclusions: tuple[str, ...] = ()
    """Entries of the model family, which may match nothing."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which layers of a component are quantized, and how."""

    native: QuantizationConfigMixin
    """The scheme's config with what depends on the device made concrete."""
    taken: tuple[str, ...]
    excluded: Mapping[str, str]
    """Layer -> the entry that leaves it out."""
    misfits: Mapping[str, str]
    """Layer -> why it cannot be stored as asked (``quantization.on_mismatch`` says what becomes of it)."""
    asked: Mapping[str, Format]
    compute_dtypes: Mapping[str, str]
    """Layer -> the dtype that it computes in: where the axes leave it open its own, if the format computes in it."""
    idle_exclusions: tuple[str, ...] = ()
    fallback: Scheme | None = None
    """How the misfits are stored, where there are any and ``quantization.on_mismatch`` is a dtype of the backend."""

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The layers that calibration looks at: those taken, and the misfits whose config needs data too."""
        is_calibrated = self.fallback is not None and self.fallback.native.needs_data
        return (*self.taken, *(self.misfits if is_calibrated else ()))


def select_layers(request: QuantizationRequest, module: torch.nn.Module) -> Selection:
    """Which Linear layers of ``module`` the request takes.

    Raises:
        ConfigError: an exclusion that matches nothing, no layer left, or a device that the scheme does not run on.
        ModelError: a layer whose work a quantized one would not do (:func:`quantlab.modules.hooks.check_forwards`).
        NotQuantized: layers that the scheme cannot take.
    """
    scheme = request.scheme
    axes = scheme.axes
    check_device(scheme.format, request.device, request.compute_dtype)
    check_offloading(module, f"model.components={request.component}")
    check_weights_are_here(module, f"model.components={request.component}")
    layers = linear_layers(module)
    if not layers:
        others = other_matrices(module, ())
        told = (
            f"; its matrices are in {others} layers, which no backend replaces" if others else "; nothing to quantize"
        )
        raise ConfigError(f"model.components={request.component}: it has no Linear layer{told}")
    excluded, idle = _excluded(request, module, list(layers))
    wanted = [n for n in layers if n not in excluded]
    if not wanted and (others := other_matrices(module, layers.values())):
        raise ConfigError(
            f"model.components={request.component}: its matrices are in {others} layers, which are no nn.Linear and "
            f"which no backend replaces; its {len(layers)} Linear layers ({', '.join(list(layers)[:3])}) are excluded, "
            "so nothing is left to quantize: choose another model"
        )
    if not wanted:
        raise ConfigError(
            f"modules_to_not_convert: all {len(layers)} Linear layers of {request.component} are excluded; "
            "nothing is left to quantize"
        )
    check_forwards(module, wanted, f"model.components={request.component}")
    shapes = {n: tuple(layers[n].weight.shape) for n in layers}
    dtypes = scheme.native.layer_dtypes(wanted)
    asked = {n: scheme.other_formats[dtypes[n]] if n in dtypes else scheme.format for n in wanted}
    misfits = {n: reason for n in wanted if (reason := misfit(asked[n], shapes[n]))}
    if misfits and axes.on_mismatch == "error":
        raise NotQuantized(_misfit_message(axes, misfits, shapes))
    if len(misfits) == len(wanted):
        raise NotQuantized(_nothing_message(axes, request.component, misfits, shapes))
    kept = {n: dtype_name(layers[n].weight.dtype) for n in wanted} if axes.compute_dtype == "auto" else {}
    return Selection(
        compute_dtypes={
            n: kept[n] if kept.get(n) in asked[n].row.compute_dtypes else request.compute_dtype for n in wanted
        },
        native=scheme.backend.module.resolve(scheme.native, request.device, request.compute_dtype),
        taken=tuple(n for n in wanted if n not in misfits),
        excluded=excluded,
        misfits=misfits,
        asked=asked,
        idle_exclusions=idle,
        fallback=_checked_fallback(scheme, {n: shapes[n] for n in misfits}),
    )


def quantize_component(
    request: QuantizationRequest,
    module: torch.nn.Module,
    original: torch.nn.Module,
    selection: Selection | None = None,
    calibrated: Any = None,
) -> tuple[torch.nn.Module, QuantizationReport]:
    """Quantize ``module`` in place.

    Args:
        original: the unquantized module (may be ``module``'s source on another device); read, never changed.
        selection: what :func:`select_layers` chose; None: choose now.
        calibrated: what the calibrate stage returned, for a config that needs data.

    Returns:
        The module and its report, one row for each Linear layer.

    Raises:
        ConfigError, NotQuantized: see :func:`select_layers`; NotQuantized also for layers that read back as something
            else than what was asked for.
    """
    chosen = selection or select_layers(request, module)
    scheme, native, excluded, misfits = request.scheme, chosen.native, chosen.excluded, chosen.misfits
    if chosen.taken:
        _hand_over(scheme, native, module, {n: chosen.compute_dtypes[n] for n in chosen.taken}, calibrated)
    fallback = _fall_back(request, chosen, module, calibrated)

    kept = {n: ("skipped", reason) for n, reason in misfits.items() if n not in fallback}
    kept |= {n: ("excluded", reason) for n, reason in (*excluded.items(), *layers_left_alone(original).items())}
    rows = []
    lost: dict[str, str] = {}
    for name, part in original.named_modules():
        if name in kept:
            status, reason = kept[name]
            rows.append(_kept_row(request.component, name, cast("torch.nn.Linear", part), status, reason))
        elif name in chosen.taken or name in fallback:
            weight = cast("torch.nn.Linear", part).weight
            stand_for(module.get_submodule(name), weight)
            to, reason = (None if name in chosen.taken else fallback[name]), misfits.get(name, "")
            rows.append(_read_row(request, name, module.get_submodule(name), weight, to, reason, lost))
    _require({n: f.axes for n, f in chosen.asked.items()}, [r for r in rows if r.status == "quantized"])
    if lost:
        raise NotQuantized(_lost_message(request, chosen.compute_dtypes[min(lost)], lost))
    num = sum(p.numel() for p in {id(p): p for p in original.parameters()}.values())
    was = scheme.native.to_dict()
    resolved = {k: v for k, v in native.to_dict().items() if v != was.get(k)}
    resolved |= {"exclusions_without_effect": ", ".join(chosen.idle_exclusions)} if chosen.idle_exclusions else {}
    shared = sorted({r.activation_granularity for r in rows if r.activation_granularity})
    resolved |= {"activation_granularity": ", ".join(shared)} if shared else {}
    return module, QuantizationReport(layers=tuple(rows), num_parameters=num, resolved=resolved)


def _hand_over(
    scheme: Scheme,
    native: QuantizationConfigMixin,
    module: torch.nn.Module,
    compute_dtypes: Mapping[str, str],
    calibrated: Any,
) -> None:
    """Let the backend quantize layers (name -> compute dtype), with what calibration found where it was asked for."""
    for dtype in dict.fromkeys(compute_dtypes.values()):
        names = [name for name, own in compute_dtypes.items() if own == dtype]
        if native.needs_data:
            scheme.backend.calibrated.quantize(module, names, native, dtype, calibrated)
        else:
            scheme.backend.module.quantize(module, names, native, dtype)


def _excluded(
    request: QuantizationRequest, module: torch.nn.Module, layers: Sequence[str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """Layer -> why it stays as it is; and the entries under a library's rule that take no layer of the module.

    By quantlab's matcher: the family's defaults, and the scheme's entries; beside them what the model's class keeps in
    float32, and where the config keeps a library's rule, that library's. An entry of quantlab's that matches nothing is
    a ConfigError.
    """
    scheme, native = request.scheme, request.scheme.native
    defaults = () if scheme.axes.replace_default_exclusions else request.default_exclusions
    keep = not scheme.axes.replace_default_exclusions
    theirs, idle = kept_in_float32(module) if keep else {}, tuple[str, ...]()
    if native.exclusion_rule != "quantlab":
        theirs, idle = expand(native, module, keep)
    names = [n for n, _ in module.named_modules()]
    optional = (*defaults, *(entry for entries in scheme.shipped_exclusions.values() for entry in entries))
    ours = resolve_exclusions(layers, [*defaults, *scheme.exclusions], names, optional_entries=optional)
    found = {name: f"modules_to_not_convert: {entry}" for name, entry in ours.items()}
    return {**native.disabled_layers(layers), **{n: r for n, r in theirs.items() if n in layers}, **found}, idle


def check_device(asked: Format, device: str, compute_dtype: str) -> None:
    """ConfigError naming the requirement where the scheme does not run on this device or in this compute dtype."""
    axes, row = asked.axes, asked.row
    who = f"dtype={axes.dtype}: {axes.backend}"
    if device not in row.devices:
        raise ConfigError(
            f"{who} runs it on {' and '.join(row.devices)} only, and this run is on {device}"
            f"{'; ' + row.note if row.note else ''}"
        )
    if axes.algorithm in row.cuda_algorithms and device != "cuda":
        others = [
            b
            for b, offer in offers().items()
            if b != axes.backend and axes.dtype in offer.rows and axes.algorithm in offer.rows[axes.dtype].algorithms
        ]
        other = f", or backend={others[0]}" if others else ""
        raise ConfigError(
            f"algorithm={axes.algorithm}: {axes.backend} runs it on CUDA only, and this run is on "
            f"{device}; pass device=cuda{other}"
        )
    if compute_dtype not in row.compute_dtypes:
        raise ConfigError(
            f"{who} computes it in {', '.join(row.compute_dtypes)} only; this run computes in {compute_dtype}: "
            f"pass compute_dtype={row.compute_dtypes[0]}"
        )
    if device == "cuda" and row.min_compute_capability is not None:
        import torch

        have = torch.cuda.get_device_capability()
        if have < row.min_compute_capability:
            need = ".".join(map(str, row.min_compute_capability))
            raise ConfigError(f"{who} needs CUDA compute capability {need}; this device has {have[0]}.{have[1]}")


def misfit(asked: Format, shape: Sequence[int]) -> str:
    """Why a weight of ``shape`` (out_features, in_features) cannot be stored as asked; "" where it can."""
    axes, row = asked.axes, asked.row
    out_features, in_features = shape
    group = axes.group_size
    if isinstance(group, int) and row.grouping == "row" and in_features % group:
        return f"in_features {in_features} does not divide by group_size {group}"
    if in_features % row.in_features_multiple:
        return f"in_features {in_features} does not divide by {row.in_features_multiple}, the block of {axes.dtype}"
    if out_features % row.out_features_multiple:
        return f"out_features {out_features} does not divide by {row.out_features_multiple}"
    if (out_features * in_features) % row.numel_multiple:
        return f"{out_features} x {in_features} weights do not divide by {row.numel_multiple}"
    return ""


def _misfit_message(axes: QuantizationAxes, misfits: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> str:
    key = f"group_size={axes.group_size}" if any("group_size" in r for r in misfits.values()) else f"dtype={axes.dtype}"
    listed = "; ".join(f"{n} {list(shapes[n])}: {r}" for n, r in list(misfits.items())[:8])
    more = f"; and {len(misfits) - 8} more" if len(misfits) > 8 else ""
    return (
        f"{key}: {len(misfits)} layers cannot be stored as {axes.backend} {axes.dtype}: {listed}{more}. "
        "Choose another group size or dtype, exclude them with modules_to_not_convert, or pass "
        "quantization.on_mismatch=skip (or a dtype to fall back to)"
    )


def _nothing_message(
    axes: QuantizationAxes, component: str, misfits: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> str:
    """A scheme that fits nowhere is none, whatever becomes of the layers."""
    name, why = next(iter(misfits.items()))
    instead = "" if axes.on_mismatch in ("skip", *COMPUTE_DTYPES) else f" (dtype={axes.on_mismatch} fits them)"
    return (
        f"dtype={axes.dtype}: fits none of the {len(misfits)} layers of {component} that it should quantize, such as "
        f"{name} {list(shapes[name])}: {why}; choose another dtype or group size{instead}, or leave the component out "
        "of model.components"
    )


# -- fallback


def _checked_fallback(scheme: Scheme, shapes: Mapping[str, Sequence[int]]) -> Scheme | None:
    """The scheme of layers of these shapes; None where there are none. NotQuantized where they do not fit it either."""
    if not shapes or scheme.fallback is None:
        return None
    fallback = scheme.fallback
    bad = {n: r for n, shape in shapes.items() if (r := misfit(fallback.format, shape))}
    if bad:
        raise NotQuantized(
            f"quantization.on_mismatch={fallback.axes.dtype}: does not fit either: "
            f"{'; '.join(f'{n}: {r}' for n, r in bad.items())}; choose a dtype without blocks, or skip"
        )
    return fallback


def _fall_back(
    request: QuantizationRequest, chosen: Selection, module: torch.nn.Module, calibrated: Any
) -> dict[str, str]:
    """Store the misfits in ``on_mismatch``'s dtype; returns name -> dtype."""
    names, dtype = list(chosen.misfits), request.scheme.axes.on_mismatch
    if not names or dtype == "skip":
        return {}
    if chosen.fallback is None:
        for name in names:
            _store_as(module, name, dtype)
    else:
        dtypes = {name: chosen.compute_dtypes[name] for name in names}
        _hand_over(chosen.fallback, chosen.fallback.native, module, dtypes, calibrated)
    return dict.fromkeys(names, dtype)


def _store_as(module: torch.nn.Module, name: str, dtype: str) -> None:
    """Keep a layer's weight in a 16- or 32-bit dtype while it computes in its input's."""
    import torch

    class StoredLinear(torch.nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(input, self.weight.to(input.dtype), self.bias)

    layer = cast(torch.nn.Linear, module.get_submodule(name))
    layer.weight = torch.nn.Parameter(layer.weight.data.to(getattr(torch, dtype)), requires_grad=False)
    layer.__class__ = StoredLinear


# -- read-back


def _kept_row(component: str, name: str, layer: torch.nn.Linear, status: str, reason: str) -> LayerReport:
    return LayerReport(
        component=component,
        name=name,
        kind="Linear",
        shape=tuple(layer.weight.shape),
        status=status,
        dtype=dtype_name(layer.weight.dtype),
        reason=reason,
    )


def _read_row(
    request: QuantizationRequest,
    name: str,
    layer: torch.nn.Module,
    original: torch.Tensor,
    fallback: str | None,
    reason: str,
    lost: dict[str, str],
) -> LayerReport:
    """The layer's row; ``lost`` gets an entry where rows are farther off than the format explains."""
    import torch

    if fallback in COMPUTE_DTYPES:
        dense = cast(torch.nn.Linear, layer).weight.detach().float()
        floor = FLOAT16_SCALE if fallback == "float16" else 0.0
        stored = StoredWeight(dtype=fallback, group_size=None, dense=dense, floor=floor)
    else:
        stored = request.scheme.backend.module.read_back(layer)
    reference = original.detach().float()
    dense = stored.dense.detach().to(reference.device)
    if dense.shape != reference.shape:
        raise NotQuantized(
            f"{name}: reads back with shape {tuple(dense.shape)}, the weight was {tuple(reference.shape)}"
        )
    found = weight_errors(replace(stored, dense=dense), reference, request.scheme.axes.algorithm != "max")
    if found.lost_rows:
        lost[name] = _lost_text(name, reference, found)
    zeroed = f"{found.num_zeroed} of {len(reference)} rows are too small for the format's scales: stored as zeros"
    weight_bytes, scale_bytes = layer_memory(layer, held_packages())
    return LayerReport(
        component=request.component,
        name=name,
        kind="Linear",
        shape=tuple(reference.shape),
        status="fallback" if fallback else "quantized",
        dtype=stored.dtype,
        group_size=stored.group_size,
        activation_dtype=stored.activation_dtype,
        activation_granularity=stored.activation_granularity,
        bits_per_weight=8 * (weight_bytes + scale_bytes) / reference.numel(),
        weight_bytes=weight_bytes,
        scale_bytes=scale_bytes,
        weight_rel_error=found.layer,
        worst_row_rel_error=found.worst_row,
        is_simulated=stored.is_simulated,
        reason="; ".join(filter(None, (reason or stored.note, zeroed if found.num_zeroed else ""))),
    )


def _lost_text(name: str, original: torch.Tensor, found: WeightErrors) -> str:
    rows = found.lost_rows
    listed = ", ".join(map(str, rows[:4])) + (", ..." if len(rows) > 4 else "")
    return (
        f"{name} {list(original.shape)}: {len(rows)} of {len(original)} rows ({listed}; their largest weight is "
        f"{found.lost_absmax:.3g})"
    )


def _lost_message(request: QuantizationRequest, compute_dtype: str, lost: Mapping[str, str]) -> str:
    """The error of a layer hides them, so that this is no matter of degree."""
    axes = request.scheme.axes
    listed = "; ".join(list(lost.values())[:4]) + (f"; and {len(lost) - 4} more layers" if len(lost) > 4 else "")
    wider = ""
    if compute_dtype == "float16":
        wider = "float16 may be too narrow for their scales: pass model.dtype=bfloat16 or compute_dtype=float32, or "
    return (
        f"dtype={axes.dtype}: {axes.backend} loses weights (an error beyond the rounding of {axes.dtype}, or as large "
        f"as they are) in {listed}; {wider}"
        "choose another dtype or group_size, or exclude these layers with modules_to_not_convert"
    )


def _require(asked: Mapping[str, QuantizationAxes], rows: Sequence[LayerReport]) -> None:
    """Every quantized row is what was asked for; NotQuantized naming layer, shape and both values otherwise."""
    for r in rows:
        axes = asked[r.name]
        where = f"{r.name} {list(r.shape)}"
        if r.dtype != axes.dtype:
            raise NotQuantized(
                f"dtype={axes.dtype}: {axes.backend} left {where} as {r.dtype}; exclude it, or report this"
            )
        whole_row = r.group_size is None and r.shape[1] == axes.group_size  # one group a row is one scale a row
        if isinstance(axes.group_size, int) and r.group_size != axes.group_size and not whole_row:
            raise NotQuantized(
                f"group_size={axes.group_size}: {axes.backend} gave {where} {r.group_size}; "
                "choose a group size that divides in_features, or exclude the layer"
            )
        if axes.group_size == "none" and r.group_size not in (None, r.shape[1]):
            raise NotQuantized(f"group_size=none: {axes.backend} gave {where} groups of {r.group_size}")
        if axes.activation_dtype != "none" and r.activation_dtype != axes.activation_dtype:
            raise NotQuantized(f"activation_dtype={axes.activation_dtype}: {where} reads back {r.activation_dtype}")
    telling = [r for r in rows if (r.group_size or r.shape[1]) > 1]  # a scale for each weight stores it exactly
    if telling and not any(r.weight_rel_error for r in telling):
        axes = asked[telling[0].name]
        raise NotQuantized(
            f"dtype={axes.dtype}: no weight changed at all; the model looks already quantized to this grid, "
            f"or {axes.backend} did nothing"
        )
