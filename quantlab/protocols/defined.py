"""One metric that has no value leaves the others alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import TypeVar

from quantlab.errors import MetricUndefined

T = TypeVar("T")


def defined(metrics: Mapping[str, Callable[[], T]], undefined: MutableMapping[str, str]) -> dict[str, T]:
    """The metrics that have a value; ``undefined`` gets the names of the others, and why."""
    found = {}
    for name, measure in metrics.items():
        try:
            found[name] = measure()
        except MetricUndefined as error:
            said = str(error)
            undefined[name] = said if said.startswith(name) else f"{name}: {said}"
    return found
