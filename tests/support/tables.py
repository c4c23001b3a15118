"""The tables as tests walk them, and what the package asks them on the way to a scheme."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from quantlab.backends.scheme import Scheme, scheme_of
from quantlab.backends.table import backends, held_packages, offers
from quantlab.modules import memory
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.native import QuantizationConfigMixin
from quantlab.vocabulary.reports import MemoryReport

BACKENDS: dict[str, Any] = {name: row.module for name, row in backends().items()}
"""backend -> its module."""
CAPABILITIES = {name: offer.rows for name, offer in offers().items()}
"""backend -> dtype -> row; ``none`` too."""


def the_scheme(axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> Scheme:
    """The scheme of axes that are not the reference's."""
    scheme = scheme_of(axes, settings)
    assert scheme is not None
    return scheme


def native_config(axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> QuantizationConfigMixin | None:
    """What the library is told; None for the reference."""
    scheme = scheme_of(axes, settings)
    return None if scheme is None else scheme.native


def storages(obj: Any) -> memory.Storages:
    """Every storage, also those that a backend's plain objects hold."""
    return memory.storages(obj, held_packages())


def layer_memory(layer: Any) -> tuple[int, int]:
    """Bytes of a layer's codes and of its scales."""
    return memory.layer_memory(layer, held_packages())


def component_memory(module: Any, names: Iterable[str], original: Any) -> MemoryReport:
    """The ledger of a module."""
    return memory.component_memory(module, names, original, held_packages())
