"""The intervals and verdicts against known answers, simulated; ``simulate.py`` makes the whole tables of the README."""

from __future__ import annotations

import pytest

from quantlab.report.verdicts import IN_FLOOR, WORSE
from tests.metrics.simulate import (
    LAYOUTS,
    ONE_NUMBER,
    README,
    SIZES,
    VALUES,
    coverage,
    false_difference,
    floor_verdicts,
    whole_coverage,
)
from tests.support.tiers import default_of

NUM = 800  # a share of 95 % then has a standard error of 0.8 %


@pytest.mark.parametrize("name", default_of(VALUES, "log-normal 1", "heavy tail"))
@pytest.mark.parametrize("label", [pytest.param(x, marks=pytest.mark.slow) if x != "10" else x for x in LAYOUTS])
def test_intervals_hold_what_they_say(label, name):
    least = {("5", "log-normal 1"): 0.89, ("5", "60 % zeros"): 0.86}.get((label, name), 0.92)
    most = 1.0 if name == "60 % zeros" else 0.99  # no continuous values: the interval errs on the wide side
    assert least < coverage(name, LAYOUTS[label], NUM) < most


@pytest.mark.parametrize("name", ONE_NUMBER)
@pytest.mark.parametrize("size", SIZES)
def test_intervals_of_outputs_with_one_number_hold_what_they_say(size, name):
    found = whole_coverage(name, size, NUM)
    is_heavy = name in ("few far larger", "few errors far larger")
    assert (0.78 if is_heavy else 0.90) < found["output_cosine"] < 0.98
    assert (0.78 if is_heavy else 0.82 if name.startswith("few") else 0.88) < found["output_rel_error"] < 0.98


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normal", "log-normal 0.5", "heavy tail"])
@pytest.mark.parametrize("label", LAYOUTS)
def test_no_difference_is_rarely_called_one(label, name):
    assert false_difference(name, LAYOUTS[label], NUM) < 0.075


@pytest.mark.parametrize("label", [pytest.param(x, marks=pytest.mark.slow) if x != "20" else x for x in LAYOUTS])
def test_what_is_at_the_floor_is_rarely_called_inside_or_worse(label):
    found = floor_verdicts("log-normal 0.5", LAYOUTS[label], NUM // 2, 1.0)
    assert found.get(IN_FLOOR, 0) < 0.05
    assert found.get(WORSE, 0) < 0.05


def test_what_is_far_from_the_floor_is_told():
    assert floor_verdicts("log-normal 0.5", LAYOUTS["60"], 100, 0.5).get(IN_FLOOR, 0) > 0.9
    assert floor_verdicts("log-normal 0.5", LAYOUTS["60"], 100, 2.0).get(WORSE, 0) > 0.9


def test_the_published_tables_are_of_these_cases():
    text = README.read_text(encoding="utf-8")
    assert all(text.count(f"\n| {label} |") == 2 + (label in map(str, SIZES)) for label in LAYOUTS)
    assert f"| {' | '.join(VALUES)} |" in text
    assert f"| rows | cosine: {' | cosine: '.join(ONE_NUMBER)} |" in text
