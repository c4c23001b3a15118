"""How far the output of an encoder or of a plain module moved."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from quantlab.metrics.arrays import Values, as_float32, cosine, paired_rows, relative, row_dots
from quantlab.metrics.statistics import log_jackknife
from quantlab.vocabulary.reports import MetricValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray


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


def whole_intervals(candidate: Values, reference: Values, clusters: ArrayLike | None) -> dict[str, MetricValue]:
    """``output_cosine`` and ``output_rel_error`` of two vectors of one number a sample (n,), with their intervals.

    Neither is a mean, and their distances from equality (1 less the cosine; the error) are skewed, so that the interval
    is of the distance's logarithm. The README of this folder has how often it holds the truth. A metric without such an
    interval (one sample has all the error) is left out.
    """
    import numpy as np

    cand, ref = _vectors(candidate, reference)
    products = np.stack([cand * ref, cand**2, ref**2, (cand - ref) ** 2], axis=1)
    cluster = np.arange(len(ref)) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    sums = np.zeros((int(cluster.max()) + 1, products.shape[1]))
    np.add.at(sums, cluster, products)
    turned = log_jackknife(sums, lambda s: 1 - s[..., 0] / np.sqrt(s[..., 1] * s[..., 2]), len(ref))
    moved = log_jackknife(sums, lambda s: np.sqrt(s[..., 3] / s[..., 2]), len(ref))
    found = {"output_rel_error": moved}
    if turned is not None and turned.ci_lo is not None and turned.ci_hi is not None:
        low, high = 1 - turned.ci_hi, 1 - turned.ci_lo
        found["output_cosine"] = replace(turned, value=1 - turned.value, ci_lo=low, ci_hi=high)
    return {name: value for name, value in found.items() if value is not None}


def _vectors(candidate: Values, reference: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    return as_float32(candidate).astype(np.float64), as_float32(reference).astype(np.float64)


def _row(values: Values) -> NDArray[np.float32]:
    return as_float32(values).reshape(1, -1)


def _share(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much each is more than their mean: 1 on average."""
    mean = squares.mean()
    return squares / mean if mean > 0 else squares + 1.0
