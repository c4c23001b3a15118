"""Quantize: choose the layers, hand them to the backend, and read back from the tensors what they became.

A backend's word is not evidence. Every layer that was asked for is looked at afterwards; one that is not what was
asked for is an error that names it, unless ``quantization.on_mismatch`` says otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantlab.backends.exclusions import expand
from quantlab.backends.table import BACKENDS, calibrated_backend, native_config
from quantlab.errors import ConfigError, NotQuantized
from quantlab.modules.layers import linear_layers, resolve_exclusions
from quantlab.modules.memory import layer_memory
from quantlab.vocabulary.axes import QuantizationAxes, capability, resolve_axes
from quantlab.vocabulary.capabilities import CAPABILITIES, Capability
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.reports import LayerReport, QuantizationReport, StoredWeight


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked of the stage for one component."""

    component: str
    axes: QuantizationAxes
    native: QuantizationConfigMixin
    compute_dtype: str
    device: str
    default_exclusions: tuple[str, ...] = ()
    optional_exclusions: tuple[str, ...] = ()
    """Entries of the request that may match nothing: those of the shipped groups, which are written for many models."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which layers of a component are quantized, and how."""

    axes: QuantizationAxes
    """Those of the request, spelled out."""
    native: QuantizationConfigMixin
    """The request's config with what depends on the device made concrete."""
    taken: tuple[str, ...]
    excluded: Mapping[str, str]
    """Layer -> the entry that leaves it out."""
    misfits: Mapping[str, str]
    """Layer -> why it cannot be stored as asked (``quantization.on_mismatch`` says what becomes of it)."""
    asked: Mapping[str, tuple[QuantizationAxes, Capability]]
    idle_exclusions: tuple[str, ...] = ()
    fallback: QuantizationConfigMixin | None = None
    """Config of the misfits, where ``quantization.on_mismatch`` is a dtype that is quantized to."""

    @property
    def calibrated(self) -> tuple[str, ...]:
        """The layers that calibration looks at: those taken, and the misfits whose config needs data too."""
        return (*self.taken, *(self.misfits if self.fallback is not None and self.fallback.needs_data else ()))


def select_layers(request: Request, module: Any) -> Selection:
    """Which Linear layers of ``module`` the request takes.

    Raises:
        ConfigError: an exclusion that matches nothing, no layer left, or a device that the scheme does not run on.
        NotQuantized: layers that the scheme cannot take.
    """
    axes = resolve_axes(request.axes)
    row = capability(axes.backend, axes.dtype)
    check_device(axes, row, request.device, request.compute_dtype)
    layers = linear_layers(module)
    if not layers:
        raise ConfigError(f"model.components={request.component}: it has no Linear layer; nothing to quantize")
    excluded, idle = _excluded(request, module, list(layers))
    wanted = [n for n in layers if n not in excluded]
    if not wanted:
        raise ConfigError(
            f"modules_to_not_convert: all {len(layers)} Linear layers of {request.component} are excluded; "
            "nothing is left to quantize"
        )
    shapes = {n: tuple(layers[n].weight.shape) for n in layers}
    asked = _asked(axes, request.native, wanted)
    misfits = {n: reason for n in wanted if (reason := misfit(*asked[n], shapes[n]))}
    if misfits and axes.on_mismatch == "error":
        raise NotQuantized(_misfit_message(axes, misfits, shapes))
    return Selection(
        axes=axes,
        native=BACKENDS[axes.backend].resolve(request.native, request.device, request.compute_dtype),
        taken=tuple(n for n in wanted if n not in misfits),
        excluded=excluded,
        misfits=misfits,
        asked=asked,
        idle_exclusions=idle,
        fallback=_fallback_config(request, axes, {n: shapes[n] for n in misfits}),
    )


def quantize_component(
    request: Request, module: Any, original: Any, selection: Selection | None = None, calibrated: Any = None
) -> tuple[Any, QuantizationReport]:
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
    axes, native, excluded, misfits = chosen.axes, chosen.native, chosen.excluded, chosen.misfits
    if chosen.taken and native.needs_data:
        calibrated_backend(axes.backend).quantize(module, chosen.taken, native, request.compute_dtype, calibrated)
    elif chosen.taken:
        BACKENDS[axes.backend].quantize(module, chosen.taken, native, request.compute_dtype)
    fallback = _fall_back(request, chosen, module, calibrated)

    rows = []
    layers = linear_layers(original)
    originals = dict(original.named_modules())
    for name in layers:
        if name in chosen.taken or name in fallback:
            rows.append(
                _read_row(
                    request,
                    name,
                    module.get_submodule(name),
                    originals[name].weight,
                    None if name in chosen.taken else fallback[name],
                    misfits.get(name, ""),
                )
            )
        else:
            status = "excluded" if name in excluded else "skipped"
            reason = excluded[name] if name in excluded else misfits[name]
            rows.append(
                LayerReport(
                    component=request.component,
                    name=name,
                    kind="Linear",
                    shape=tuple(layers[name].weight.shape),
                    status=status,
                    dtype=str(layers[name].weight.dtype).removeprefix("torch."),
                    reason=reason,
                )
            )
    _require({n: a for n, (a, _) in chosen.asked.items()}, [r for r in rows if r.status == "quantized"])
    num = sum(p.numel() for p in {id(p): p for p in original.parameters()}.values())
    resolved = {k: v for k, v in _settings(native).items() if v != _settings(request.native).get(k)}
    resolved |= {"exclusions_without_effect": ", ".join(chosen.idle_exclusions)} if chosen.idle_exclusions else {}
    return module, QuantizationReport(layers=tuple(rows), num_parameters=num, resolved=resolved)


def _excluded(request: Request, module: Any, layers: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Layer -> why it stays as it is; and the entries under a library's rule that take no layer of the module.

    By quantlab's matcher: the family's defaults, and the config's entries; or, where those keep a library's rule, the
    entries that the node adds. An entry of quantlab's that matches nothing is a ConfigError.
    """
    native, axes = request.native, request.axes
    defaults = () if axes.replace_default_exclusions else request.default_exclusions
    theirs, idle = ({}, ()) if native.exclusion_rule == "quantlab" else expand(native, module)
    entries = (native.exclusions or ()) if native.exclusion_rule == "quantlab" else axes.exclusions()
    names = [n for n, _ in module.named_modules()]
    optional = (*defaults, *request.optional_exclusions)
    ours = resolve_exclusions(layers, [*defaults, *entries], names, optional_entries=optional)
    found = {name: f"modules_to_not_convert: {entry}" for name, entry in ours.items()}
    return {**native.disabled_layers(layers), **{n: r for n, r in theirs.items() if n in layers}, **found}, idle


def _asked(
    axes: QuantizationAxes, native: QuantizationConfigMixin, layers: Sequence[str]
) -> dict[str, tuple[QuantizationAxes, Capability]]:
    """What is asked for each layer, and the table's row of it: the axes, or another dtype that the config gives it."""
    dtypes = native.layer_dtypes(layers)
    own = {d: resolve_axes(_for_dtype(axes, d)) for d in set(dtypes.values())}
    per_layer = {n: own[dtypes[n]] if n in dtypes else axes for n in layers}
    return {n: (a, capability(a.backend, a.dtype)) for n, a in per_layer.items()}


def _for_dtype(axes: QuantizationAxes, dtype: str) -> QuantizationAxes:
    """The axes with another dtype; an algorithm that does nothing for it does not apply."""
    algorithm = axes.algorithm if axes.algorithm in capability(axes.backend, dtype).algorithms else "auto"
    return replace(axes, dtype=dtype, group_size="auto", algorithm=algorithm)


def _settings(config: QuantizationConfigMixin) -> dict[str, Any]:
    return dict(config.to_dict())


def check_device(axes: QuantizationAxes, row: Capability, device: str, compute_dtype: str) -> None:
    """ConfigError naming the requirement where the scheme does not run on this device or in this compute dtype."""
    who = f"dtype={axes.dtype}: {axes.backend}"
    if device not in row.devices:
        raise ConfigError(
            f"{who} runs it on {' and '.join(row.devices)} only, and this run is on {device}"
            f"{'; ' + row.note if row.note else ''}"
        )
    if axes.algorithm in row.cuda_algorithms and device != "cuda":
        others = [
            b
            for b, rows in CAPABILITIES.items()
            if b != axes.backend and axes.dtype in rows and axes.algorithm in rows[axes.dtype].algorithms
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


def misfit(axes: QuantizationAxes, row: Capability, shape: Sequence[int]) -> str:
    """Why a weight of ``shape`` (out_features, in_features) cannot be stored as asked; "" where it can."""
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


# -- fallback

_SHARED_ALGORITHMS = ("imatrix",)
"""Algorithms that look at a layer's inputs alone: what was measured serves another dtype as well."""


def _fallback_config(
    request: Request, axes: QuantizationAxes, shapes: Mapping[str, Sequence[int]]
) -> QuantizationConfigMixin | None:
    """How layers of these shapes are stored in ``on_mismatch``'s dtype; None where none is, or where that is a cast.

    NotQuantized where it does not fit either.
    """
    dtype = axes.on_mismatch
    if not shapes or dtype in ("error", "skip", *COMPUTE_DTYPES):
        return None
    row = capability(axes.backend, dtype)
    is_shared = axes.algorithm in _SHARED_ALGORITHMS and axes.algorithm in row.algorithms
    other = QuantizationAxes(
        backend=axes.backend,
        dtype=dtype,
        compute_dtype=axes.compute_dtype,
        algorithm=axes.algorithm if is_shared else "auto",
    )
    bad = {n: r for n, shape in shapes.items() if (r := misfit(resolve_axes(other), row, shape))}
    if bad:
        raise NotQuantized(
            f"quantization.on_mismatch={dtype}: does not fit either: "
            f"{'; '.join(f'{n}: {r}' for n, r in bad.items())}; choose a dtype without blocks, or skip"
        )
    file = getattr(request.native, "imatrix_file", None) if is_shared else None
    return native_config(other, {"imatrix_file": file} if file else None)


def _fall_back(request: Request, chosen: Selection, module: Any, calibrated: Any) -> dict[str, str]:
    """Store the misfits in ``on_mismatch``'s dtype; returns name -> dtype."""
    names, dtype = list(chosen.misfits), chosen.axes.on_mismatch
    if not names or dtype == "skip":
        return {}
    backend = chosen.axes.backend
    if chosen.fallback is None:
        for name in names:
            _store_as(module, name, dtype)
    elif chosen.fallback.needs_data:
        calibrated_backend(backend).quantize(module, names, chosen.fallback, request.compute_dtype, calibrated)
    else:
        BACKENDS[backend].quantize(module, names, chosen.fallback, request.compute_dtype)
    return dict.fromkeys(names, dtype)


def _store_as(module: Any, name: str, dtype: str) -> None:
    """Keep a layer's weight in a 16- or 32-bit dtype while it computes in its input's."""
    import torch

    class StoredLinear(torch.nn.Linear):
        computes_in_input_dtype = True  # so its weight says nothing about what the model computes in

        def forward(self, input: Any) -> Any:
            return torch.nn.functional.linear(input, self.weight.to(input.dtype), self.bias)

    layer = module.get_submodule(name)
    layer.weight = torch.nn.Parameter(layer.weight.data.to(getattr(torch, dtype)), requires_grad=False)
    layer.__class__ = StoredLinear


# -- read-back


def _read_row(request: Request, name: str, layer: Any, original: Any, fallback: str | None, reason: str) -> LayerReport:
    import torch

    if fallback in COMPUTE_DTYPES:
        stored = StoredWeight(dtype=fallback, group_size=None, dense=layer.weight.detach().float())
    else:
        stored = BACKENDS[request.axes.backend].read_back(layer)
    reference = original.detach().float()
    dense = stored.dense.to(reference.device)
    if dense.shape != reference.shape:
        raise NotQuantized(
            f"{name}: reads back with shape {tuple(dense.shape)}, the weight was {tuple(reference.shape)}"
        )
    error = float(torch.linalg.vector_norm(dense - reference) / torch.linalg.vector_norm(reference).clamp_min(1e-30))
    weight_bytes, scale_bytes = layer_memory(layer)
    return LayerReport(
        component=request.component,
        name=name,
        kind="Linear",
        shape=tuple(reference.shape),
        status="fallback" if fallback else "quantized",
        dtype=stored.dtype,
        group_size=stored.group_size,
        activation_dtype=stored.activation_dtype,
        bits_per_weight=8 * (weight_bytes + scale_bytes) / reference.numel(),
        weight_bytes=weight_bytes,
        scale_bytes=scale_bytes,
        weight_rel_error=error,
        is_simulated=stored.is_simulated,
        reason=reason or stored.note,
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
        if r.weight_rel_error is not None and not 0 <= r.weight_rel_error < 1:
            raise NotQuantized(
                f"dtype={axes.dtype}: the weight of {where} is lost (relative error {r.weight_rel_error:.3g})"
            )
    if rows and not any(r.weight_rel_error for r in rows):
        axes = asked[rows[0].name]
        raise NotQuantized(
            f"dtype={axes.dtype}: no weight changed at all; the model looks already quantized to this grid, "
            f"or {axes.backend} did nothing"
        )
