"""How much and how many, in words: two digits that say something, of tiny models too."""

from __future__ import annotations

from collections.abc import Iterable

MIB, GIB = 2**20, 2**30


def mib(num_bytes: float) -> str:
    """Bytes as a cell under MiB: two digits behind the point, and of small modules two that say something."""
    value = num_bytes / MIB
    return f"{value:#.2g}" if 0 < abs(value) < 0.095 else f"{value:.2f}"


def in_mib(num_bytes: float) -> str:
    """Bytes in a sentence, in the unit of the tables beside it: ``1,015.1 MiB``, ``0.46 MiB``."""
    return f"{num_bytes / MIB:,.1f} MiB" if num_bytes >= 10 * MIB else f"{mib(num_bytes)} MiB"


def some_of(names: Iterable[str], num: int = 8) -> str:
    """``a, b and 3 more`` of many names."""
    every = list(names)
    return ", ".join(every[:num]) + (f" and {len(every) - num} more" if len(every) > num else "")


def parameters(num: int) -> str:
    """How many parameters a model has: ``596.0 M``, ``46.7 k``, ``512``."""
    for unit, name in ((10**6, "M"), (10**3, "k")):
        if num >= unit:
            return f"{num / unit:,.1f} {name}"
    return str(num)
