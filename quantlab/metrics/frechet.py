"""Distance between two sets of features, each taken as a Gaussian."""

from __future__ import annotations

from typing import Any

from quantlab.errors import MetricUndefined
from quantlab.metrics.arrays import Values, as_float32
from quantlab.metrics.statistics import require_finite


def frechet_distance(features_a: Values, features_b: Values) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), unbiased covariances, float64; features (n, d) and (m, d).

    Dowson and Landau 1982; Heusel et al. 2017 (FID, there of Inception features). It is biased upward for few samples:
    compare only values of equal n. With centred features A, B, the trace of the root is the sum of the singular values
    of A B^T / sqrt((n - 1)(m - 1)), which needs no matrix root; QR first keeps it at (d, d).
    Raises :class:`~quantlab.errors.MetricUndefined` for fewer than two samples, other shapes, and NaN.
    """
    import numpy as np

    sets = [as_float32(f).astype(np.float64) for f in (features_a, features_b)]
    if any(s.ndim != 2 or len(s) < 2 for s in sets) or sets[0].shape[1] != sets[1].shape[1]:
        raise MetricUndefined(
            f"frechet_judge: features of shape {sets[0].shape} and {sets[1].shape}; "
            "give at least two samples each, (n, d) and (m, d)"
        )
    for features in sets:
        require_finite(features.sum(axis=1), "frechet_judge")
    means = [s.mean(axis=0) for s in sets]
    roots: list[Any] = [np.linalg.qr((s - m) / np.sqrt(len(s) - 1), mode="r") for s, m in zip(sets, means, strict=True)]
    root_trace = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    distance = np.sum((means[0] - means[1]) ** 2) + np.sum(roots[0] ** 2) + np.sum(roots[1] ** 2) - 2.0 * root_trace
    return max(0.0, float(distance))
