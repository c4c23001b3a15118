"""How much, in words: two digits that say something, of tiny models too."""

from __future__ import annotations

import pytest

from quantlab.vocabulary.amounts import in_mib, parameters


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
