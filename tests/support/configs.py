"""Configs of each backend, taken from the tables: a new row brings its own."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from quantlab.backends.table import backends
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.native import QuantizationConfigMixin, Rule


def dtypes_on_cpu(backend: str) -> list[str]:
    """Dtypes that run on a CPU and take a weight of any shape, simplest first; then those that ask for a shape."""
    rows = {d: row for d, row in backends()[backend].offer.rows.items() if "cpu" in row.devices}

    def asks(dtype: str) -> tuple[bool, int]:
        row = rows[dtype]
        return row.is_prototype, row.in_features_multiple * row.out_features_multiple * row.numel_multiple

    return sorted(rows, key=asks)


def config_of(backend: str, names: Any = None, **more: Any) -> QuantizationConfigMixin:
    """The backend's plainest config, with these exclusions and settings: its class's defaults, where it has them."""
    given = {**({"modules_to_not_convert": names} if names else {}), **more}
    with suppress(ConfigError):
        return backends()[backend].module.Config(**given)
    return _config(backend, dtypes_on_cpu(backend)[0], **given)


def second_of(backend: str) -> QuantizationConfigMixin:
    """Another config of the backend than :func:`config_of` gives: of another dtype."""
    return _config(backend, dtypes_on_cpu(backend)[1])


def rule_of(backend: str, library: str) -> Rule:
    """How a library reads the exclusions of a backend."""
    return backends()[backend].module.Config.exclusion_rules[library]


def _config(backend: str, dtype: str, **given: Any) -> QuantizationConfigMixin:
    made = backends()[backend].module.Config.from_axes(QuantizationAxes(backend=backend, dtype=dtype))
    return type(made).from_dict(made.to_dict(), **given)


METHODS = tuple(backends())
ONE_OF_EACH = [config_of(backend) for backend in METHODS]
