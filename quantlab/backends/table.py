"""The one table of backends, and the ways to a native config: from axes, and from what other libraries stored."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol, cast

from quantlab.backends import bitsandbytes, gguf, modelopt, quanto, torchao
from quantlab.errors import ConfigError, nearest, require_package
from quantlab.modules.feed import CalibrationFeed
from quantlab.vocabulary.axes import QuantizationAxes, capability, resolve_axes
from quantlab.vocabulary.native import EXCLUSION_RULES, LIBRARY_RULE, QuantizationConfigMixin, plain
from quantlab.vocabulary.reports import StoredWeight

_CONF_BACKEND = "torchao"
"""What ``conf/config.yaml`` chooses where nobody does."""
_CONFIG_FILE = "config.json"
_WRITERS = {"_diffusers_version": "diffusers", "transformers_version": "transformers"}
"""Key of a model's config.json -> the library that wrote it."""
_TRANSFORMERS_KEYS = (
    "weights",
    "activations",
    "include_embedding",
    "include_input_output_embeddings",
    "untie_embedding_weights",
)


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


class CalibratedBackend(Backend, Protocol):
    """A backend that uses data; see the package's docstring."""

    def calibrate(self, model: Any, layers: Any, config: Any, compute_dtype: str, feed: CalibrationFeed) -> Any: ...
    def quantize(self, model: Any, layers: Any, config: Any, compute_dtype: str, calibrated: Any = None) -> None: ...


def calibrated_backend(backend: str) -> CalibratedBackend:
    """The backend of a config whose ``needs_data`` is true."""
    return cast(CalibratedBackend, BACKENDS[backend])


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
    _require(axes.backend, axes.dtype)
    return config


def pasted_config(
    axes: QuantizationAxes, settings: Mapping[str, Any], typed: Collection[str] = ()
) -> tuple[QuantizationConfigMixin, QuantizationAxes]:
    """The native config of the node's ``quantization_config``, and the node's axes with what it says filled in.

    The exclusions of the node itself come on top, by quantlab's matcher. ``typed`` are the keys that the user typed:
    the backend that ``conf`` chooses for everyone is no contradiction. Raises ConfigError for an axis or setting of the
    node that says otherwise than the dictionary, and for a config that no axes express.
    """
    key = "quantization.quantization_config"
    try:
        native: QuantizationConfigMixin = config_from_dict(axes.quantization_config)
        said = resolve_axes(native.axes())
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error
    if said.backend == "gguf" and "gguf_type" not in native.extra_settings():
        raise ConfigError(
            f"{key}: gguf_type: Diffusers takes the format from the file, so its dictionary says none; "
            "add gguf_type, the format to write"
        )
    default = QuantizationAxes(backend=_CONF_BACKEND if "backend" not in typed else "none")
    for name in ("backend", "dtype", "group_size", "activation_dtype", "compute_dtype", "algorithm"):
        asked, found = str(getattr(axes, name)), str(getattr(said, name))
        if asked not in (getattr(default, name), found):
            raise ConfigError(f"{name}={asked}: the {key} says {found}; leave {name} out")
    for name, value in settings.items():
        if plain(value) not in (own_settings(axes.backend)[name].default, getattr(native, name, None)):
            raise ConfigError(f"quantization.{name}={value}: the {key} decides it; leave {name} out")
    _require(said.backend, said.dtype)
    kept = {
        name: getattr(axes, name)
        for name in ("modules_to_not_convert", "replace_default_exclusions", "on_mismatch", "quantization_config")
    }
    return native, replace(said, **kept)


def _require(backend: str, dtype: str) -> None:
    for package in (PACKAGES[backend], *capability(backend, dtype).packages):
        require_package(package, f"backend={backend}", backend)


# -- from stored dictionaries


def config_from_dict(quantization_config: Mapping[str, Any], exclusion_rule: str | None = None) -> Any:
    """The native config for a ``quantization_config`` as Diffusers or transformers writes it. Torch-free.

    The class is chosen by ``quant_method`` (bitsandbytes also by its load flags). Exclusions keep the rule of the
    library that wrote them: ``exclusion_rule``, here or in the dictionary, says whose; without it, keys that only one
    library writes; else ``library``, which is settled by the model (see :mod:`quantlab.backends.exclusions`).

    Raises:
        ConfigError: naming the key, for a dictionary that no native config can hold.
    """
    data = dict(quantization_config)
    method = plain(data.get("quant_method"))
    if method is None and any(key.lstrip("_") in ("load_in_4bit", "load_in_8bit") for key in data):
        method = "bitsandbytes"
    if method is None:
        raise ConfigError(f"quant_method: the dictionary has none, so its library is unknown; add one of {_listed()}")
    if method not in BACKENDS:
        raise ConfigError(f"quant_method={method}: there are {_listed()}{nearest(str(method), BACKENDS)}")
    said = data.pop("exclusion_rule", None)
    if exclusion_rule and said and exclusion_rule != said:
        raise ConfigError(f"exclusion_rule={exclusion_rule}: the dictionary says {said}; keep one of them")
    rule = exclusion_rule or said or _writer(method, data)
    if rule not in EXCLUSION_RULES:
        raise ConfigError(
            f"exclusion_rule={rule}: there are {', '.join(EXCLUSION_RULES)}{nearest(str(rule), EXCLUSION_RULES)}"
        )
    return BACKENDS[method].Config.from_dict({**data, "quant_method": method, "exclusion_rule": rule})


def _listed() -> str:
    return ", ".join(BACKENDS)


def _writer(method: str, data: Mapping[str, Any]) -> str:
    """Which library's matcher reads the dictionary's exclusions, as far as its keys tell."""
    if any(key in data for key in _TRANSFORMERS_KEYS):
        return "transformers"
    return "diffusers" if method in ("gguf", "modelopt", "quanto") else LIBRARY_RULE


def from_pretrained_config(config: Mapping[str, Any] | str | Path) -> Any:
    """The native config of a quantized checkpoint: its config.json as a mapping, a file, or the folder it is in.

    Raises:
        ConfigError: the file cannot be read, or the model is not quantized.
    """
    where = "config" if isinstance(config, Mapping) else str(config)
    data = config if isinstance(config, Mapping) else _read_json(Path(config))
    found = data.get("quantization_config")
    if found is None:
        raise ConfigError(
            f"{where}: it has no quantization_config, so the model is not quantized; "
            "config_from_dict reads a quantization_config alone"
        )
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: its quantization_config is a {type(found).__name__}; a mapping is wanted")
    writer = next((library for key, library in _WRITERS.items() if key in data), None)
    return config_from_dict(found, None if "exclusion_rule" in found else writer)


def _read_json(path: Path) -> Mapping[str, Any]:
    path = path / _CONFIG_FILE if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping is wanted, not {type(data).__name__}")
    return data
