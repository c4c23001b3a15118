"""How sure a number is: standard errors, 95% intervals and paired differences, by cluster and stratum.

A cluster is what was drawn independently (a prompt with its seeds, a chunk of text with its tokens); a stratum is a
part of fixed size of the evaluation set (a class). Samples of one cluster resemble each other, so errors are counted by
cluster; strata cannot fluctuate, so their differences do not count as error.

Estimator: the mean over all samples, which is the ratio (sum of cluster sums) / (sum of cluster sizes) in each stratum,
weighted by the stratum's share of the samples. Its standard error is the linearised one of a ratio (Cochran, Sampling
Techniques, 1977, 6.3 and 11.8); for clusters of one size and one stratum that is SD of the cluster means / sqrt(C). It
has as many degrees of freedom as there are clusters less strata. A stratum with a single cluster shows no spread, so
such strata are taken together (with the smallest other one if there is only one): the error rather comes out too large.

Intervals of means: :mod:`quantlab.metrics.skewed`, on the clusters' values; their shape is that of all clusters
together (a stratum of two shows none), their spread that within strata. Of numbers that are no means: percentiles of a
bootstrap over clusters, within strata, of C_h - 1 draws out of C_h: with that its variance is the estimator's also
for few clusters in a stratum (McCarthy and Snowden 1985; Rao and Wu 1988). The percentiles lie as far out as Student's
t does for so many clusters (Hesterberg, The American Statistician 69, 2015, 371-386).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantlab.errors import MetricUndefined
from quantlab.metrics.significance import require_same_samples
from quantlab.metrics.skewed import TAILS, skewed_bounds, t_bounds
from quantlab.vocabulary.reports import MetricValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike, NDArray

MIN_CLUSTERS = 5
"""Fewer clusters than this: no interval of a mean."""
MIN_DRAWN = 10
"""Fewer clusters than this: no bootstrap, which needs something to draw from."""
Z_95 = 1.959963984540054
_ROUNDING = 1e-13
"""Of two sums in float64: a smaller difference, as a share of them, is made by the order of adding, and is none."""


def require_finite(values: ArrayLike, name: str, sample_ids: Sequence[str] = ()) -> None:
    """Raise :class:`MetricUndefined` where ``values`` (n,) has no sample, or NaN or infinity, naming the first one."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise MetricUndefined(
            f"{name}: no samples to average (an array of shape {array.shape}); evaluate at least one sample"
        )
    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        first = int(bad[0])
        which = f"sample {sample_ids[first]!r} (row {first})" if first < len(sample_ids) else f"sample {first}"
        raise MetricUndefined(
            f"{name}: {which} is {array[first]} ({bad.size} of {array.size} are not finite); the model overflows, or "
            "the number does not exist there: try compute_dtype=bfloat16 or float32, or leave that sample out"
        )


def mean_interval(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
    *,
    sample_ids: Sequence[str] = (),
) -> MetricValue:
    """Mean of ``values`` (n,) with its standard error and 95% interval; the method is that of the module's docstring.

    ``clusters`` and ``strata`` are labels (n,), None for each sample its own cluster and for one stratum. ``n`` of the
    result counts samples. No interval below 5 clusters, no standard error below 2; no bound below 0 of values that are
    all 0 or more. ``num_bootstrap`` draws, by ``seed``, make the interval; metrics of one layout share them.
    Raises :class:`MetricUndefined` for NaN or infinity (naming the sample), for no samples, and for labels that do not
    fit.
    """
    import numpy as np

    require_finite(values, "value", sample_ids)
    array = np.asarray(values, dtype=np.float64)
    layout = _layout(array.size, clusters, strata)
    with np.errstate(over="ignore"):
        mean = float(array.mean())
    if not math.isfinite(mean):
        raise MetricUndefined(f"value: the sum of {array.size} samples is beyond float64; look at them one by one")
    found = _mean_value(mean, _sums(array, layout), layout, num_bootstrap, seed)
    if found.ci_lo is not None and found.ci_lo < 0 <= array.min():
        return replace(found, ci_lo=0.0)
    return found


def within(found: MetricValue, bounds: tuple[float, float]) -> MetricValue:
    """``found`` with an interval that ends where the number does (a rate at 0 and 1), and holds its own value.

    What lies beyond is impossible, so that the interval holds the truth as often as before.
    """
    if found.ci_lo is None or found.ci_hi is None:
        return found
    low, high = (min(max(bound, bounds[0]), bounds[1]) for bound in (found.ci_lo, found.ci_hi))
    return replace(found, ci_lo=min(low, found.value), ci_hi=max(high, found.value))


def bootstrap_interval(
    statistic: Callable[[NDArray[np.int64]], float],
    num_samples: int,
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
    *,
    recenter: bool = False,
) -> MetricValue:
    """A number that is no mean (quantile, perplexity, Frechet distance) with the SD and 95% interval of its bootstrap.

    ``statistic`` takes an array of sample numbers, with repetitions, and returns the number on those samples; its value
    is that of all samples in order. Below 10 clusters there is neither interval nor standard error.
    ``recenter``: the draws are shifted so that their mean is the value. For numbers that repetitions bias (a Frechet
    distance grows with every repeated sample), whose plain interval may lie beside the value.
    Raises :class:`MetricUndefined` for a statistic that is NaN or infinite, for no samples, and for labels that do not
    fit.
    """
    import numpy as np

    if num_samples < 1:
        raise MetricUndefined("value: no samples; evaluate at least one sample")
    value = float(statistic(np.arange(num_samples)))
    if not math.isfinite(value):
        raise MetricUndefined(f"value: {value} on all {num_samples} samples; look at the samples one by one")
    layout = _layout(num_samples, clusters, strata)
    num_clusters = layout.cluster_sizes.size
    if num_clusters < MIN_DRAWN:
        return MetricValue(value=value, n=num_samples)
    order = np.argsort(layout.cluster_of_sample, kind="stable")
    members = np.split(order, np.cumsum(layout.cluster_sizes)[:-1])
    per_stratum = np.diff(layout.stratum_starts, append=num_clusters)
    draws = _draws(tuple(int(c) for c in per_stratum), num_bootstrap, seed)
    found = np.array([statistic(np.concatenate([members[c] for c in draw])) for draw in draws], dtype=np.float64)
    require_finite(found, "value of a bootstrap draw")
    shift = value - found.mean() if recenter else 0.0
    low, high = np.quantile(found + shift, _wider_tails(layout))
    return MetricValue(value=value, n=num_samples, se=float(found.std(ddof=1)), ci_lo=float(low), ci_hi=float(high))


def log_jackknife(
    sums: NDArray[np.float64], distance: Callable[[NDArray[np.float64]], NDArray[np.float64]], num_samples: int
) -> MetricValue | None:
    """A distance, 0 or more, that is no mean, with Student's interval of its logarithm by the jackknife over clusters.

    ``sums`` (C, k) are each cluster's; ``distance`` takes totals (..., k). The logarithm makes the distribution of a
    quotient of sums of squares nearly symmetric, and keeps both bounds above 0 (Miller, Ann. Math. Stat. 39, 1968,
    567-582). None below 5 clusters, and where the logarithm of one of the distances does not exist.
    """
    import numpy as np

    num = len(sums)
    if num < MIN_CLUSTERS:
        return None
    total = sums.sum(axis=0)
    with np.errstate(all="ignore"):
        value, without = distance(total), distance(total - sums)
        logs = np.log(np.append(without, value))
    if not np.isfinite(logs).all() or value < _ROUNDING * 10:
        return None
    pseudo = num * logs[-1] - (num - 1) * logs[:-1]
    se = float(pseudo.std(ddof=1)) / num**0.5
    with np.errstate(over="ignore"):
        low, high = (float(np.exp(bound)) for bound in t_bounds(float(logs[-1]), se, num - 1))
    if not math.isfinite(high):
        return None
    return MetricValue(value=float(value), n=num_samples, se=float(value) * se, ci_lo=low, ci_hi=high)


def paired_differences(
    values: Sequence[ArrayLike],
    pairs: Sequence[tuple[int, int]],
    clusters: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    num_bootstrap: int = 2000,
    seed: int = 0,
) -> list[MetricValue]:
    """Mean of the first less the second of each pair (i, j) of ``values``, arrays (n,) over the same samples.

    :func:`mean_interval` of the samples' differences, up to rounding: clusters' sums are made once an array, whatever
    the number of pairs. What two runs share cancels, and a difference that rounding alone can make is 0: repeated in
    each sample it would have no spread, and so be sure.
    Raises :class:`MetricUndefined` as :func:`mean_interval`, and for different numbers of samples.
    """
    import numpy as np

    arrays = [np.asarray(v, dtype=np.float64) for v in values]
    if not arrays:
        return []
    for array in arrays:
        require_finite(array, "value")
        require_same_samples(arrays[0], array)
    layout = _layout(arrays[0].size, clusters, strata)
    sums, means = [_sums(a, layout) for a in arrays], [np.array(a.mean()) for a in arrays]
    return [
        _mean_value(
            float(less_rounding(means[i], means[j])), less_rounding(sums[i], sums[j]), layout, num_bootstrap, seed
        )
        for i, j in pairs
    ]


def less_rounding(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """``a - b``, and 0 where rounding alone makes that."""
    import numpy as np

    return np.where(abs(a - b) <= _ROUNDING * (abs(a) + abs(b)), 0.0, a - b)


def same_labels(labels: Sequence[object]) -> NDArray[np.int64] | None:
    """The cluster of each sample by what it is known by; None where each is one of its own."""
    import numpy as np

    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return np.array([numbers[label] for label in labels]) if len(numbers) < len(labels) else None


def cluster_means(values: ArrayLike, clusters: ArrayLike | None = None) -> NDArray[np.float64]:
    """Mean of ``values`` (n,) in each cluster, (C,), in the order of the labels."""
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    _, cluster = _labels(clusters, array.size, "clusters")
    return np.bincount(cluster, weights=array) / np.bincount(cluster)


def degrees_of_freedom(num_samples: int, clusters: ArrayLike | None = None, strata: ArrayLike | None = None) -> int:
    """Clusters less strata: what a standard error of :func:`mean_interval` rests on."""
    return _degrees(_layout(num_samples, clusters, strata))


def wilson_interval(k: int, n: int) -> MetricValue:
    """Share ``k / n`` of independent trials with Wilson's 95% score interval (1927), sound also for few trials.

    Raises :class:`MetricUndefined` for no trials and for ``k`` outside 0..n.
    """
    if n < 1 or not 0 <= k <= n:
        raise MetricUndefined(f"share: {k} hits in {n} trials; there must be a trial, and no more hits than trials")
    share, z2 = k / n, Z_95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if k == 0 else centre - half
    high = 1.0 if k == n else centre + half
    return MetricValue(value=share, n=n, se=math.sqrt(share * (1 - share) / n), ci_lo=low, ci_hi=high)


@dataclass(frozen=True)
class _Layout:
    """Which sample belongs where; clusters are numbered so that those of a stratum follow each other."""

    cluster_of_sample: NDArray[np.int64]
    cluster_sizes: NDArray[np.int64]
    stratum_starts: NDArray[np.int64]
    """The first cluster of each stratum."""

    @property
    def stratum_sizes(self) -> NDArray[np.int64]:
        """Samples in each stratum."""
        import numpy as np

        return np.add.reduceat(self.cluster_sizes, self.stratum_starts)

    @property
    def clusters_per_stratum(self) -> NDArray[np.int64]:
        """Clusters in each stratum."""
        import numpy as np

        return np.diff(self.stratum_starts, append=self.cluster_sizes.size)


def _sums(array: NDArray[np.float64], layout: _Layout) -> NDArray[np.float64]:
    """Each cluster's sum, (C,)."""
    import numpy as np

    return np.asarray(np.bincount(layout.cluster_of_sample, weights=array), dtype=np.float64)


def _residuals(sums: NDArray[np.float64], layout: _Layout) -> NDArray[np.float64]:
    """Each cluster's sum less what its size and its stratum's mean make expect, (C,)."""
    import numpy as np

    ratios = np.add.reduceat(sums, layout.stratum_starts) / layout.stratum_sizes
    expected = layout.cluster_sizes * np.repeat(ratios, layout.clusters_per_stratum)
    return np.asarray(sums - expected, dtype=np.float64)


def _wider_tails(layout: _Layout) -> tuple[float, float]:
    """The bootstrap's percentiles: those that the normal distribution has where Student's t has 2.5 and 97.5%."""
    from scipy.special import ndtr, stdtrit

    low = float(ndtr(stdtrit(_degrees(layout), TAILS[0])))
    return low, 1 - low


def _degrees(layout: _Layout) -> int:
    return int(layout.cluster_sizes.size - layout.stratum_starts.size)


def _mean_value(mean: float, sums: NDArray[np.float64], layout: _Layout, num_draws: int, seed: int) -> MetricValue:
    import numpy as np

    n, num_clusters = int(layout.cluster_of_sample.size), layout.cluster_sizes.size
    if num_clusters < 2:
        return MetricValue(value=mean, n=n)
    per_stratum = layout.clusters_per_stratum
    residuals = _residuals(sums, layout)
    variance = np.add.reduceat(residuals**2, layout.stratum_starts) * per_stratum / (per_stratum - 1)
    se = math.sqrt(variance.sum()) / n
    if num_clusters < MIN_CLUSTERS:
        return MetricValue(value=mean, n=n, se=se)
    shape = sums - mean * layout.cluster_sizes
    spread = float(shape.std(ddof=1))
    scale = se * math.sqrt(num_clusters) / spread if spread > 0 else 0.0
    bounds = skewed_bounds(mean + scale * (shape - shape.mean()), _degrees(layout), num_draws, seed)
    low, high = (0.0 if abs(b) < 1e-12 * abs(mean) else b for b in bounds)  # an interval that ends at 0, rounded
    return MetricValue(value=mean, n=n, se=se, ci_lo=low, ci_hi=high)


def _layout(num_samples: int, clusters: ArrayLike | None, strata: ArrayLike | None) -> _Layout:
    import numpy as np

    first, cluster = _labels(clusters, num_samples, "clusters")
    if strata is None:
        stratum = np.zeros(first.size, dtype=np.int64)
    else:
        _, stratum_of_sample = _labels(strata, num_samples, "strata")
        stratum = stratum_of_sample[first]
        torn = np.flatnonzero(stratum[cluster] != stratum_of_sample)
        if torn.size:
            raise MetricUndefined(
                f"strata: the cluster of sample {torn[0]} lies in two strata; give all samples of a cluster one stratum"
            )
        stratum = _join_single(stratum)
    order = np.argsort(stratum, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(order.size)
    cluster = rank[cluster]
    starts = np.unique(stratum[order], return_index=True)[1]
    return _Layout(cluster, np.bincount(cluster), starts)


def _labels(labels: ArrayLike | None, num_samples: int, what: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first sample of each label, and the number of each sample's label."""
    import numpy as np

    array = np.arange(num_samples) if labels is None else np.asarray(labels)
    if array.shape != (num_samples,):
        raise MetricUndefined(
            f"{what}: labels of shape {array.shape} for {num_samples} samples; give each sample one label"
        )
    _, first, number = np.unique(array, return_index=True, return_inverse=True)
    return first, number


def _join_single(stratum: NDArray[np.int64]) -> NDArray[np.int64]:
    """Strata of the clusters, with those of a single cluster joined into one of two or more."""
    import numpy as np

    counts = np.bincount(stratum)
    single = counts[stratum] == 1
    if not single.any() or stratum.size == 1:
        return stratum
    target = int(np.flatnonzero(single)[0])
    joined = np.where(single, stratum[target], stratum)
    if single.sum() == 1:
        others = np.flatnonzero(counts > 1)
        joined[target] = others[np.argmin(counts[others])]
    return joined


@functools.lru_cache(maxsize=2)
def _draws(per_stratum: tuple[int, ...], num_bootstrap: int, seed: int) -> NDArray[np.int64]:
    """Cluster numbers (num_bootstrap, C - number of strata): of each stratum's c clusters, c - 1 with replacement."""
    import numpy as np

    generator = np.random.default_rng(seed)
    parts, start = [], 0
    for count in per_stratum:
        parts.append(start + generator.integers(0, count, size=(num_bootstrap, count - 1)))
        start += count
    draws = np.concatenate(parts, axis=1)
    draws.flags.writeable = False  # shared by all callers
    return draws
