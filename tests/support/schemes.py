"""Every scheme of the capability table that a CPU runs, as native configs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import BACKENDS, CAPABILITIES


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One native config, and what it is for."""

    backend: str
    dtype: str
    activation_dtype: str
    algorithm: str
    native: Any
    compute_dtype: str

    def __str__(self) -> str:
        static = "static" if getattr(self.native, "activation_scales", "") == "static" else ""
        return "-".join(filter(None, (self.backend, self.dtype, self.activation_dtype, static, self.algorithm)))


def schemes_on_cpu() -> Iterator[Scheme]:
    """By backend, dtype, activation dtype, algorithm and, where the backend has the choice, kind of scales."""
    for backend in BACKENDS:
        for dtype, row in CAPABILITIES[backend].items():
            if "cpu" not in row.devices:
                continue
            for activation in row.activation_dtypes:
                for algorithm in (a for a in row.algorithms if a not in row.cuda_algorithms):
                    yield from _of(backend, dtype, activation, algorithm, row.compute_dtypes[0])


def _of(backend: str, dtype: str, activation: str, algorithm: str, compute: str) -> Iterator[Scheme]:
    axes = QuantizationAxes(backend=backend, dtype=dtype, activation_dtype=activation, algorithm=algorithm)
    found: list[Any] = []
    for settings in ({}, {"activation_scales": "static"}):
        if backend == "torchao" and activation == "float8_e4m3" and not settings:
            continue  # its kernel is CUDA's, which the table has no column for
        try:
            native = BACKENDS[backend].Config.from_axes(axes, settings)
        except (ConfigError, TypeError):  # not with these activations, or no such setting
            continue
        if native not in found:
            found.append(native)
            yield Scheme(
                backend=backend,
                dtype=dtype,
                activation_dtype=activation,
                algorithm=algorithm,
                native=native,
                compute_dtype=compute,
            )
