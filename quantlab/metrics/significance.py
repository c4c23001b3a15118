"""Is a difference real: tests on paired differences, and Holm's adjustment for many of them.

A test of the mean (Student's t, by clusters) and a test of the ranks (Wilcoxon) ask different things: is the mean
difference 0, and does a typical cluster differ. Where differences are skewed a few clusters make the mean, and a scheme
that is worse on most of them can hide behind those few; both answers are reported then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from quantlab.errors import MetricUndefined
from quantlab.vocabulary.reports import MetricValue

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

ALPHA = 0.05
MIN_RANKED = 8
"""Fewer clusters than this: no test of skewness, and no rank test (8 equal signs are its first p below 0.01)."""


def t_test(difference: MetricValue, degrees: int) -> float | None:
    """Two-sided p-value of ``difference`` being 0: the paired t-test on cluster differences, by ``degrees`` of freedom.

    For one stratum and clusters of one size it is the t-test on the clusters' mean differences. None where the
    difference has no standard error; one that is the same in every cluster has p = 0, or 1 if it is 0.
    """
    from scipy.special import stdtr

    if difference.se is None or degrees < 1:
        return None
    if difference.se == 0:
        return 1.0 if difference.value == 0 else 0.0
    return float(2 * stdtr(degrees, -abs(difference.value) / difference.se))


def rank_test(differences: ArrayLike) -> float | None:
    """Two-sided p-value of Wilcoxon's signed-rank test (1945) on the clusters' mean differences (C,).

    Differences of 0 are left out. None below 8 clusters; 1 where all are 0.
    """
    import numpy as np
    from scipy.stats import wilcoxon

    array = np.asarray(differences, dtype=np.float64)
    if array.size < MIN_RANKED:
        return None
    return float(wilcoxon(array).pvalue) if np.any(array) else 1.0


def is_skewed(differences: ArrayLike) -> bool:
    """Do the clusters' mean differences (C,) lean to one side: D'Agostino's test (1970) at 5%; False below 8."""
    import numpy as np
    from scipy.stats import skewtest

    array = np.asarray(differences, dtype=np.float64)
    if array.size < MIN_RANKED or np.ptp(array) <= 1e-12 * np.abs(array).max():
        return False
    return float(skewtest(array).pvalue) < ALPHA


def mcnemar_exact(values_a: ArrayLike, values_b: ArrayLike) -> float:
    """Two-sided p-value of McNemar's exact test (1947) on two 0/1 arrays (n,) over the same independent samples.

    The samples on which the two differ fall on either side like a fair coin if neither is better: a binomial test.
    Raises :class:`MetricUndefined` for values other than 0 and 1 and for different numbers of samples.
    """
    import numpy as np
    from scipy.special import bdtr

    a, b = np.asarray(values_a), np.asarray(values_b)
    require_same_samples(a, b)
    if not (np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all()):
        raise MetricUndefined("difference: McNemar's test is for samples that are 0 or 1; use the paired t-test")
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    if only_a == only_b:
        return 1.0
    return float(min(1.0, 2 * bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (1979) of the p-values of one family, in the given order; each is at most 1."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def require_same_samples(a: NDArray[Any], b: NDArray[Any]) -> None:
    """MetricUndefined where two arrays have not the same number of samples."""
    if a.shape != b.shape:
        raise MetricUndefined(
            f"difference: {a.size} samples against {b.size}; compare runs with the same evaluation inputs"
        )
