"""Native configs from what other libraries stored: a ``quantization_config``, or the config.json around it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from quantlab.backends.table import backends
from quantlab.errors import ConfigError, nearest
from quantlab.vocabulary.fields import checked_path
from quantlab.vocabulary.files import read_json
from quantlab.vocabulary.native import EXCLUSION_RULES, QuantizationConfigMixin, plain

_CONFIG_FILES = ("config.json", "hf_quant_config.json")
_FILE_KEY = "quantization.quantization_config"
_UNQUANTIZED = "it has no quantization_config, so the model is not quantized"
_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Keys of a multimodal model's config that hold the config of its language model."""
_WRITERS = {"_diffusers_version": "diffusers", "transformers_version": "transformers"}
"""Key of a model's config.json -> the library that wrote it."""
_ELSEWHERE = {
    "gptq": "its rounding is offered by backend=modelopt dtype=int4 algorithm=gptq",
    "awq": "its scaling is offered by backend=torchao dtype=int4 algorithm=awq, and by modelopt's awq_lite",
    "compressed-tensors": "its groups say num_bits, type and group_size: write them as dtype= and group_size=",
    "fp8": "8-bit floats with a scale a row are backend=torchao dtype=float8_e4m3",
    "fbgemm_fp8": "8-bit floats with a scale a row are backend=torchao dtype=float8_e4m3",
    "mxfp4": "the format is offered as backend=torchao dtype=mxfp4, and by modelopt on CUDA",
    "hqq": "its search is offered by backend=quanto dtype=int4 algorithm=hqq, and by torchao",
    "auto-round": "integers of 4 bits are offered as dtype=int4 by torchao, quanto and modelopt",
    "eetq": "8-bit integers with a scale a row are backend=torchao dtype=int8",
    "svdquant": "its low-rank branch is offered by backend=modelopt dtype=int4 algorithm=svdquant",
}
"""quant_method of a library that quantlab has not -> what comes nearest."""


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
    if not isinstance(quantization_config, Mapping):
        shown = str(quantization_config)[:80]
        raise ConfigError(
            f"quantization_config={shown!r}: a dictionary is wanted, as Diffusers or transformers writes it; "
            "quantlab.from_pretrained_config takes the path of a config.json"
        )
    data = dict(quantization_config)
    method = _method_of(data)
    if method is None:
        raise ConfigError(f"quant_method: the dictionary has none, so its library is unknown; add one of {_listed()}")
    if method not in backends():
        way = f"; {_ELSEWHERE[method]}" if method in _ELSEWHERE else nearest(str(method), backends())
        raise ConfigError(f"quant_method={method}: there are {_listed()}{way}")
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


def _method_of(data: Mapping[str, Any]) -> Any:
    """The library that a block is of, by what it says or by keys that only one writes; None where it is not told."""
    method = plain(data.get("quant_method"))
    if method is None and any(key.lstrip("_") in ("load_in_4bit", "load_in_8bit") for key in data):
        return "bitsandbytes"
    inner = data.get("quantization")
    if method is None and ("quant_algo" in data or isinstance(inner, Mapping) and "quant_algo" in inner):
        return "modelopt"
    return method


def _listed() -> str:
    return ", ".join(backends())


def from_pretrained_config(config: Mapping[str, Any] | str | Path) -> QuantizationConfigMixin:
    """The native config of a quantized checkpoint: its config.json as a mapping, a file, or the folder it is in.

    Raises:
        ConfigError: the file cannot be read, or the model is not quantized.
    """
    if isinstance(config, Mapping):
        return config_from_dict(_block_in(config, "config"))
    if not isinstance(config, (str, Path)):
        raise ConfigError(f"config={config!r}: a mapping, a config.json or the folder that holds one is wanted")
    return config_from_dict(_block_in(_read(Path(config)), str(config)))


# -- what is pasted


def block_of(pasted: Mapping[str, Any] | str) -> dict[str, Any]:
    """A ``quantization_config`` as it was pasted: a mapping, the same as JSON text, or the path of a file that holds
    one (config.json, hf_quant_config.json, or the folder of a model).

    Raises:
        ConfigError: it is none of these, or the model is not quantized.
    """
    if not isinstance(pasted, (Mapping, str)):
        raise ConfigError(f"a mapping, JSON text or a file is wanted, not {pasted!r}")
    if file := pasted_file(pasted):
        return _block_in(_read(checked_path(_FILE_KEY, file)), file, is_block=True)
    if isinstance(pasted, str):
        try:
            pasted = json.loads(pasted, object_pairs_hook=_each_once)
        except ConfigError:
            raise
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"the text is no JSON ({error}); copy it whole, from {{ to }}") from error
    return _block_in(cast("Mapping[str, Any]", pasted), "the text", is_block=True)


def _each_once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON; ConfigError for a key that it has twice: the last would win without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ConfigError(f"{next(k for k in keys if keys.count(k) > 1)}: is in it twice; keep one")
    return found


def pasted_file(pasted: object) -> str:
    """The file that is meant, where a path was pasted and no mapping; "" otherwise."""
    return pasted if isinstance(pasted, str) and not pasted.lstrip().startswith(("{", "[")) else ""


def _block_in(content: Mapping[str, Any], where: str, *, is_block: bool = False) -> dict[str, Any]:
    """The block in what a file holds: around it stands a model's config, of which a part may be what is quantized.

    ``is_block``: the content may be the block itself.
    """
    places = [content, *(content[k] for k in _PARTS if isinstance(content.get(k), Mapping))]
    found = next((place["quantization_config"] for place in places if place.get("quantization_config")), None)
    if found is None and (_method_of(content) is not None or is_block and "model_type" not in content):
        if not content:
            raise ConfigError(f"{where}: {_UNQUANTIZED}")
        return dict(content)
    if found is None:
        raise ConfigError(f"{where}: {_UNQUANTIZED}; config_from_dict reads a quantization_config alone")
    if not isinstance(found, Mapping):
        raise ConfigError(f"{where}: its quantization_config is a {type(found).__name__}; a mapping is wanted")
    writer = next((library for key, library in _WRITERS.items() if key in content), None)
    return {**found, **({"exclusion_rule": writer} if writer and "exclusion_rule" not in found else {})}


def _read(path: Path) -> Mapping[str, Any]:
    """A file's content; of a folder's files the first that says how the model is quantized."""
    files = [path / name for name in _CONFIG_FILES if (path / name).is_file()] if path.is_dir() else [path]
    read = [_read_json(file) for file in files or [path / _CONFIG_FILES[0]]]
    return next((content for content in read if "quantization_config" in content), read[-1])


def _read_json(path: Path) -> Mapping[str, Any]:
    data = read_json(path, str(path), "give a config.json, or a folder that holds one")
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: a mapping is wanted, not {type(data).__name__}")
    return data
