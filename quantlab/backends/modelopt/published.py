"""What ModelOpt's exporter writes into hf_quant_config.json and config.json, as the settings that say the same.

A block names a format (``quant_algo``), the layers that were left out by globs on their paths, and how a server keeps
its cache (``kv_cache_quant_algo``), which is no layer's and is not used here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import Any, NamedTuple

from quantlab.errors import ConfigError, nearest


class _Format(NamedTuple):
    weight: str
    activation: str = ""
    algorithm: str = "max"
    by_row: bool = False
    block: int | None = None


_FORMATS = {
    "FP8": _Format("FP8", "FP8"),
    "W8A16": _Format("INT8", by_row=True),
    "W8A8_SQ_PER_CHANNEL": _Format("INT8", "INT8", "smoothquant", by_row=True),
    "W4A16_AWQ": _Format("INT4", "", "awq_lite", block=128),
    "W4A8_AWQ": _Format("INT4", "FP8", "awq_lite", block=128),
    "NVFP4": _Format("NVFP4", "NVFP4"),
    "NVFP4_AWQ": _Format("NVFP4", "NVFP4", "awq_lite"),
    "NVFP4_SVD": _Format("NVFP4", "NVFP4", "svdquant"),
    "W4A16_NVFP4": _Format("NVFP4"),
    "W4A8_NVFP4_FP8": _Format("NVFP4", "FP8"),
    "MXFP8": _Format("MXFP8", "MXFP8"),
    "MXFP4": _Format("MXFP4", "MXFP4"),
    "W4A8_MXFP4_FP8": _Format("MXFP4", "FP8"),
}
"""``quant_algo`` -> the format of the weights and activations, and how the scales were found."""
_PB = "it has one scale for blocks of 128 x 128 weights, and quantlab's blocks lie in a row"
_NOT_HERE = {
    "FP8_PER_CHANNEL_PER_TOKEN": "it rounds activations with one scale a token, and quantlab's modelopt has one for "
    "all of a call; add weight_only: true for the weights alone, or take backend=torchao dtype=float8_e4m3 "
    "activation_dtype=float8_e4m3 (CUDA)",
    **dict.fromkeys(
        ("FP8_PB_WO", "FP8_PB_REAL"), f"{_PB}; take dtype=float8_e4m3 group_size=none, one scale a row, beside it"
    ),
    "MIXED_PRECISION": "its layers have formats of their own (quantized_layers), and quantlab's modelopt has one for "
    "all; run each format alone, the other layers in modules_to_not_convert",
}
_LEFT = ("producer", "quant_method", "kv_cache_quant_algo", "kv_cache_scheme", "config_groups", "quant_type")
_TAKEN = ("quant_algo", "group_size", "has_zero_point", "pre_quant_scale", "lora_rank", "exclude_modules", "ignore")
_OURS = ("weight_only", "exclusion_rule", "compress", "algorithm_settings")
_OWN_BLOCKS = ("NVFP4", "MXFP8", "MXFP4")


def taken_by_export(entry: str, path: str) -> bool:
    """Whether a glob of ``exclude_modules`` or ``ignore`` takes a layer: its path, or that of a module around it."""
    return fnmatch.fnmatchcase(path, entry) or fnmatch.fnmatchcase(path, f"{entry}.*")


def is_published(data: Mapping[str, Any]) -> bool:
    """Whether a dictionary is what the exporter writes, and not a config of Diffusers."""
    return "quant_algo" in data or "quantization" in data


def from_published(data: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of ``NVIDIAModelOptConfig`` that a published block means.

    ``weight_only: true``, which the exporter does not write, leaves activations alone. Raises ConfigError for a format
    that quantlab has not, with what comes nearest.
    """
    inner = data.get("quantization")
    said = {**{k: v for k, v in data.items() if k != "quantization"}, **(inner if isinstance(inner, Mapping) else {})}
    algo, known = said.get("quant_algo"), (*_FORMATS, *_NOT_HERE)
    name = str(algo).upper()
    if algo is None:
        raise ConfigError("quant_algo=null: the layers of this model are not quantized; give another block")
    is_weight_only = said.get("weight_only", False) is True
    if name in _NOT_HERE and not (name.startswith("FP8_PER") and is_weight_only):
        raise ConfigError(f"quant_algo={algo}: {_NOT_HERE[name]}")
    for key in said:
        if key not in (*_LEFT, *_TAKEN, *_OURS):
            raise ConfigError(f"{key}: an exported block of ModelOpt has no such key{nearest(key, (*_TAKEN, *_OURS))}")
    if name not in _FORMATS and not name.startswith("FP8_PER"):
        raise ConfigError(f"quant_algo={algo}: there are {', '.join(known)}{nearest(name, known)}")
    form = _FORMATS.get(name, _Format("FP8", by_row=True))
    if is_weight_only:
        form = form._replace(activation="", algorithm="max" if form.algorithm == "smoothquant" else form.algorithm)
    elif form.activation and form.weight in _OWN_BLOCKS:
        raise ConfigError(
            f"quant_algo={algo}: it rounds activations to {form.activation} too, and quantlab's modelopt keeps them "
            f"beside {form.weight} weights; add weight_only: true for the weights alone"
        )
    if said.get("has_zero_point"):
        raise ConfigError("has_zero_point=true: ModelOpt's integers here are symmetric; leave it out")
    return {**_settings(form, _group_size(said)), **_given(said)}


def _settings(form: _Format, group_size: int | None) -> dict[str, Any]:
    shape: dict[str, Any] = {"channel_quantize": 0} if form.by_row else {}
    if form.block is not None:
        shape = {"channel_quantize": -1, "block_quantize": group_size or form.block}
    return {
        "quant_type": f"{form.weight}_{form.activation}" if form.activation else form.weight,
        "weight_only": not form.activation,
        "algorithm": form.algorithm,
        "activation_scales": "static" if form.activation else "dynamic",
        **shape,
    }


def _group_size(said: Mapping[str, Any]) -> int | None:
    groups = said.get("config_groups")
    sizes = [said.get("group_size")]
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        sizes.append(weights.get("group_size") if isinstance(weights, Mapping) else None)
    return next((size for size in sizes if size), None)


def _given(said: Mapping[str, Any]) -> dict[str, Any]:
    """Exclusions, and what the user added."""
    names = [*(said.get("exclude_modules") or ()), *(said.get("ignore") or ())]
    given = {key: said[key] for key in _OURS if key in said and key != "weight_only"}
    if said.get("lora_rank"):
        given["algorithm_settings"] = {"lowrank": said["lora_rank"]}
    return {"exclusion_rule": "modelopt", **given, "modules_to_not_convert": names}
