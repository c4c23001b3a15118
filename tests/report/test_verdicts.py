"""What is said of one difference: floors by their bounds and on the scale of errors, ranks, and the front."""

from __future__ import annotations

import numpy as np
import pytest

from quantlab.metrics import METRICS
from quantlab.metrics.statistics import mean_interval, paired_differences
from quantlab.report.verdicts import (
    RULES,
    Floor,
    Verdict,
    distinguishable_front,
    error_metric,
    is_inside,
    largest_floor,
    verdict,
)
from quantlab.vocabulary.reports import MetricValue


def value(middle, low=None, high=None):
    return MetricValue(value=middle, n=50, se=0.5, ci_lo=low, ci_hi=high)


def floor_of(middle, low=None, high=None):
    return None if middle is None else Floor(name="floor_bf16", value=middle, cost=value(middle, low, high))


@pytest.mark.parametrize(
    ("difference", "bounds", "p", "floor", "margin", "expected"),
    [
        (2.0, (1.0, 3.0), 0.001, None, 0.0, "worse"),
        (-2.0, (-3.0, -1.0), 0.001, None, 0.0, "better"),
        (2.0, (1.0, 3.0), 0.001, 3.0, 0.0, "inside the floor"),
        (2.0, (1.0, 3.0), 0.001, 2.0, 0.0, "near the floor"),
        (2.0, (1.0, 3.0), 0.001, 0.5, 0.0, "worse"),
        (1.0, (0.5, 9.0), 0.001, 1.0, 0.0, "near the floor"),
        (-1.0, (-9.0, -0.5), 0.001, 1.5, 0.0, "near the floor"),
        (2.0, (1.0, 3.0), 0.001, 0.5, 3.5, "inside the margin"),
        (2.0, (1.0, 3.0), 0.001, 0.5, 2.5, "worse"),
        (2.0, (-1.0, 5.0), 0.5, 5.0, 0.0, "inside the floor"),
        (2.0, (-1.0, 5.0), 0.5, 4.0, 0.0, "not distinguishable"),
        (2.0, (1.0, 3.0), 0.06, 2.0, 0.0, "not distinguishable"),
        (2.0, (-0.1, 4.0), 0.01, None, 0.0, "not distinguishable"),
        (2.0, (0.0, 4.0), 0.01, None, 0.0, "not distinguishable"),
        (0.0, (0.0, 0.0), 1.0, None, 0.0, "not distinguishable"),
        (0.0, (0.0, 0.0), 1.0, None, 0.1, "inside the margin"),
        (2.0, (None, None), 0.01, 5.0, 0.0, "too few samples"),
        (2.0, (1.0, 3.0), None, 5.0, 0.0, "too few samples"),
    ],
)
def test_a_verdict(difference, bounds, p, floor, margin, expected):
    found = Verdict(a="a", b="b", difference=value(difference, *bounds), test="t", p_holm=p)
    said = verdict(found, "latent_rel_mse", floor_of(floor), margin)
    assert said == expected
    assert said in RULES


def test_an_uncertain_floor_takes_in_less_than_a_certain_one():
    difference = value(1.0, 0.8, 1.2)
    assert is_inside(difference, value(1.4)) is True
    assert is_inside(difference, value(1.4, 0.9, 1.9)) is None
    assert is_inside(difference, value(0.5)) is False
    assert is_inside(difference, value(0.5, 0.1, 1.3)) is None


def test_decibels_are_judged_by_the_squared_error_behind_them():
    """On a scale that ends at 100 dB the floor of 55.6 would be 44 dB wide, and 16 dB of loss inside it."""
    rng = np.random.default_rng(0)
    floor, small, large = (10 ** -(db / 10) * rng.lognormal(0, 0.2, 200) for db in (55.6, 60, 43.5))
    db = [-10 * np.log10(x) for x in (large, small)]
    (difference,), (in_error,) = paired_differences(db, [(0, 1)]), paired_differences([large, small], [(0, 1)])
    of_floor = mean_interval(floor)
    metrics = {
        "quality/floor_bf16/psnr_db": 55.6,
        "quality/floor_bf16/image_mse": of_floor.value,
        "quality/floor_bf16/image_mse/ci_lo": of_floor.ci_lo,
        "quality/floor_bf16/image_mse/ci_hi": of_floor.ci_hi,
    }
    known = largest_floor(metrics, "psnr_db")
    assert known.value == 55.6
    assert difference.value < -16
    found = Verdict(a="large", b="small", difference=difference, in_error=in_error, test="t", p_holm=1e-9)
    assert verdict(found, "psnr_db", known, 0.0) == "worse"
    near = Verdict(
        a="small", b="floor", difference=value(4.4, 4.2, 4.6), in_error=mean_interval(small), test="t", p_holm=1e-9
    )
    assert verdict(near, "psnr_db", known, 0.0) == "inside the floor"


def test_every_ratio_in_decibels_names_a_scale_of_errors():
    """Not a distance between levels, which is an error itself: the lower the better, and 0 at best."""
    for metric in METRICS.values():
        if metric.unit == "dB" and not metric.is_curve and metric.higher_is_better:
            assert error_metric(metric.name) != metric.name
        assert (
            METRICS[error_metric(metric.name)].higher_is_better is False
            or METRICS[error_metric(metric.name)].unit != "dB"
            or metric.is_curve
        )


def test_the_largest_floor_counts_and_is_named():
    metrics = {
        "quality/floor_batch/kld_mean": 2e-4,
        "quality/floor_attention/kld_mean": 0.0,
        "quality/floor_fp32/kld_mean": 9e-4,
        "quality/floor_fp32/kld_mean/ci_lo": 8e-4,
        "quality/floor_fp32/kld_mean/ci_hi": 11e-4,
    }
    found = largest_floor(metrics, "kld_mean")
    assert (found.name, found.value, found.cost.ci_lo) == ("floor_fp32", 9e-4, 8e-4)


@pytest.mark.parametrize("metrics", [{}, {"quality/floor_bf16/kld_mean": 0.0, "quality/floor_batch/kld_mean": 0.0}])
def test_floors_that_are_all_zero_are_no_floor(metrics):
    assert largest_floor(metrics, "kld_mean") is None


def test_a_floor_is_a_distance_from_the_reference_whatever_its_side():
    cosine = {"quality/floor_bf16/output_cosine": 0.9, **bounds("quality/floor_bf16/output_cosine", 0.85, 0.95)}
    found = largest_floor(cosine, "output_cosine").cost
    assert (found.value, found.ci_lo, found.ci_hi) == pytest.approx((0.1, 0.05, 0.15))
    ratio = {"quality/floor_bf16/ln_ppl_ratio": -0.1, **bounds("quality/floor_bf16/ln_ppl_ratio", -0.3, 0.1)}
    found = largest_floor(ratio, "ln_ppl_ratio").cost
    assert (found.value, found.ci_lo, found.ci_hi) == pytest.approx((0.1, 0.0, 0.3))
    accuracy = {"quality/floor_bf16/class_accuracy": 0.8}
    assert largest_floor(accuracy, "class_accuracy") is None
    found = largest_floor(accuracy, "class_accuracy", {"quality/class_accuracy": 0.85})
    assert found.cost.value == pytest.approx(0.05)


def bounds(name, low, high):
    return {f"{name}/ci_lo": low, f"{name}/ci_hi": high}


@pytest.mark.parametrize(
    ("share_worse", "p_rank", "expected"),
    [(0.62, 0.001, "worse by rank"), (0.3, 0.001, "better by rank"), (0.62, 0.2, "not distinguishable")],
)
def test_the_ranks_speak_where_the_mean_cannot_tell(share_worse, p_rank, expected):
    found = Verdict(
        a="a", b="b", difference=value(-0.1, -0.3, 0.1), test="t", p_holm=0.3, p_rank=p_rank, share_worse=share_worse
    )
    assert verdict(found, "kld_mean", None, 0.0) == expected


def pair(a, b, text):
    return Verdict(a=a, b=b, difference=value(0.0), test="t", text=text)


def test_the_front_keeps_what_is_surely_better_than_all_that_is_smaller():
    pairs = [pair("s", "m", "not distinguishable"), pair("l", "m", "better"), pair("s", "l", "worse")]
    assert distinguishable_front(["s", "m", "l"], pairs) == ["s", "l"]
    assert distinguishable_front(["s", "m"], [pair("s", "m", "inside the floor")]) == ["s"]
    assert distinguishable_front(["s", "m"], [pair("m", "s", "near the floor")]) == ["s"]
    assert distinguishable_front(["s", "m"], [pair("m", "s", "too few samples")]) == ["s", "m"]
    assert distinguishable_front(["s", "m"], []) == ["s", "m"]
