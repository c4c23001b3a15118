"""What a metric can be: its row says it, and no interval goes beyond it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from quantlab.metrics import METRICS
from quantlab.metrics.output_error import (
    output_cosine,
    output_rel_error,
    whole_cosine_shares,
    whole_rel_error_shares,
)
from quantlab.metrics.statistics import mean_interval, within
from quantlab.report.reproduction import DIFFERENT, WITHIN, compare_runs
from quantlab.report.table import with_interval
from quantlab.stages.evaluate import summarize
from quantlab.vocabulary.numbers import ON_TOP
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


@pytest.mark.parametrize("shares", [whole_cosine_shares, whole_rel_error_shares])
def test_what_stands_for_a_row_of_one_number_has_the_whole_as_mean_and_its_spread_by_cluster(shares):
    rng = np.random.default_rng(0)
    ref = rng.lognormal(0, 1, 12)
    cand = ref + 0.1 * rng.normal(0, 1, 12) * ref
    metric = {whole_cosine_shares: output_cosine, whole_rel_error_shares: output_rel_error}[shares]

    def whole(keep):
        return float(metric(cand[None, keep].astype(np.float32), ref[None, keep].astype(np.float32))[0])

    clusters = np.repeat(np.arange(6), 2)
    for labels in (None, clusters):
        num = 12 if labels is None else 6
        values = shares(cand.astype(np.float32), ref.astype(np.float32), labels)
        assert values.mean() == pytest.approx(whole(slice(None)), rel=1e-6)
        left = [whole((np.arange(12) if labels is None else clusters) != c) for c in range(num)]
        expected = (num - 1) / num**0.5 * np.std(left, ddof=1)
        assert mean_interval(values, labels).se == pytest.approx(expected, rel=1e-3)
    alone = shares(np.float32([1.1, 0, 0]), np.float32([1.0, 0, 0]))
    assert np.isfinite(alone).all(), "without the first there is nothing to compare with"


def test_a_difference_of_two_runs_has_a_difference_s_range_wherever_it_is_read():
    """What the other components cost on top of one (``evaluation.attribute``) is below 0 dB of PSNR."""
    key = f"{ON_TOP}/unet/psnr_db"
    assert with_interval({key: -5.0, f"{key}/ci_lo": -6.0, f"{key}/ci_hi": -4.0}, key) == "-5.0 ±1.0"
    few = {key: -5.0, f"{key}/se": 1.0, f"{key}/n": 4}

    def checked(value):
        runs = [{"run_id": "r", "name": "a", "metrics": m, "tags": {}} for m in (few, {**few, key: value})]
        (check,) = compare_runs(*runs, ({}, {}), ({}, {})).checks
        return check

    found = checked(-6.0)
    assert (found.ci_lo, found.ci_hi) == (-5 - 1.96, -5 + 1.96)
    assert found.status == WITHIN
    assert checked(-8.0).status == DIFFERENT


def test_the_mean_of_many_rows_of_one_number_is_the_whole_s_to_the_last_digits():
    """Leaving one of many out changes the whole by its last digits, and what is made of that is multiplied by their number."""
    rng = np.random.default_rng(0)
    ref = rng.normal(0, 1, 100_000).astype(np.float32)
    cand = ref + 1e-7 * rng.normal(0, 1, ref.size).astype(np.float32)
    whole = float(output_cosine(cand[None], ref[None])[0])
    assert abs(whole_cosine_shares(cand, ref).mean() - whole) < 1e-14


def test_equal_outputs_have_the_cosine_1_without_a_digit_of_rounding():
    """Else the reference's own row has an interval, ``1 (1.000000..1)``."""
    made = np.random.default_rng(0).normal(size=(500, 37)).astype(np.float32)
    for size in (1e-30, 1.0, 1e30):
        outputs = made * np.float32(size)
        assert (output_cosine(outputs, outputs) == 1).all()
        assert (output_cosine(4 * outputs, outputs) == 1).all()
