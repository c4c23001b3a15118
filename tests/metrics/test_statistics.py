"""Standard errors, intervals and differences against formulas, simulations and bad input."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, t

from quantlab.errors import MetricUndefined
from quantlab.metrics.frechet import frechet_distance
from quantlab.metrics.statistics import (
    bootstrap_interval,
    log_jackknife,
    mean_interval,
    paired_differences,
    require_finite,
    wilson_interval,
)


def clustered(rng: np.random.Generator, num_clusters: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples whose clusters differ by as much as the samples within one."""
    values = rng.normal(size=(num_clusters, 1)) + rng.normal(size=(num_clusters, size))
    return values.ravel(), np.repeat(np.arange(num_clusters), size)


class TestStandardError:
    def test_of_independent_samples(self):
        values = np.random.default_rng(0).normal(size=50)
        found = mean_interval(values)
        assert found.value == pytest.approx(values.mean())
        assert found.n == 50
        assert found.se == pytest.approx(values.std(ddof=1) / math.sqrt(50))

    def test_of_equal_clusters_is_that_of_their_means(self):
        values, clusters = clustered(np.random.default_rng(0), 30, 8)
        means = values.reshape(30, 8).mean(axis=1)
        found = mean_interval(values, clusters)
        assert found.n == 240
        assert found.se == pytest.approx(means.std(ddof=1) / math.sqrt(30))

    def test_clusters_count_as_what_they_are(self):
        values, clusters = clustered(np.random.default_rng(1), 30, 8)
        assert mean_interval(values, clusters).se > 1.5 * mean_interval(values).se

    def test_labels_may_come_in_any_order_and_type(self):
        values, clusters = clustered(np.random.default_rng(2), 12, 4)
        order = np.random.default_rng(3).permutation(values.size)
        names = np.array([f"prompt-{c:02d}" for c in clusters])
        one, other = mean_interval(values, clusters), mean_interval(values[order], names[order])
        assert other.value == pytest.approx(one.value)
        assert other.se == pytest.approx(one.se)
        assert other.ci_lo == pytest.approx(one.ci_lo)

    def test_of_unequal_clusters_is_that_of_a_ratio(self):
        """The spread of sum / size over many data sets, which a mean of cluster means would miss."""
        rng, means, errors = np.random.default_rng(4), [], []
        for _ in range(400):
            sizes = rng.integers(1, 12, size=40)
            clusters = np.repeat(np.arange(40), sizes)
            values = rng.normal(size=40)[clusters] + rng.normal(size=clusters.size)
            found = mean_interval(values, clusters, num_bootstrap=2)
            means.append(found.value)
            errors.append(found.se)
        assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)

    def test_of_strata_leaves_their_differences_out(self):
        rng, strata = np.random.default_rng(5), np.arange(60) % 3
        values = 10.0 * strata + rng.normal(size=60)
        within = [values[strata == h].std(ddof=1) for h in range(3)]
        found = mean_interval(values, strata=strata)
        assert found.se == pytest.approx(math.sqrt(sum((1 / 3) ** 2 * s**2 / 20 for s in within)))
        assert found.se < 0.2 * mean_interval(values).se
        assert found.ci_hi - found.ci_lo < 0.2 * (mean_interval(values).ci_hi - mean_interval(values).ci_lo)

    def test_of_clusters_in_unequal_strata(self):
        rng = np.random.default_rng(6)
        values, clusters = clustered(rng, 30, 4)
        strata = np.where(clusters < 10, "small", "large")
        means = values.reshape(30, 4).mean(axis=1)
        expected = math.sqrt((1 / 3) ** 2 * means[:10].var(ddof=1) / 10 + (2 / 3) ** 2 * means[10:].var(ddof=1) / 20)
        found = mean_interval(np.where(clusters < 10, 5.0, 1.0) * values, clusters, strata)
        assert mean_interval(values, clusters, strata).se == pytest.approx(expected)
        assert (found.ci_hi - found.ci_lo) / (2 * 1.96 * found.se) == pytest.approx(1.0, abs=0.1)

    def test_strata_of_one_cluster_are_taken_together(self):
        values = np.array([0.0, 1.0, 0.5, 0.7, 5.0, 9.0])
        joined = mean_interval(values, strata=[0, 0, 0, 0, 1, 1])
        assert mean_interval(values, strata=[0, 0, 0, 0, 1, 2]) == joined
        with_smallest = mean_interval(values, strata=[0, 0, 0, 1, 1, 1])
        assert mean_interval(values, strata=[0, 0, 0, 1, 1, 2]) == with_smallest

    def test_two_samples_a_stratum_are_enough_for_an_honest_interval(self):
        """Drawing both of two clusters would make the interval narrower by a factor of sqrt(2)."""
        values, strata = np.random.default_rng(7).normal(size=400), np.arange(400) // 2
        found = mean_interval(values, strata=strata)
        assert (found.ci_hi - found.ci_lo) / (2 * 1.96 * found.se) == pytest.approx(1.0, abs=0.06)


class TestInterval:
    @pytest.mark.parametrize("num_strata", [1, 10])
    @pytest.mark.parametrize("size", [1, 5])
    def test_covers_the_truth_as_often_as_it_says(self, size, num_strata):
        rng, hits = np.random.default_rng(8), 0
        for _ in range(200):
            values, clusters = clustered(rng, 40, size)
            strata = clusters % num_strata
            found = mean_interval(3.0 * strata + values, clusters, strata, num_bootstrap=500)
            hits += found.ci_lo <= 1.5 * (num_strata - 1) <= found.ci_hi
        assert 0.90 <= hits / 200 <= 0.99

    def test_covers_less_often_for_skewed_values_but_not_much(self):
        rng, hits = np.random.default_rng(8), 0
        for _ in range(200):
            found = mean_interval(np.exp(rng.normal(size=100)), num_bootstrap=500)
            hits += found.ci_lo <= math.exp(0.5) <= found.ci_hi
        assert 0.85 <= hits / 200 <= 0.97

    def test_ignoring_clusters_would_cover_too_rarely(self):
        rng, hits = np.random.default_rng(9), 0
        for _ in range(200):
            values, _ = clustered(rng, 40, 5)
            found = mean_interval(values, num_bootstrap=500)
            hits += found.ci_lo <= 0.0 <= found.ci_hi
        assert hits / 200 < 0.85

    @pytest.mark.parametrize(
        ("num_clusters", "has_se", "has_ci"),
        [(1, False, False), (2, True, False), (4, True, False), (5, True, True), (10, True, True)],
    )
    def test_few_clusters_give_no_interval(self, num_clusters, has_se, has_ci):
        values, clusters = clustered(np.random.default_rng(10), num_clusters, 20)
        found = mean_interval(values, clusters)
        assert (found.se is not None, found.ci_lo is not None, found.ci_hi is not None) == (has_se, has_ci, has_ci)
        with_strata = mean_interval(values, clusters, strata=clusters % 2)
        assert (with_strata.se is not None, with_strata.ci_lo is not None) == (has_se, has_ci)
        other = bootstrap_interval(lambda i: float(np.median(values[i])), values.size, clusters, num_bootstrap=20)
        assert (other.se is not None, other.ci_lo is not None) == (num_clusters >= 10,) * 2

    def test_equal_values_have_no_width(self):
        found = mean_interval(np.full(30, 0.1), strata=np.arange(30) % 4)
        assert found.value == pytest.approx(0.1)
        assert found.se == pytest.approx(0.0, abs=1e-15)
        assert found.ci_hi - found.ci_lo == pytest.approx(0.0, abs=1e-15)

    def test_seeds(self):
        values = np.random.default_rng(11).normal(size=30)
        assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
        assert mean_interval(values, seed=1).ci_lo != mean_interval(values, seed=2).ci_lo

    def test_is_quick(self):
        values = np.random.default_rng(12).normal(size=(20, 200))
        mean_interval(values[0], seed=99)
        start = time.process_time()
        for row in values:
            mean_interval(row, seed=99)
        assert time.process_time() - start < 20 * 0.03


class TestBootstrap:
    def test_of_a_mean_is_the_interval_of_the_mean(self):
        values, clusters = clustered(np.random.default_rng(13), 25, 3)
        strata = clusters % 4
        mean = mean_interval(values, clusters, strata)
        found = bootstrap_interval(lambda i: float(values[i].mean()), values.size, clusters, strata)
        assert found.value == pytest.approx(mean.value)
        assert found.se == pytest.approx(mean.se, rel=0.1)
        assert found.ci_hi - found.ci_lo == pytest.approx(mean.ci_hi - mean.ci_lo, rel=0.1)

    def test_of_unequal_clusters_draws_whole_clusters(self):
        clusters = np.repeat(np.arange(12), np.arange(1, 13))
        seen = []

        def statistic(index: np.ndarray) -> float:
            counts = np.bincount(index, minlength=clusters.size)
            seen.append(all(len(set(counts[clusters == c])) == 1 for c in range(12)))
            return float(clusters[index].mean())

        bootstrap_interval(statistic, clusters.size, clusters, num_bootstrap=50)
        assert len(seen) == 51
        assert all(seen)

    def test_covers_a_quantile(self):
        rng, hits = np.random.default_rng(14), 0
        for _ in range(100):
            values = rng.normal(size=100)
            found = bootstrap_interval(lambda i, v=values: float(np.quantile(v[i], 0.9)), 100, num_bootstrap=200)
            hits += found.ci_lo <= 1.2816 <= found.ci_hi
        assert hits >= 85

    def test_a_biased_number_is_recentred(self):
        rng = np.random.default_rng(15)
        a, b = rng.normal(size=(40, 10)), rng.normal(size=(40, 10))
        plain, shifted = (
            bootstrap_interval(lambda i: frechet_distance(a[i], b[i]), 40, num_bootstrap=100, recenter=recenter)
            for recenter in (False, True)
        )
        assert plain.ci_lo > plain.value
        assert shifted.ci_lo < shifted.value < shifted.ci_hi
        assert shifted.se == plain.se

    def test_refusals(self):
        with pytest.raises(MetricUndefined, match=r"^value: nan on all 20 samples"):
            bootstrap_interval(lambda i: math.nan, 20)
        with pytest.raises(MetricUndefined, match=r"^value of a bootstrap draw: .*nan"):
            bootstrap_interval(lambda i: 1.0 if i[0] == 0 and i[-1] == 19 and i.size == 20 else math.nan, 20)
        with pytest.raises(MetricUndefined, match=r"^value: no samples"):
            bootstrap_interval(lambda i: 1.0, 0)


class TestDifference:
    def test_pairing_removes_what_both_share(self):
        rng = np.random.default_rng(16)
        shared = 10 * rng.normal(size=100)
        a, b = shared + 0.5 + 0.1 * rng.normal(size=100), shared
        found, reverse = paired_differences([a, b], [(0, 1), (1, 0)])
        assert found.value == pytest.approx(0.5, abs=0.05)
        assert found.ci_lo > 0
        assert found.se < 0.05 * mean_interval(a).se
        assert reverse.value == pytest.approx(-found.value)

    def test_takes_clusters_and_strata(self):
        values, clusters = clustered(np.random.default_rng(17), 20, 3)
        (found,) = paired_differences([values, np.zeros_like(values)], [(0, 1)], clusters, clusters % 2)
        assert found == mean_interval(values, clusters, clusters % 2)

    def test_refusals(self):
        with pytest.raises(MetricUndefined, match=r"^difference: 3 samples against 2; .*same evaluation inputs$"):
            paired_differences([[1, 2, 3], [1, 2]], [(0, 1)])
        with pytest.raises(MetricUndefined, match=r"^value: sample 1 is inf"):
            paired_differences([[1, 2], [1, math.inf]], [(0, 1)])


class TestWilson:
    @pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (7, 20), (1, 1), (199, 400)])
    def test_agrees_with_scipy(self, k, n):
        found, oracle = wilson_interval(k, n), binomtest(k, n).proportion_ci(method="wilson")
        assert found.value == k / n
        assert found.n == n
        assert (found.ci_lo, found.ci_hi) == pytest.approx((oracle.low, oracle.high), abs=1e-12)

    @pytest.mark.parametrize(("k", "n"), [(0, 0), (3, 2), (-1, 2)])
    def test_refusals(self, k, n):
        with pytest.raises(MetricUndefined, match=rf"^share: {k} hits in {n} trials"):
            wilson_interval(k, n)


class TestRefusals:
    def test_a_sample_without_a_number_is_named(self):
        values = [1.0, math.nan, math.inf]
        with pytest.raises(MetricUndefined, match=r"^value: sample 1 is nan \(2 of 3 are not finite\)"):
            mean_interval(values)
        with pytest.raises(MetricUndefined, match=r"^psnr_db: sample 'cat-1' \(row 1\) is nan .*that sample out$"):
            require_finite(values, "psnr_db", ("cat-0", "cat-1", "cat-2"))

    def test_no_samples(self):
        with pytest.raises(MetricUndefined, match=r"^value: no samples.*at least one sample$"):
            mean_interval([])

    def test_labels_that_do_not_fit(self):
        with pytest.raises(MetricUndefined, match=r"^clusters: labels of shape \(2,\) for 3 samples"):
            mean_interval([1, 2, 3], clusters=[0, 1])
        with pytest.raises(MetricUndefined, match=r"^strata: the cluster of sample 1 lies in two strata"):
            mean_interval([1, 2, 3], clusters=[0, 0, 1], strata=["a", "b", "b"])


def test_many_pairs_at_once_are_the_pairs_one_by_one():
    values = np.random.default_rng(0).lognormal(size=(4, 60))
    labels = {"clusters": np.repeat(np.arange(30), 2), "strata": np.repeat(np.arange(30), 2) % 3}
    pairs = [(0, 1), (3, 2), (1, 3)]
    for (i, j), found in zip(pairs, paired_differences(values, pairs, **labels), strict=True):
        alone = mean_interval(values[i] - values[j], **labels)
        for part in ("value", "se", "ci_lo", "ci_hi"):
            assert getattr(found, part) == pytest.approx(getattr(alone, part), rel=1e-9), part


def test_an_error_has_no_bound_below_zero():
    few = mean_interval([0.001, 0.002, 0.1, 0.001, 0.003, 0.002])
    assert few.ci_lo == 0
    assert few.value - 2 * few.se < 0


@pytest.mark.parametrize("turn", [1, -1])
@pytest.mark.parametrize("num", [16, 32, 64, 128, 200])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9])
def test_where_many_values_are_at_their_end_the_interval_holds_its_own_mean(share, num, turn):
    """Identical images (100 dB), exact zeros of an error: 91.5 dB had an interval from 0 to 56."""
    rng = np.random.default_rng(0)
    for spread in (0.01, 0.3, 2.0):
        there = rng.permutation(num) < share * num
        values = 50 + turn * np.where(there, 0.0, rng.lognormal(0, spread, num))
        found = mean_interval(values)
        assert found.ci_lo < found.value < found.ci_hi
        assert num < 64 or found.ci_hi - found.ci_lo < 20 * found.se


@given(st.lists(st.floats(-1e6, 1e6), min_size=5, max_size=60))
def test_any_interval_holds_its_own_mean(values):
    found = mean_interval(values, num_bootstrap=200)
    slack = 1e-9 * max(map(abs, values))
    assert found.ci_lo - slack <= found.value <= found.ci_hi + slack


def test_an_interval_of_very_small_values():
    """Squares and cubes of them are 0 in float64: probabilities that a loud model gives to the true tokens."""
    values = 1e-150 * np.random.default_rng(0).lognormal(size=20)
    found = mean_interval(values)
    assert found.ci_lo < found.value < found.ci_hi


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_what_rounding_makes_is_no_difference(scale):
    one = np.full(20, 0.3) * scale
    other = (np.full(20, 0.1) + 0.2) * scale  # 0.30000000000000004
    assert not np.array_equal(one, other)
    noisy = np.random.default_rng(0).random(20) * scale
    found = paired_differences(
        [one, other, noisy, np.nextafter(noisy, 2 * scale), noisy * (1 + 1e-9)], [(0, 1), (2, 3), (4, 2)]
    )
    for difference in found[:2]:
        assert (difference.value, difference.se, difference.ci_lo, difference.ci_hi) == (0, 0, 0, 0)
    assert found[2].ci_lo is not None
    assert 0 < found[2].ci_lo < found[2].value


def test_a_sum_beyond_float64_is_no_number():
    with pytest.raises(MetricUndefined, match="^value: the sum of 10 samples is beyond float64"):
        mean_interval([1e308] * 10)


def test_a_distance_has_its_interval_by_the_logarithm_of_what_is_left_without_each_cluster():
    sums = np.array([[4.0, 1.0], [1.0, 2.0], [9.0, 1.5], [2.0, 1.0], [5.0, 3.0]])

    def distance(totals):
        return np.sqrt(totals[..., 0] / totals[..., 1])

    found = log_jackknife(sums, distance, 10)
    left = [np.log(np.sqrt(np.delete(sums, i, 0)[:, 0].sum() / np.delete(sums, i, 0)[:, 1].sum())) for i in range(5)]
    middle = np.log(np.sqrt(21 / 8.5))
    half = t.ppf(0.975, 4) * np.std([5 * middle - 4 * x for x in left], ddof=1) / 5**0.5
    assert found.value == pytest.approx(np.exp(middle))
    assert (found.ci_lo, found.ci_hi) == pytest.approx((np.exp(middle - half), np.exp(middle + half)))
    assert log_jackknife(sums[:4], distance, 8) is None, "too few clusters"
    alone = np.array([[4.0, 1.0], *[[0.0, 1.0]] * 5])
    assert log_jackknife(alone, distance, 6) is None, "without the first there is no error"
