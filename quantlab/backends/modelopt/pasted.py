"""ModelOpt's own ``modelopt_config`` as data: reading it in each of its shapes, and writing the one Diffusers takes.

``quant_cfg`` is a list of entries since ModelOpt 0.44 and was a mapping from globs to attributes before; JSON turns the
whole numbers among its keys into strings. All of it is torch-free.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

from quantlab.errors import ConfigError

SIDES = ("*weight_quantizer", "*input_quantizer")
_OFF = {"enable": False}
_OTHER_LAYERS = ("nn.Embedding", *(f"nn.{kind}{n}d" for kind in ("Conv", "ConvTranspose", "BatchNorm") for n in "123"))
"""Classes that ModelOpt gives quantizers too, and quantlab does not."""

Entry = dict[str, Any]


def entries_of(modelopt_config: Mapping[str, Any]) -> list[Entry]:
    """``quant_cfg`` as a list of ``{quantizer_name, enable, cfg, parent_class}``, whichever shape it has."""
    given = modelopt_config.get("quant_cfg")
    if isinstance(given, Mapping):
        rank = {"*": 0, "default": 0, **dict.fromkeys(SIDES, 1)}  # a saved mapping is sorted by name: its order is lost
        items = sorted(given.items(), key=lambda item: rank.get(str(item[0]), 2))
        given = [e for name, value in items if isinstance(value, Mapping) for e in _from_mapping(str(name), value)]
    if not isinstance(given, (list, tuple)) or not all(isinstance(e, Mapping) for e in given):
        raise ConfigError("modelopt_config: it has a quant_cfg, a list of quantizers as ModelOpt 0.47 takes it")
    return [{"enable": True, "cfg": None, "parent_class": None, **e} for e in given]


def _from_mapping(name: str, value: Mapping[str, Any]) -> list[Entry]:
    if name.startswith("nn."):  # a class of layers, with globs of its own below it
        return [
            {**entry, "parent_class": name}
            for glob, inner in value.items()
            if isinstance(inner, Mapping)
            for entry in _from_mapping(glob, inner)
        ]
    cfg = {k: v for k, v in value.items() if k not in ("enable", "fake_quant")}
    return [{"quantizer_name": "*" if name == "default" else name, "enable": value.get("enable", True), "cfg": cfg}]


def sides(modelopt_config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(weight cfg, activation cfg or None). Raises ConfigError where some layers are quantized otherwise."""
    found: dict[str, dict[str, Any] | None] = {}
    for entry in entries_of(modelopt_config):
        name, cfg = entry.get("quantizer_name"), entry["cfg"]
        if name in SIDES and entry["parent_class"] is None:
            found[str(name)] = with_int_keys(cfg) if entry["enable"] and cfg else None
        elif entry["enable"] and cfg:
            raise ConfigError(
                f"modelopt_config: quantizer {name!r} is set for some layers only; "
                f"{' and '.join(SIDES)} are read, use modules_to_not_convert for the rest"
            )
    weight = found.get(SIDES[0])
    if not weight:
        raise ConfigError(f"modelopt_config: its quant_cfg sets no {SIDES[0]}; add it, or leave modelopt_config out")
    return weight, found.get(SIDES[1])


def with_int_keys(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A quantizer's attributes with the int axes that JSON made strings, and tuples for (exponent, mantissa)."""
    made: dict[Any, Any] = {}
    for key, value in cfg.items():
        is_axis = isinstance(key, str) and key.lstrip("-").isdigit()
        value = with_int_keys(value) if isinstance(value, Mapping) else value
        made[int(key) if is_axis else key] = tuple(value) if isinstance(value, list) else value
    return made


def switched_off(modelopt_config: Mapping[str, Any], paths: Sequence[str]) -> dict[str, str]:
    """Linear layer -> the glob of ``quant_cfg`` that switches its weight's quantizer off; the last match counts."""
    state: dict[str, str] = {}
    for entry in entries_of(modelopt_config):
        name = str(entry.get("quantizer_name"))
        if entry["parent_class"] not in (None, "nn.Linear"):
            continue
        for path in paths:
            if fnmatch.fnmatch(f"{path}.weight_quantizer", name):
                state[path] = "" if entry["enable"] else name
    return {path: f"modelopt_config: {glob}" for path, glob in state.items() if glob}


def algorithm_of(modelopt_config: Mapping[str, Any]) -> str | None:
    """Name of the algorithm; None where the config does not say."""
    given = modelopt_config.get("algorithm")
    given = given.get("method") if isinstance(given, Mapping) else given
    return None if given is None else str(given)


def settings_of(modelopt_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the config says of its algorithm beside the name."""
    given = modelopt_config.get("algorithm")
    return {str(k): v for k, v in given.items() if k != "method"} if isinstance(given, Mapping) else {}


def is_static(activation: Mapping[str, Any]) -> bool:
    """Whether these attributes of an activations' quantizer ask for a scale that is measured beforehand."""
    return "dynamic" not in (activation.get("type"), (activation.get("block_sizes") or {}).get("type"))


def granularity(activation: Mapping[str, Any]) -> str:
    """Which activations share a scale, by the attributes of their quantizer."""
    if activation.get("block_sizes"):
        return "per-block"
    return ("per-tensor" if activation.get("axis") is None else "per-token") + " static" * is_static(activation)


def with_dynamic_activations(modelopt_config: Mapping[str, Any]) -> dict[str, Any]:
    """The same config with algorithm ``max`` and activation scales that are taken at run time."""
    entries = entries_of(modelopt_config)
    for entry in entries:
        if entry.get("quantizer_name") == SIDES[1] and entry["enable"] and entry["cfg"] and is_static(entry["cfg"]):
            entry["cfg"] = {**entry["cfg"], "type": "dynamic"}
    return {"quant_cfg": entries, "algorithm": "max"}


def scheme(weight: Mapping[str, Any]) -> tuple[tuple[Any, Any], int | None]:
    """((bits of a weight, bits of its block's scale or None), block size or None) of a quantizer's attributes."""
    bits, blocks = weight.get("num_bits", 8), weight.get("block_sizes") or {}
    scale = blocks.get("scale_bits")
    block = next((v for k, v in blocks.items() if k in (-1, 1)), None)
    return (tuple(bits) if isinstance(bits, (list, tuple)) else bits, tuple(scale) if scale else None), block


def for_diffusers(
    weight: Mapping[str, Any],
    activation: Mapping[str, Any] | None,
    algorithm: Mapping[str, Any],
    off: Sequence[str] = (),
) -> dict[str, Any]:
    """A ``modelopt_config`` in the mapping shape, the only one to which Diffusers can add its exclusions.

    Only weights (and activations, where given) of Linear layers are quantized; ``off`` are globs to leave out.
    """
    quant_cfg: dict[str, Any] = {
        "*": dict(_OFF),
        SIDES[0]: {**weight, "fake_quant": False},
        SIDES[1]: dict(activation) if activation else dict(_OFF),
        "*output_quantizer": dict(_OFF),
    }
    for kind in _OTHER_LAYERS:
        quant_cfg[kind] = {"*": dict(_OFF)}
    for glob in off:
        quant_cfg[glob] = dict(_OFF)
    return {"quant_cfg": quant_cfg, "algorithm": dict(algorithm)}
