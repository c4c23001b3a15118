"""What a metric can be: its row says it, and no interval goes beyond it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantlab.metrics import METRICS
from quantlab.metrics.statistics import mean_interval, within
from quantlab.stages.evaluate import summarize
from quantlab.vocabulary.reports import Measurements, MetricValue
from quantlab.vocabulary.schema import EvaluationConfig

SIGNED = {"audio_snr_db", "step_sqnr_db", "kld_min", "ln_ppl_ratio"}
"""Metrics that may be below any number (decibels of a loud error, a logarithm, a check of the arithmetic)."""


@pytest.mark.parametrize("name", METRICS)
def test_each_row_knows_its_range(name):
    row = METRICS[name]
    assert math.isfinite(row.at_least) == (name not in SIGNED)
    assert row.at_least < row.at_most
    assert row.of_reference is None or row.at_least <= row.of_reference <= row.at_most
    if row.unit in ("fraction", "probability"):
        assert math.isfinite(row.at_most)


def drawn(name, seed):
    """Few values against an end of the range, of which one is far off it: the interval's far bound is far away."""
    row, rng = METRICS[name], np.random.default_rng(seed)
    ends = [end for end in row.bounds if math.isfinite(end)]
    end = ends[seed % len(ends)] if ends else 0.0
    inward = -1.0 if end == row.at_most else 1.0
    values = end + inward * np.abs(rng.normal(0, 0.01, 8))
    values[0] = end + inward * 0.9
    return values


@pytest.mark.parametrize("name", METRICS)
def test_no_interval_goes_beyond_what_can_be_and_each_holds_its_value(name):
    low, high = METRICS[name].bounds
    for seed in range(6):
        values = drawn(name, seed)
        one = Measurements(samples={name: values}, estimates={}, sample_ids=[str(i) for i in range(8)])
        found = summarize(one, EvaluationConfig())[name]
        assert low <= found.ci_lo <= found.value <= found.ci_hi <= high
        as_estimate = Measurements(samples={}, estimates={name: mean_interval(values)}, sample_ids=[])
        assert summarize(as_estimate, EvaluationConfig())[name] == found, "an estimate as a mean"


def test_a_value_that_rounding_put_outside_is_in_its_own_interval():
    found = within(MetricValue(value=1.0 + 1e-9, n=9, ci_lo=0.9, ci_hi=1.1), (-1.0, 1.0))
    assert (found.ci_lo, found.ci_hi) == (0.9, 1.0 + 1e-9)


def test_the_range_of_a_difference():
    assert METRICS["same_top1"].bounds_of_difference == (-1, 1)
    assert METRICS["psnr_db"].bounds_of_difference == (-100, 100)
    assert METRICS["ssim"].bounds_of_difference == (-2, 2)
    assert METRICS["kld_mean"].bounds_of_difference == (-math.inf, math.inf)
