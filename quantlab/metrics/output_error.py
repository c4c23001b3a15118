"""How far the output of an encoder or of a plain module moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantlab.metrics.arrays import Values, as_float32, cosine, paired_rows, relative, row_dots

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def output_cosine(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Cosine of the outputs (n, ...), each sample taken as one vector: (n,), 1 for equal directions.

    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and where an output is all zeros.
    """
    return cosine(candidate, reference, "output_cosine")


def output_rel_error(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """||y_q - y_r|| / ||y_r|| of the outputs (n, ...), Frobenius norm by sample: (n,), 0 for equal outputs.

    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and for a reference of zeros.
    """
    import numpy as np

    cand, ref = paired_rows(candidate, reference, "output_rel_error")
    error = cand - ref
    return np.sqrt(relative(row_dots(error, error), row_dots(ref, ref), "output_rel_error"))


def whole_cosine_shares(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """Cosine of two vectors of one number a sample (n,), as (n,) values: their mean is the cosine, 1 for equal ones.

    A sample's own cosine would be 1 or -1. What stands here is the whole's, moved by the sample's influence on it (the
    linearised one, by which also a ratio's standard error is made), so that the values' spread is the cosine's.
    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and where a vector is all zeros.
    """
    (cand, ref), whole = _vectors(candidate, reference), output_cosine(_row(candidate), _row(reference))
    products = cand * ref * (len(ref) / ((cand @ cand) ** 0.5 * (ref @ ref) ** 0.5))
    return products + whole * (1 - _share(cand**2) / 2 - _share(ref**2) / 2)


def whole_rel_error_shares(candidate: Values, reference: Values) -> NDArray[np.float64]:
    """||y_q - y_r|| / ||y_r|| of vectors of one number a sample (n,), as (n,) values: their mean is it, 0 where equal.

    The values are made as those of :func:`whole_cosine_shares`; single ones may be below 0.
    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and for a reference of zeros.
    """
    (cand, ref), whole = _vectors(candidate, reference), output_rel_error(_row(candidate), _row(reference))
    return whole * (1 + _share((cand - ref) ** 2) / 2 - _share(ref**2) / 2)


def _vectors(candidate: Values, reference: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    return as_float32(candidate).astype(np.float64), as_float32(reference).astype(np.float64)


def _row(values: Values) -> NDArray[np.float32]:
    return as_float32(values).reshape(1, -1)


def _share(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much each is more than their mean: 1 on average."""
    mean = squares.mean()
    return squares / mean if mean > 0 else squares + 1.0
