"""How far a layer's stored weights are from the original ones: whole, row by row, and beyond what the format explains.

The error of a whole layer hides rows: a scale that underflows to zero takes its row with it, and nobody sees 150 lost
rows beside a few large ones. So each block of weights under one scale is held against the largest error that rounding
in its format can make (``Dtype`` and ``StoredWeight`` say it), computed from the original weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.vocabulary.dtypes import DTYPES
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    from torch import Tensor

SLACK = 2.0
"""Times the largest rounding error, where scales follow each block's maximum."""
SLACK_SEARCHED = 8.0
"""The same for algorithms that choose scales or codes otherwise: they trade the weights' error for the outputs'."""
NEGLIGIBLE = 2.0**-16
"""A block is no loss whose largest weight is this share of the median row's: no 16-bit sum would show it."""
NOISE = 4.0
"""Error of a row over the row's (or the median row's) size that no format explains: 2 bits with a zero point and
one outlier in 128 weights come to sqrt(128) / 3."""
_SCALE_ROUNDING = 2.0**-8
"""Scales, and what is computed with them, may be in bfloat16."""


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
    """Compare ``stored.dense`` with ``original``, fp32 tensors (out_features, in_features) on one device.

    Args:
        is_searched: the scales do not follow the maxima of blocks, so that a wider bound holds.
    """
    import torch

    norm = torch.linalg.vector_norm
    difference = stored.dense - original
    rows, sizes = norm(difference, dim=1), norm(original, dim=1)
    layer = float(norm(rows) / norm(sizes).clamp_min(1e-30))
    relative = (rows / sizes)[sizes > 0]
    if not len(relative):
        return WeightErrors(layer=layer, worst_row=None)
    worst = float(relative.max())
    if stored.column_scale is not None:  # as it was rounded
        scale = stored.column_scale.to(original.device)
        original, difference = original * scale, difference * scale
        rows, sizes = norm(difference, dim=1), norm(original, dim=1)
    lost = _unexplained(stored, original, difference, SLACK_SEARCHED if is_searched else SLACK)
    alive = sizes > 0
    lost |= alive & ~(rows <= NOISE * sizes.clamp_min(float(sizes[alive].median())))
    gone = alive & (rows >= 0.999 * sizes)
    if int(gone.sum()) * 2 > int(alive.sum()):  # whatever the format's reason
        lost |= gone
    found = lost.nonzero().flatten().tolist()
    return WeightErrors(
        layer=layer,
        worst_row=worst,
        lost_rows=tuple(found),
        lost_absmax=float(original[found].abs().max()) if found else 0.0,
        num_zeroed=int((alive & (stored.dense == 0).all(1)).sum()),
    )


def _unexplained(stored: StoredWeight, original: Tensor, difference: Tensor, slack: float) -> Tensor:
    """bool (out_features,): rows with a block that is zero, or farther off, than its format's rounding explains."""
    import torch

    num_rows, in_features = original.shape
    unit = stored.group_size or in_features
    weights, errors = (_in_units(t, unit) for t in (original, difference))
    largest, length = weights.abs().amax(1), unit**0.5
    row_largest = original.abs().amax(1)
    negligible = NEGLIGIBLE * float(row_largest[row_largest > 0].median())
    known = DTYPES.get(stored.dtype)
    shared = torch.full_like(largest, stored.floor)
    if stored.span is not None and known is not None:
        share = known.max_error if stored.span_error is None else stored.span_error
        shared += share * _largest_in_span(largest, max(1, stored.span // unit))
    is_zero = (errors == -weights).all(1) & (largest > 2 * shared)
    is_bad = is_zero
    if known is not None:
        bound = (known.rel_error + _SCALE_ROUNDING) * torch.linalg.vector_norm(weights, dim=1)
        bound += length * (known.max_error * largest + shared)
        is_bad = is_bad | ~(torch.linalg.vector_norm(errors, dim=1) <= slack * bound)
    found = torch.zeros(num_rows, dtype=torch.bool, device=original.device)
    starts = (is_bad & (largest > negligible)).nonzero().flatten() * unit
    for offset in range(0, unit, in_features):  # a block of a flat format may cover rows
        found[((starts + offset) // in_features).clamp_max(num_rows - 1)] = True
    return found


def _in_units(tensor: Tensor, unit: int) -> Tensor:
    """(units, unit), the last one filled up with zeros."""
    import torch

    flat = tensor.reshape(-1)
    return torch.nn.functional.pad(flat, (0, -flat.numel() % unit)).reshape(-1, unit)


def _largest_in_span(largest: Tensor, num: int) -> Tensor:
    """The largest of each ``num`` neighbours, for each of them."""
    return _in_units(largest, num).amax(1).repeat_interleave(num)[: len(largest)]
