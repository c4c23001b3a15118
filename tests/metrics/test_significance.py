"""Tests on paired differences against their definitions, and what the rank test sees that the mean hides."""

from __future__ import annotations

import numpy as np
import pytest

from quantlab.errors import MetricUndefined
from quantlab.metrics.significance import holm, is_skewed, mcnemar_exact, rank_test, t_test
from quantlab.metrics.statistics import cluster_means, degrees_of_freedom, mean_interval
from quantlab.vocabulary.reports import MetricValue


def test_holm_adjusts_as_worked_out_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize(
    ("only_a", "only_b", "both"), [(0, 0, 5), (6, 0, 3), (9, 2, 0), (4, 5, 1), (1, 0, 0), (30, 50, 9)]
)
def test_mcnemar_is_the_exact_binomial_test(only_a, only_b, both):
    from scipy.stats import binomtest

    a = np.repeat([1, 0, 1], [only_a, only_b, both])
    b = np.repeat([0, 1, 1], [only_a, only_b, both])
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(a, b) == pytest.approx(expected, rel=1e-12)
    assert mcnemar_exact(b, a) == mcnemar_exact(a, b)


def test_mcnemar_refuses_other_values():
    with pytest.raises(MetricUndefined, match="0 or 1"):
        mcnemar_exact([0.5, 1], [0, 1])


def test_t_test_is_that_on_the_clusters_mean_differences():
    from scipy.stats import ttest_rel

    clusters = np.repeat(np.arange(15), 4)
    a, b = np.random.default_rng(0).normal(size=(2, 60)) + np.array([[0.2], [0.0]])
    p = t_test(mean_interval(a - b, clusters), degrees_of_freedom(60, clusters))
    means = [x.reshape(15, 4).mean(axis=1) for x in (a, b)]
    assert p == pytest.approx(ttest_rel(*means).pvalue, rel=1e-9)
    assert t_test(MetricValue(value=0.1, n=1), 0) is None
    assert t_test(MetricValue(value=0.0, n=5, se=0.0), 4) == 1.0


def test_the_rank_test_is_wilcoxon_s_signed_rank_test():
    from scipy.stats import wilcoxon

    differences = np.random.default_rng(3).normal(0.3, 1, size=25)
    assert rank_test(differences) == wilcoxon(differences).pvalue
    assert rank_test(np.zeros(20)) == 1.0
    assert rank_test(np.ones(7)) is None
    assert rank_test(np.ones(8)) < 0.01


def test_many_small_losses_behind_a_few_large_gains_are_found_by_ranks():
    rng = np.random.default_rng(5)
    differences = np.where(np.arange(100) % 8 == 0, -7.0, 1.0) * rng.uniform(0.5, 1.5, 100)
    assert t_test(mean_interval(differences), 99) > 0.2
    assert is_skewed(differences)
    assert rank_test(differences) < 0.001


@pytest.mark.parametrize("values", [np.zeros(30), np.full(30, 0.1), np.arange(7.0), np.linspace(-1, 1, 30)])
def test_what_does_not_lean_is_not_skewed(values):
    assert not is_skewed(values)


def test_cluster_means_are_in_the_order_of_the_labels():
    assert cluster_means([1, 2, 3, 10], ["b", "a", "b", "a"]).tolist() == [6, 2]
    assert cluster_means([3, 1, 2]).tolist() == [3, 1, 2]
