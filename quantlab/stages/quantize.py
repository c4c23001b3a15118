"""Quantize: choose the layers, hand them to the backend, and read back from the tensors what they became.

A backend's word is not evidence. Every layer that was asked for is looked at afterwards; one that is not what was
asked for is an error that names it, unless ``quantization.on_mismatch`` says otherwise; and so is one with rows that
are farther from the original weights than the format rounds (:mod:`quantlab.stages.weight_errors`), and one that
multiplies by something else than it holds (:mod:`quantlab.stages.products`).
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from quantlab.backends.scheme import Scheme
from quantlab.errors import NotQuantized
from quantlab.modules.compute_dtype import stand_for
from quantlab.modules.device import current, lies_on
from quantlab.modules.dtype_first import keep_first_dtype
from quantlab.modules.holders import PACK, Holder, holders
from quantlab.modules.hooks import without_hooks_of
from quantlab.modules.layers import own_tensors
from quantlab.modules.memory import logical_size
from quantlab.modules.packed import read_by, stored_at
from quantlab.modules.source import Source, freed_at_once, trim
from quantlab.modules.ties import tied_parameters
from quantlab.progress import Advance
from quantlab.stages.layer_row import layer_row
from quantlab.stages.products import Product, product, question, wider
from quantlab.stages.select import QuantizationRequest, Selection, make_ready, select_layers, share_packed
from quantlab.stages.unquantized import unquantized
from quantlab.stages.weight_errors import WeightErrors, weight_errors
from quantlab.vocabulary.amounts import some_of
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.capabilities import CUSTOM
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, FLOAT16_SCALE, dtype_name
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.reports import LayerReport, QuantizationReport, StoredWeight

if TYPE_CHECKING:
    import torch


def quantize_component(
    request: QuantizationRequest,
    module: torch.nn.Module,
    original: torch.nn.Module,
    selection: Selection | None = None,
    calibrated: Any = None,
    *,
    is_view: bool = False,
    source: Source | None = None,
    advance: Advance | None = None,
) -> tuple[torch.nn.Module, QuantizationReport]:
    """Quantize ``module`` in place.

    Args:
        original: the unquantized module (may be ``module``'s source on another device); read, never changed.
        selection: what :func:`select_layers` chose; None: choose now.
        calibrated: what the calibrate stage returned, for a config that needs data.
        is_view: ``module`` has its tensors in common with ``original`` (:func:`quantlab.modules.layers.view_of`).
            Each layer gets its own before it is handed over, one after the other: never a whole dense copy.
        source: where the tensors of ``module`` are, which has none yet, nor has ``original``: each layer's are read
            when its turn comes, and once more to compare with; the peak is the quantized model and one layer.
        advance: told what is done (``quantize``, then ``read back``), with how many layers, and of how many.

    Returns:
        The module and its report, one row for each Linear layer.

    Raises:
        ConfigError, NotQuantized: see :func:`select_layers`; NotQuantized also for layers that read back as something
            else than what was asked for.
    """
    chosen = selection or select_layers(request, module)
    with contextlib.nullcontext() if source is None else freed_at_once():
        return _quantized(request, module, original, chosen, calibrated, is_view, source, advance or (lambda *_: None))


def _quantized(
    request: QuantizationRequest,
    module: torch.nn.Module,
    original: torch.nn.Module,
    chosen: Selection,
    calibrated: Any,
    is_view: bool,
    source: Source | None,
    advance: Advance,
) -> tuple[torch.nn.Module, QuantizationReport]:
    scheme, native, excluded, misfits = request.scheme, chosen.native, chosen.excluded, chosen.misfits
    found = holders(original, request.read)
    names = [*chosen.taken, *(misfits if scheme.axes.on_mismatch != "skip" else ())]
    if source is not None:
        owners = {found[n].owner_path for n in (*names, *chosen.same, *chosen.packed)}
        source.fill_others(module, owners)
    streamed = holders(module, request.read) if source is not None else {}
    read = {*chosen.packed, *chosen.packed.values()}
    paths: dict[str, str] = {}

    def bring(name: str) -> str:
        """Give the layer in which ``name`` is stored tensors that are its own, on its device; its path."""
        if source is not None:
            source.fill(module, found[name].owner_path)
            make_ready(module, streamed[name], chosen)
            if name not in read:
                del streamed[name]  # a backend's layer takes its owner's place, whose dense weight it would keep
        paths[name] = stored_at(module, name)
        if source is None and is_view:
            own_tensors(module.get_submodule(paths[name]))
        return paths[name]

    if chosen.taken:
        advance("quantize", 0, len(chosen.taken))
    for portion in _portions(chosen, is_view or source is not None):
        dtypes = {bring(n): chosen.compute_dtypes[n] for n in portion}
        _hand_over(scheme, native, module, dtypes, calibrated)
        advance("quantize", len(paths), len(chosen.taken))
        if source is not None:
            trim()
    for name in names:
        if name not in paths:
            bring(name)
    if source is not None:
        for name in chosen.packed:
            source.fill(module, found[name].owner_path)
        share_packed(streamed, chosen)
    fallback = _fall_back(request, chosen, module, calibrated, paths)
    for name, path in paths.items():
        if fallback.get(name) not in COMPUTE_DTYPES:
            read_by(module, path, functools.partial(_dense, scheme.backend.module.read_back))

    kept = {n: ("skipped", reason) for n, reason in misfits.items() if n not in fallback}
    kept |= {n: ("excluded", reason) for n, reason in excluded.items()}
    rows, num_read = [], 0
    lost: dict[str, str] = {}
    shared = {**chosen.same, **chosen.packed}
    tied = tied_parameters(original)
    first_kept: dict[str, str] = {}
    for name, holder in found.items():
        if name in shared:
            continue
        if name in chosen.left or name in kept:
            status = "excluded" if holder.kind == "linear" else "left"
            status, reason = kept.get(name) or (status, chosen.left[name])
            first = next((first_kept[p] for p in tied.get(holder.path, ()) if p in first_kept), "")
            first_kept.setdefault(holder.path, name)
            rows.append(replace(_kept_row(request.component, holder, status, reason), shares=first))
        elif name in paths:
            layer = module.get_submodule(paths[name])
            if source is not None:
                holder = replace(holder, owner=source.original(holder.owner_path))  # noqa: PLW2901
            stand_for(layer, holder.weight)
            to, reason = (None if name in chosen.taken else fallback[name]), misfits.get(name, "")
            rows.append(_read_row(request, holder, layer, to, reason, lost))
            num_read += 1
            advance("read back", num_read, len(names))
            if source is not None:
                del holder
                trim()
    _require({n: f.axes for n, f in chosen.asked.items()}, [r for r in rows if r.status == "quantized"])
    if lost:
        raise NotQuantized(_lost_message(request, chosen.compute_dtypes[min(lost)], lost))
    rows = _with_shared(rows, shared, found)
    was = scheme.native.to_dict()
    resolved = {k: v for k, v in native.to_dict().items() if v != was.get(k)}
    resolved |= {"exclusions_without_effect": ", ".join(chosen.idle_exclusions)} if chosen.idle_exclusions else {}
    granularities = sorted({r.activation_granularity for r in rows if r.activation_granularity})
    resolved |= {"activation_granularity": ", ".join(granularities)} if granularities else {}
    report = QuantizationReport(layers=tuple(rows), num_parameters=logical_size(original)[0], resolved=resolved)
    keep_first_dtype(module, original)
    told = unquantized(request.component, report, request)
    return module, replace(report, unquantized=(told,) if told else ())


def _with_shared(
    rows: Sequence[LayerReport], same: Mapping[str, str], order: Mapping[str, Holder]
) -> list[LayerReport]:
    """The rows, and one for each holder whose weight is stored with another's: the same, and no bytes of its own."""
    found = {row.name: row for row in rows}
    for name, first in same.items():
        kind = order[name].kind
        found[name] = replace(found[first], name=name, kind=kind, shares=first, weight_bytes=0, scale_bytes=0)
    return [found[name] for name in order if name in found]


def _portions(chosen: Selection, is_view: bool) -> list[Sequence[str]]:
    """The layers that are handed over together: all; or one by one, unless the config says of which layer it speaks."""
    if not is_view or chosen.native.other_dtypes:
        return [chosen.taken] if chosen.taken else []
    return [(name,) for name in chosen.taken]


def _dense(read_back: Callable[[torch.nn.Module], StoredWeight], layer: torch.nn.Module) -> torch.Tensor:
    """The matrix that a backend's layer holds, for whoever reads it: float32 (out_features, in_features)."""
    dense: torch.Tensor = read_back(layer).dense
    return dense.detach().float()


def _hand_over(
    scheme: Scheme,
    native: QuantizationConfigMixin,
    module: torch.nn.Module,
    compute_dtypes: Mapping[str, str],
    calibrated: Any,
) -> None:
    """Let the backend quantize layers (name -> compute dtype), with what calibration found where it was asked for."""
    together: dict[tuple[str, str], list[str]] = {}
    for name, dtype in compute_dtypes.items():  # on each device by itself, unless the config says which layer it is of
        where = "" if native.other_dtypes else lies_on(module.get_submodule(name))
        together.setdefault((dtype, where), []).append(name)
    for (dtype, where), names in together.items():
        with current(where):
            if native.needs_data:
                scheme.backend.calibrated.quantize(module, names, native, dtype, calibrated)
            else:
                scheme.backend.module.quantize(module, names, native, dtype)


# -- fallback


def _fall_back(
    request: QuantizationRequest,
    chosen: Selection,
    module: torch.nn.Module,
    calibrated: Any,
    paths: Mapping[str, str],
) -> dict[str, str]:
    """Store the misfits in ``on_mismatch``'s dtype; returns name -> dtype."""
    names, dtype = list(chosen.misfits), request.scheme.axes.on_mismatch
    if not names or dtype == "skip":
        return {}
    if chosen.fallback is None:
        for name in names:
            _store_as(module, paths[name], dtype)
    else:
        dtypes = {paths[name]: chosen.compute_dtypes[name] for name in names}
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


def _kept_row(component: str, holder: Holder, status: str, reason: str) -> LayerReport:
    return LayerReport(
        component=component,
        name=holder.name,
        kind=holder.kind,
        shape=holder.view.matrix_shape,
        status=status,
        dtype=dtype_name(holder.weight.dtype) if holder.has_weight else "",
        reason=reason,
    )


def _read_row(
    request: QuantizationRequest,
    holder: Holder,
    layer: torch.nn.Module,
    fallback: str | None,
    reason: str,
    lost: dict[str, str],
) -> LayerReport:
    """The row of ``layer``, in which the weight of ``holder`` is stored.

    ``lost`` gets an entry where rows are farther off than the format explains."""
    import torch

    if fallback in COMPUTE_DTYPES:
        dense = cast(torch.nn.Linear, layer).weight.detach()
        floor = FLOAT16_SCALE if fallback == "float16" else 0.0
        stored = StoredWeight(dtype=fallback, group_size=None, dense=dense, floor=floor)
    else:
        stored = request.scheme.backend.module.read_back(layer)
    name, reference = holder.name, holder.view.matrix(holder.weight.detach())
    dense = stored.dense.detach().to(reference.device)
    if dense.shape != reference.shape:
        raise NotQuantized(
            f"{name}: reads back with shape {tuple(dense.shape)}, the weight was {tuple(reference.shape)}"
        )
    found = weight_errors(replace(stored, dense=dense), reference, request.scheme.axes.algorithm != "max")
    if found.lost_rows:
        lost[name] = _lost_text(name, reference, found)
    with without_hooks_of(layer, holder.owner):  # what users hung on it is not the layer's own answer
        is_called = fallback not in COMPUTE_DTYPES and holder.way != PACK
        asked = question(stored, holder.weight.dtype) if is_called else None
        del dense
        stored = replace(stored, dense=torch.empty(0))  # the layer may make one of its own
        with current(lies_on(layer)):
            answered = None if asked is None else product(layer, asked)
    if answered is not None and not answered.is_explained:
        raise NotQuantized(_wrong_product(request, name, tuple(reference.shape), answered))
    zeroed = f"{found.num_zeroed} of {len(reference)} rows are too small for the format's scales: stored as zeros"
    how = f"packed: dequantized when it is read{f' ({holder.reason})' if holder.reason else ''}"
    how = how if holder.way == PACK else ""
    reasons = "; ".join(filter(None, (reason or stored.note, how, zeroed if found.num_zeroed else "")))
    rows, columns = reference.shape
    return layer_row(
        request.component,
        holder,
        layer,
        (rows, columns),
        stored,
        found,
        answered,
        "fallback" if fallback else "quantized",
        reasons,
    )


def _wrong_product(request: QuantizationRequest, name: str, shape: tuple[int, ...], found: Product) -> str:
    computed = request.scheme.axes.compute_dtype
    narrow = wider(request.scheme, request.compute_dtype if computed == "auto" else computed)
    narrow = narrow if math.isinf(found.rel_error) else ""
    way_out = f"{narrow}choose another dtype, group_size or algorithm, or exclude it with modules_to_not_convert"
    if found.raised:
        return (
            f"dtype={request.scheme.axes.dtype}: {name} {list(shape)} cannot be run by {request.scheme.axes.backend} "
            f"({found.raised.splitlines()[0][:300]}); {way_out}"
        )
    off = "NaN or infinite" if math.isinf(found.rel_error) else f"{found.rel_error:.2g} of their size off"
    return (
        f"dtype={request.scheme.axes.dtype}: {name} {list(shape)} multiplies by something else than the weight that it "
        f"holds: its outputs for random inputs are {off}, and rounding explains {found.tolerance:g} "
        f"({request.scheme.axes.backend}, by {found.kernel or 'no known kernel'}); {way_out}"
    )


def _lost_text(name: str, original: torch.Tensor, found: WeightErrors) -> str:
    rows = found.lost_rows
    listed = some_of(map(str, rows), 4)
    return (
        f"{name} {list(original.shape)}: {len(rows)} of {len(original)} rows ({listed}; their largest weight is "
        f"{found.lost_absmax:.3g})"
    )


def _lost_message(request: QuantizationRequest, compute_dtype: str, lost: Mapping[str, str]) -> str:
    """The error of a layer hides them, so that this is no matter of degree."""
    axes = request.scheme.axes
    listed = "; ".join(list(lost.values())[:4]) + (f"; and {len(lost) - 4} more layers" if len(lost) > 4 else "")
    narrow = wider(request.scheme, compute_dtype)
    narrow = f"float16 may be too narrow for their scales: {narrow}" if narrow else ""
    return (
        f"dtype={axes.dtype}: {axes.backend} loses weights (an error beyond the format's rounding, or as large "
        f"as they are) in {listed}; {narrow}"
        "choose another dtype or group_size, or exclude these layers with modules_to_not_convert"
    )


def _require(asked: Mapping[str, QuantizationAxes], rows: Sequence[LayerReport]) -> None:
    """Every quantized row is what was asked for; NotQuantized naming layer, shape and both values otherwise."""
    for r in rows:
        axes = asked[r.name]
        where = f"{r.name} {list(r.shape)}"
        if axes.dtype == CUSTOM:  # what it is stored as is what the row says
            continue
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
