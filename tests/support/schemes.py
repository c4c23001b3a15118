"""Every scheme of the capability table that a device runs, as native configs."""

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
    return schemes_on("cpu")


def schemes_on(device: str) -> Iterator[Scheme]:
    """Every dtype with every algorithm, by the first activation dtype that it goes with; and with every activation
    dtype, by the first algorithm; both with each kind of scales that the backend has."""
    for backend in BACKENDS:
        for dtype, row in CAPABILITIES[backend].items():
            if device not in row.devices:
                continue
            algorithms = [a for a in row.algorithms if device == "cuda" or a not in row.cuda_algorithms]
            pairs = [(activation, algorithms[0]) for activation in row.activation_dtypes]
            for algorithm in algorithms[1:]:
                pairs.append(
                    next(
                        (a, algorithm) for a in row.activation_dtypes if any(_of(device, backend, dtype, a, algorithm))
                    )
                )
            for activation, algorithm in pairs:
                yield from _of(device, backend, dtype, activation, algorithm)


def _of(device: str, backend: str, dtype: str, activation: str, algorithm: str) -> Iterator[Scheme]:
    axes = QuantizationAxes(backend=backend, dtype=dtype, activation_dtype=activation, algorithm=algorithm)
    found: list[Any] = []
    for settings in ({}, {"activation_scales": "static"}):
        if device == "cpu" and backend == "torchao" and activation == "float8_e4m3" and not settings:
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
                compute_dtype=CAPABILITIES[backend][dtype].compute_dtypes[0],
            )


def columns(scheme: Scheme) -> tuple[str, ...]:
    """What the default tier has each of: dtypes, algorithms and activations of a backend, and kinds of scales."""
    backend, scales = scheme.backend, getattr(scheme.native, "activation_scales", "")
    return f"{backend} {scheme.dtype}", f"{backend} {scheme.algorithm}", f"{backend} {scheme.activation_dtype}", scales
