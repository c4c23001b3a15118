"""Native configs from what other libraries stored: a ``quantization_config``, or the config.json around it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.backends.table import backends
from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.files import read_json
from quantlab.vocabulary.native import EXCLUSION_RULES, QuantizationConfigMixin, plain

_CONFIG_FILE = "config.json"
_WRITERS = {"_diffusers_version": "diffusers", "transformers_version": "transformers"}
"""Key of a model's config.json -> the library that wrote it."""


def config_from_dict(
    quantization_config: Mapping[str, Any], exclusion_rule: str | None = None
) -> QuantizationConfigMixin:
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
    if method not in backends():
        raise ConfigError(f"quant_method={method}: there are {_listed()}{nearest(str(method), backends())}")
    said = data.pop("exclusion_rule", None)
    if exclusion_rule and said and exclusion_rule != said:
        raise ConfigError(f"exclusion_rule={exclusion_rule}: the dictionary says {said}; keep one of them")
    rule = exclusion_rule or said
    if rule not in (None, *EXCLUSION_RULES):
        raise ConfigError(
            f"exclusion_rule={rule}: there are {', '.join(EXCLUSION_RULES)}{nearest(str(rule), EXCLUSION_RULES)}"
        )
    known = {"exclusion_rule": rule} if rule else {}
    return backends()[method].module.Config.from_dict({**data, "quant_method": method, **known})


def _listed() -> str:
    return ", ".join(backends())


def from_pretrained_config(config: Mapping[str, Any] | str | Path) -> QuantizationConfigMixin:
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
    data = read_json(path, str(path), "give a config.json, or a folder that holds one")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping is wanted, not {type(data).__name__}")
    return data
