"""How far a layer's stored weights are from the original ones: whole, row by row, and beyond what the format explains.

The error of a whole layer hides rows: a scale that underflows to zero takes its row with it, and nobody sees 150 lost
rows beside a few large ones. So each block of weights under one scale is held against the largest error that rounding
in its format can make (``Dtype`` and ``StoredWeight`` say it), computed from the original weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantlab.vocabulary.dtypes import DTYPES
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    from torch import Tensor

SLACK = 2.0
"""Times the largest rounding error, where scales follow each block's maximum."""
NEGLIGIBLE = 2.0**-16
"""A block is no loss whose largest weight is this share of the median row's: no 16-bit sum would show it."""
NOISE = 4.0
"""Error of a row over the row's (or the median row's) size that no format explains: 2 bits with a zero point and
one outlier in 128 weights come to sqrt(128) / 3."""
_SCALE_ROUNDING = 2.0**-8
"""Scales, and what is computed with them, may be in bfloat16."""
_WEIGHTS_AT_ONCE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class WeightErrors:
    """Relative errors ||W - Wq|| / ||W|| (Frobenius) of one layer, and the rows that are lost."""

    layer: float
    worst_row: float | None
    """The largest of the rows that are not all zeros; None: there is none."""
    lost_rows: tuple[int, ...] = ()
    """Rows with an error that the format does not explain."""
    lost_absmax: float = 0.0
    """The largest original weight in them."""
    num_zeroed: int = 0
    """Rows of weights that are not zero, which are stored as zeros because the format's scales end above them."""


def weight_errors(stored: StoredWeight, original: Tensor, is_searched: bool = False) -> WeightErrors:
    """Compare ``stored.dense`` with ``original``, tensors (out_features, in_features) on one device, in fp32.

    Args:
        is_searched: the algorithm trades the weights' error for that of the outputs, so that the bound of rounding
            does not hold: only what is gone is lost.
    """
    import torch

    norm = torch.linalg.vector_norm
    if stored.column_scale is not None:
        stored = replace(stored, column_scale=stored.column_scale.to(original.device))
        original = original.float()
    blocks: Tensor | None = None
    if stored.column_scale is not None:
        largest = _largest(original * stored.column_scale)
    elif original.is_contiguous():
        blocks, largest = _maxima(original, stored.group_size or original.shape[1])
    else:  # whose blocks would be a copy
        largest = _largest(original)
    largest = largest.float()
    if not bool((largest > 0).any()):
        made = stored.dense.any(1).nonzero().flatten().tolist()
        return WeightErrors(layer=float("inf") if made else 0.0, worst_row=None, lost_rows=tuple(made))
    wide = torch.float32
    if float(largest.max()) < 1e-15:  # whose squares float32 takes for 0
        wide, largest = torch.float64, largest.double()
    bound = _Bound(
        stored=stored,
        is_searched=is_searched,
        largest=float(largest.max()),
        negligible=NEGLIGIBLE * float(largest[largest > 0].median()),
        blocks=None if blocks is None else blocks.to(wide),
    )
    # both are widened piece by piece: a whole copy would be the largest tensor here. And each piece into the memory of
    # the one before: new pages take as long as the arithmetic
    slices = _slices(original, stored)
    rooms = [torch.empty(original[slices[0]].shape, dtype=wide, device=original.device) for _ in range(3)]
    parts = []
    for rows in slices:
        own, other = (
            tensor if tensor.dtype == wide else room[: len(tensor)].copy_(tensor)
            for tensor, room in zip((stored.dense[rows], original[rows]), rooms, strict=False)
        )
        parts.append(_rows(own, other, rooms[2][: len(own)], bound, rows.start))
    plain, size, rounded, scaled, lost, zeroed = (torch.cat(found) for found in zip(*parts, strict=True))
    alive = scaled > 0
    lost |= alive & ~(rounded <= NOISE * scaled.clamp_min(float(scaled[alive].median())))
    gone = alive & (rounded >= 0.999 * scaled)
    if int(gone.sum()) * 2 > int(alive.sum()):  # whatever the format's reason
        lost |= gone
    if float(norm(rounded[rounded.isfinite()])) >= float(norm(scaled)):  # the rows that are not, are lost already
        lost[:] = True
    found = lost.nonzero().flatten().tolist()
    return WeightErrors(
        layer=float(norm(plain) / norm(size)),
        worst_row=float((plain / size)[size > 0].max()),
        lost_rows=tuple(found),
        lost_absmax=float(original[found].abs().max()) if found else 0.0,
        num_zeroed=int((alive & zeroed).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class _Bound:
    """What the rows of a weight are held against."""

    stored: StoredWeight
    is_searched: bool
    largest: float
    """Magnitude in the whole weight, as it was rounded."""
    negligible: float
    blocks: Tensor | None
    """The largest magnitude of each block of the original weight; None: it is looked for in each slice."""


def _slices(original: Tensor, stored: StoredWeight) -> list[slice]:
    """Rows that are looked at together: whole blocks (and spans of them), and no more memory than that takes."""
    num_rows, in_features = original.shape
    together = stored.group_size or in_features
    if stored.span is not None and stored.span < original.numel():
        together = math.lcm(together, stored.span)
    least = math.lcm(in_features, together) // in_features
    step = least * max(1, _WEIGHTS_AT_ONCE // (least * in_features))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def _rows(dense: Tensor, original: Tensor, room: Tensor, bound: _Bound, first: int) -> tuple[Tensor, ...]:
    """Of each row, from row ``first`` of the weight on: error and size; both as it was rounded; whether a block of it
    is lost, whether it became zeros. ``room`` is for their difference."""
    import torch

    norm = torch.linalg.vector_norm
    difference = torch.sub(dense, original, out=room)
    plain = error, size = norm(difference, dim=1), norm(original, dim=1)
    if bound.stored.column_scale is not None:
        original, difference = original * bound.stored.column_scale, difference * bound.stored.column_scale
        error, size = norm(difference, dim=1), norm(original, dim=1)
    blocks, whole = _maxima(dense, bound.stored.group_size or dense.shape[1])
    return (*plain, error, size, _unexplained(blocks == 0, original, difference, bound, first), whole == 0)


def _unexplained(is_zero: Tensor, original: Tensor, difference: Tensor, bound: _Bound, first: int) -> Tensor:
    """bool (rows,): those with a block that ``is_zero``, or farther off, than its format's rounding explains."""
    import torch

    stored, (num_rows, in_features) = bound.stored, original.shape
    unit = stored.group_size or in_features
    weights, errors = (_in_units(t, unit) for t in (original, difference))
    begin = first * in_features // unit
    largest = _largest(weights) if bound.blocks is None else bound.blocks[begin : begin + len(weights)]
    known = DTYPES.get(stored.dtype)
    shared = torch.full_like(largest, stored.floor)
    if stored.span is not None and known is not None:
        share = known.max_error if stored.span_error is None else stored.span_error
        is_whole = stored.span > original.numel() or unit >= stored.span
        shared += share * (bound.largest if is_whole else _largest_in_span(largest, stored.span // unit))
    is_bad = is_zero & (largest > 2 * shared)
    if known is not None and not bound.is_searched:
        allowed = (known.rel_error + _SCALE_ROUNDING) * torch.linalg.vector_norm(weights, dim=1)
        allowed += unit**0.5 * (known.max_error * largest + shared)
        is_bad |= ~(torch.linalg.vector_norm(errors, dim=1) <= SLACK * allowed)
    found = torch.zeros(num_rows, dtype=torch.bool, device=original.device)
    starts = (is_bad & (largest > bound.negligible)).nonzero().flatten() * unit
    for offset in range(0, unit, in_features):  # a block of a flat format may cover rows
        found[((starts + offset) // in_features).clamp_max(num_rows - 1)] = True
    return found


def _maxima(rows: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """The largest magnitude of each block of ``unit`` weights, and of each row: of its blocks if it has whole ones."""
    blocks = _largest(_in_units(rows, unit))
    is_whole = rows.shape[1] % unit == 0
    return blocks, blocks.reshape(len(rows), -1).amax(1) if is_whole else _largest(rows)


def _largest(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, in half the time of ``rows.abs().amax(1)``."""
    import torch

    return torch.maximum(rows.amax(1), -rows.amin(1))


def _in_units(tensor: Tensor, unit: int) -> Tensor:
    """(units, unit), the last one filled up with zeros."""
    import torch

    if tensor.numel() % unit:
        tensor = torch.nn.functional.pad(tensor.reshape(-1), (0, -tensor.numel() % unit))
    return tensor.reshape(-1, unit)


def _largest_in_span(largest: Tensor, num: int) -> Tensor:
    """The largest of each ``num`` neighbours, for each of them."""
    return _in_units(largest, num).amax(1).repeat_interleave(num)[: len(largest)]
