"""How far the output of an encoder or of a plain module moved."""

from __future__ import annotations

from collections.abc import Callable
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


def whole_cosine_shares(candidate: Values, reference: Values, clusters: ArrayLike | None = None) -> NDArray[np.float64]:
    """Cosine of two vectors of one number a sample (n,), as (n,) values: their mean is the cosine, 1 for equal ones.

    A sample's own cosine would be 1 or -1. What stands here is the whole's, moved by what leaving the sample's cluster
    out changes (the jackknife's pseudo-values), so that the values' spread is the cosine's.
    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and where a vector is all zeros.
    """
    (cand, ref), whole = _vectors(candidate, reference), output_cosine(_row(candidate), _row(reference))
    moved = _moved(_products(cand, ref), _cosine, float(whole[0]), clusters)
    if moved is not None:
        return moved
    products = cand * ref * (len(ref) / ((cand @ cand) ** 0.5 * (ref @ ref) ** 0.5))
    return products + whole * (1 - _share(cand**2) / 2 - _share(ref**2) / 2)


def whole_rel_error_shares(
    candidate: Values, reference: Values, clusters: ArrayLike | None = None
) -> NDArray[np.float64]:
    """||y_q - y_r|| / ||y_r|| of vectors of one number a sample (n,), as (n,) values: their mean is it, 0 where equal.

    The values are made as those of :func:`whole_cosine_shares`; single ones may be below 0.
    Raises :class:`~quantlab.errors.MetricUndefined` for different shapes and for a reference of zeros.
    """
    (cand, ref), whole = _vectors(candidate, reference), output_rel_error(_row(candidate), _row(reference))
    moved = _moved(_products(cand, ref), _rel_error, float(whole[0]), clusters)
    if moved is not None:
        return moved
    return whole * (1 + _share((cand - ref) ** 2) / 2 - _share(ref**2) / 2)


def whole_intervals(candidate: Values, reference: Values, clusters: ArrayLike | None) -> dict[str, MetricValue]:
    """``output_cosine`` and ``output_rel_error`` of two vectors of one number a sample (n,), with their intervals.

    Neither is a mean, and their distances from equality (1 less the cosine; the error) are skewed, so that the interval
    is of the distance's logarithm. The README of this folder has how often it holds the truth. A metric without such an
    interval (one sample has all the error) is left out.
    """
    cand, ref = _vectors(candidate, reference)
    sums, _ = _by_cluster(_products(cand, ref), clusters)
    turned = log_jackknife(sums, lambda totals: 1 - _cosine(totals), len(ref))
    moved = log_jackknife(sums, _rel_error, len(ref))
    found = {"output_rel_error": moved}
    if turned is not None and turned.ci_lo is not None and turned.ci_hi is not None:
        low, high = 1 - turned.ci_hi, 1 - turned.ci_lo
        found["output_cosine"] = replace(turned, value=1 - turned.value, ci_lo=low, ci_hi=high)
    return {name: value for name, value in found.items() if value is not None}


def _products(cand: NDArray[np.float64], ref: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of each sample what the totals of both metrics are made of, (n, 4)."""
    import numpy as np

    return np.stack([cand * ref, cand**2, ref**2, (cand - ref) ** 2], axis=1)


def _cosine(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    return totals[..., 0] / (totals[..., 1] * totals[..., 2]) ** 0.5


def _rel_error(totals: NDArray[np.float64]) -> NDArray[np.float64]:
    return (totals[..., 3] / totals[..., 2]) ** 0.5


def _by_cluster(
    values: NDArray[np.float64], clusters: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Each cluster's sums (C, k), and the cluster of each sample (n,)."""
    import numpy as np

    labels = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    cluster = np.unique(labels, return_inverse=True)[1]
    sums = np.zeros((int(cluster.max()) + 1, values.shape[1]))
    np.add.at(sums, cluster, values)
    return sums, cluster


def _moved(
    products: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    whole: float,
    clusters: ArrayLike | None,
) -> NDArray[np.float64] | None:
    """Values (n,) with the mean ``whole``, whose spread by cluster is the jackknife's; None where a cluster cannot be
    left out."""
    import numpy as np

    sums, cluster = _by_cluster(products, clusters)
    num, n = len(sums), len(cluster)
    total = sums.sum(axis=0)
    with np.errstate(all="ignore"):
        changes = statistic(total - sums) - statistic(total)
    if num < 2 or not np.isfinite(changes).all():
        return None
    moves = (num - 1) * (changes.mean() - changes)
    return np.asarray(whole + moves[cluster] * (n / (num * np.bincount(cluster)))[cluster], dtype=np.float64)


def _vectors(candidate: Values, reference: Values) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    import numpy as np

    return as_float32(candidate).astype(np.float64), as_float32(reference).astype(np.float64)


def _row(values: Values) -> NDArray[np.float32]:
    return as_float32(values).reshape(1, -1)


def _share(squares: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much each is more than their mean: 1 on average."""
    mean = squares.mean()
    return squares / mean if mean > 0 else squares + 1.0
