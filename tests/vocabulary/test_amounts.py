"""How much, in words: two digits that say something, of tiny models too."""

from __future__ import annotations

import pytest

from quantlab.backends.unseen import never_ran
from quantlab.vocabulary.amounts import in_mib, parameters, some_of


@pytest.mark.parametrize(
    ("num", "told"),
    [(596_049_920, "596.0 M"), (1_000_000, "1.0 M"), (46_720, "46.7 k"), (1_000, "1.0 k"), (512, "512")],
)
def test_parameters(num, told):
    assert parameters(num) == told


@pytest.mark.parametrize(
    ("mib", "told"),
    [(1015.11, "1,015.1"), (10, "10.0"), (9.994, "9.99"), (0.46, "0.46"), (0.0123, "0.012"), (0, "0.00")],
)
def test_mib(mib, told):
    assert in_mib(mib * 2**20) == f"{told} MiB"


@pytest.mark.parametrize(("num", "told"), [(2, "0, 1"), (3, "0, 1, 2"), (5, "0, 1, 2 and 2 more"), (0, "")])
def test_of_many_names_it_is_said_how_many_are_left_out(num, told):
    assert some_of(map(str, range(num)), 3) == told


def test_a_message_of_many_layers_does_not_stop_at_eight():
    names = [str(i) for i in range(10)]
    assert str(never_ran(names)).startswith("calibration: 0, 1, 2, 3, 4, 5, 6, 7 and 2 more never ran")
