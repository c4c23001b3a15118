"""Which cases of a cross of tables the default tier runs, and which the slow one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest


def covering(cases: Iterable[Any], columns: Callable[[Any], Sequence[Any]] = tuple) -> list[Any]:
    """Cases as parameters: as few as hold each value of each column stay in the default tier; the others are slow.

    ``columns`` of a case; a value is told from another by its text.
    """
    every = list(cases)
    held = [set(enumerate(map(str, columns(case)))) for case in every]
    missing, kept = set().union(*held), set()
    while missing:
        best = max(range(len(every)), key=lambda n: len(held[n] & missing))
        kept.add(best)
        missing -= held[best]
    return [case if n in kept else _slow(case) for n, case in enumerate(every)]


def _slow(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)


def few_or_many(values: Iterable[Any], few: int, many: int) -> list[Any]:
    """(value, number of random examples): few in the default tier, many in the slow one."""
    every = list(values)
    return [(value, few) for value in every] + [pytest.param(value, many, marks=pytest.mark.slow) for value in every]


def default_of(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Values as parameters, of which the default tier has those that are named; the others are slow."""
    return [value if value in kept else _slow(value) for value in values]
