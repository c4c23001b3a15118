"""The one table of backends, and the way from axes to a native config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

from quantlab.axes import QuantizationAxes, capability, resolve_axes
from quantlab.backends import bitsandbytes, gguf, modelopt, quanto, torchao
from quantlab.config import QuantizationConfigMixin
from quantlab.errors import ConfigError, nearest, require_package
from quantlab.reports import StoredWeight


class Backend(Protocol):
    """What a backend file offers; see the package's docstring."""

    @property
    def Config(self) -> type[QuantizationConfigMixin]: ...

    def resolve(self, config: Any, device: str, compute_dtype: str) -> Any: ...
    def quantize(self, model: Any, layers: Any, config: Any, compute_dtype: str) -> None: ...
    def read_back(self, layer: Any) -> StoredWeight: ...
    def save(self, model: Any, folder: Any) -> None: ...
    def load(self, model: Any, layers: Any, config: Any, folder: Any) -> Any: ...


BACKENDS: dict[str, Backend] = {
    "bitsandbytes": bitsandbytes,
    "torchao": torchao,
    "quanto": quanto,
    "gguf": gguf,
    "modelopt": modelopt,
}
PACKAGES = {
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
    "quanto": "optimum.quanto",
    "gguf": "gguf",
    "modelopt": "modelopt",
}
"""backend -> import name of its library."""


def own_settings(backend: str) -> dict[str, Any]:
    """The backend's own keys of the ``quantization`` node: name -> dataclass field of the native config."""
    if backend not in BACKENDS:
        return {}
    return {f.name: f for f in fields(BACKENDS[backend].Config) if f.metadata["node"]}  # type: ignore[arg-type]


def native_config(axes: QuantizationAxes, settings: Mapping[str, Any] | None = None) -> QuantizationConfigMixin | None:
    """Axes and the backend's own settings -> the native config; None for ``backend=none``. Torch-free.

    Raises ConfigError where the combination is impossible and MissingPackage where its library is not installed.
    """
    axes = resolve_axes(axes)
    if axes.backend == "none":
        return None
    settings = dict(settings or {})
    for key in settings:
        if key not in (own := own_settings(axes.backend)):
            raise ConfigError(f"quantization.{key}: {axes.backend} has no such setting{nearest(key, own)}")
    config = BACKENDS[axes.backend].Config.from_axes(axes, settings)
    for package in (PACKAGES[axes.backend], *capability(axes.backend, axes.dtype).packages):
        require_package(package, f"backend={axes.backend}", axes.backend)
    return config
