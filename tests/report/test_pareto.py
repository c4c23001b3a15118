"""The Pareto front: exactly what nothing dominates."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.report.pareto import pareto_front


@pytest.mark.parametrize(
    ("points", "higher_is_better", "front"),
    [
        ([(1.0, 4.0), (2.0, 3.0), (3.0, 3.5), (4.0, 1.0)], [False, False], [0, 1, 3]),
        ([(1.0, 4.0), (2.0, 5.0), (3.0, 3.5)], [False, True], [0, 1]),
        ([(1.0, 1.0), (1.0, 1.0), None], [False, False], [0, 1]),
        ([(float("inf"), 1.0), (float("inf"), 2.0)], [False, False], [0]),
        ([(1.0, 1.0), (1.0, 2.0)], [False, True], [1]),
        ([(3.0,), (1.0,), (2.0,)], [False], [1]),
        ([None], [False], []),
        ([], [False], []),
    ],
)
def test_the_front(points, higher_is_better, front):
    assert pareto_front(points, higher_is_better) == front


@settings(deadline=None, max_examples=200)
@given(data=st.data(), num=st.integers(1, 3))
def test_the_front_holds_exactly_the_points_that_nothing_dominates(data, num):
    one = st.tuples(*[st.integers(0, 4)] * num)
    points = data.draw(st.lists(st.one_of(st.none(), one), max_size=12))
    up = data.draw(st.lists(st.booleans(), min_size=num, max_size=num))
    costs = [None if p is None else [-x if u else x for x, u in zip(p, up, strict=True)] for p in points]

    def beats(other, mine):
        return other is not None and other != mine and all(a <= b for a, b in zip(other, mine, strict=True))

    expected = [i for i, c in enumerate(costs) if c is not None and not any(beats(o, c) for o in costs)]
    assert pareto_front(points, up) == expected
