"""What of a component's export is refused by its shapes and its scheme: known before there are tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from quantlab.backends.part import Part
from quantlab.exporting.checkpoint import check_part, library_of
from quantlab.modules.holders import Holder, holders
from quantlab.stages.select import QuantizationRequest, Selection
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.reports import LayerReport

if TYPE_CHECKING:
    from torch import nn


def check_outlined(request: QuantizationRequest, module: nn.Module, chosen: Selection, dtype: str) -> None:
    """ConfigError as :func:`quantlab.exporting.whole.check_exportable`, of a module without tensors.

    ``dtype`` is the model's. What is found in a backend's layers alone (how they are packed) is not.
    """
    part = Part(
        name=request.component,
        module=module,
        original=module,
        library=library_of(module, request.component),
        config=chosen.native,
        layers=list(_rows(request, module, chosen)),
        dtype=dtype,
        compute_dtype=request.compute_dtype,
    )
    check_part(part)


def _rows(request: QuantizationRequest, module: nn.Module, chosen: Selection) -> Iterator[LayerReport]:
    """A row for each holder, as far as it is decided what becomes of it."""
    found = holders(module, request.read)
    shared = {**chosen.same, **chosen.packed}
    for name, holder in found.items():
        row = _row(request, chosen, holder, shared.get(name, name))
        yield replace(row, shares=shared[name]) if name in shared else row


def _row(request: QuantizationRequest, chosen: Selection, holder: Holder, first: str) -> LayerReport:
    """``first``: whose weight is stored for the holder too."""
    status, dtype, instead = "left", dtype_name(holder.weight.dtype), request.scheme.axes.on_mismatch
    if first in chosen.taken:
        status, dtype = "quantized", chosen.asked[first].axes.dtype
    elif first in chosen.misfits:
        status, dtype = ("skipped", dtype) if instead == "skip" else ("fallback", instead)
    elif first in chosen.excluded:
        status = "excluded"
    return LayerReport(
        component=request.component,
        name=holder.name,
        kind=holder.kind,
        shape=holder.view.matrix_shape,
        status=status,
        dtype=dtype,
    )
