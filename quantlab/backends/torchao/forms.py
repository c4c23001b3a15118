"""torchao's configs as plain data: the ``{_type, _version, _data}`` form that ``config_to_dict`` writes.

Everything here is torch-free: dtypes, enums and granularities are small dictionaries in torchao's spelling. For the
configs that quantlab builds, :data:`DEFAULTS` holds every field with the library's default, so that a shorthand, a
dictionary that names two fields and an object of the library have one stored form.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

from quantlab.errors import ConfigError, nearest
from quantlab.modules.layers import fits
from quantlab.vocabulary.dtypes import dtype_name
from quantlab.vocabulary.native import to_json_data

Form = dict[str, Any]

INT4, INTX = "Int4WeightOnlyConfig", "IntxWeightOnlyConfig"
INT8_INTX = "Int8DynamicActivationIntxWeightConfig"
INT8, INT8_INT8 = "Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"
PER_MODULE = "FqnToConfig"
_PER_MODULE = (PER_MODULE, "ModuleFqnToConfig", "AOPerModuleConfig")
FLOAT8, FLOAT8_FLOAT8 = "Float8WeightOnlyConfig", "Float8DynamicActivationFloat8WeightConfig"
DTYPES = {"float8_e4m3fn": "float8_e4m3", "float8_e5m2": "float8_e5m2", "int4": "int4", "int3": "int3", "int2": "int2"}
"""What torchao calls a weight's dtype -> quantlab's."""


def of_dtype(name: str) -> Form:
    """A torch dtype."""
    return {"_type": "torch.dtype", "_data": name}


def of_enum(kind: str, name: str) -> Form:
    """A member of an enum of torchao, by its upper-case name."""
    return {"_type": kind, "_data": name}


def _granularity(kind: str, **data: int) -> Form:
    return {"_type": kind, "_version": 1, "_data": data}


PER_ROW = _granularity("PerRow", dim=-1)
PER_TENSOR = _granularity("PerTensor")
PER_AXIS_0 = _granularity("PerAxis", axis=0)


def per_group(size: int) -> Form:
    """One scale for ``size`` neighbours of a row."""
    return _granularity("PerGroup", group_size=size)


_PLAIN_GRANULARITIES = {"PerRow": PER_ROW, "PerTensor": PER_TENSOR}
_SYMMETRIC, _ASYMMETRIC = of_enum("MappingType", "SYMMETRIC"), of_enum("MappingType", "ASYMMETRIC")
_E4M3 = of_dtype("float8_e4m3fn")
_INTX_STORAGE = {
    "intx_packing_format": of_enum("IntxPackingFormat", "UNPACKED_TO_INT8"),
    "intx_choose_qparams_algorithm": of_enum("IntxChooseQParamsAlgorithm", "AFFINE"),
}
_MM_CONFIG = {
    "_type": "Float8MMConfig",
    "_version": 1,
    "_data": {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False},
}

DEFAULTS: dict[str, tuple[int, Form]] = {
    "Int8WeightOnlyConfig": (2, {"group_size": None, "granularity": PER_ROW, "set_inductor_config": True}),
    "Int8DynamicActivationInt8WeightConfig": (
        2,
        {
            "act_mapping_type": _SYMMETRIC,
            "weight_only_decode": False,
            "granularity": PER_ROW,
            "set_inductor_config": True,
            "reduce_range": False,
        },
    ),
    "Int4WeightOnlyConfig": (
        2,
        {
            "group_size": 128,
            "set_inductor_config": True,
            "int4_packing_format": of_enum("Int4PackingFormat", "PLAIN"),
            "int4_choose_qparams_algorithm": of_enum("Int4ChooseQParamsAlgorithm", "TINYGEMM"),
            "int4_tile_packed_ntile": 8,
        },
    ),
    "IntxWeightOnlyConfig": (
        2,
        {
            "weight_dtype": of_dtype("int8"),
            "granularity": PER_AXIS_0,
            "mapping_type": _SYMMETRIC,
            "scale_dtype": None,
            **_INTX_STORAGE,
        },
    ),
    "Int8DynamicActivationIntxWeightConfig": (
        2,
        {
            "weight_dtype": of_dtype("int8"),
            "weight_granularity": per_group(32),
            "weight_mapping_type": _SYMMETRIC,
            "weight_scale_dtype": None,
            "act_mapping_type": _ASYMMETRIC,
            **_INTX_STORAGE,
        },
    ),
    "Float8WeightOnlyConfig": (2, {"weight_dtype": _E4M3, "set_inductor_config": True, "granularity": PER_ROW}),
    "Float8DynamicActivationFloat8WeightConfig": (
        2,
        {
            "activation_dtype": _E4M3,
            "weight_dtype": _E4M3,
            "granularity": [PER_TENSOR, PER_TENSOR],
            "packing_format": of_enum("Float8PackingFormat", "PLAIN"),
            "mm_config": _MM_CONFIG,
            "activation_value_lb": None,
            "activation_value_ub": None,
            "kernel_preference": of_enum("KernelPreference", "AUTO"),
            "set_inductor_config": True,
            "alg_id": 0,
        },
    ),
    "NF4WeightOnlyConfig": (1, {}),
    "NVFP4WeightOnlyConfig": (1, {"use_dynamic_per_tensor_scale": True}),
    "MXDynamicActivationMXWeightConfig": (
        1,
        {
            "block_size": 32,
            "activation_dtype": _E4M3,
            "weight_dtype": _E4M3,
            "kernel_preference": of_enum("KernelPreference", "AUTO"),
            "scaling_mode": of_enum("ScaleCalculationMode", "RCEIL"),
        },
    ),
}
"""Config of torchao 0.18 -> its version and its fields with their defaults."""

INTX_DTYPES = tuple(f"int{bits}" for bits in range(1, 9))
_FLOAT8_DTYPES = ("float8_e4m3fn", "float8_e5m2")
_WEIGHT_DTYPES = {
    "IntxWeightOnlyConfig": INTX_DTYPES,
    "Int8DynamicActivationIntxWeightConfig": INTX_DTYPES,
    "Float8WeightOnlyConfig": _FLOAT8_DTYPES,
    "Float8DynamicActivationFloat8WeightConfig": _FLOAT8_DTYPES,
    "MXDynamicActivationMXWeightConfig": ("float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"),
}


def make(kind: str, **given: Any) -> Form:
    """The stored form of torchao's config ``kind`` with the fields ``given``; the others have the library's default.

    Raises ConfigError for a field that the config does not have or a value of the wrong kind.
    """
    version, defaults = DEFAULTS[kind]
    for key in given:
        if key not in defaults:
            raise ConfigError(
                f"quant_type={kind}: it has no setting {key}{nearest(key, defaults)} "
                f"(it has {', '.join(defaults) or 'none'})"
            )
    data = {k: _like(f"quant_type={kind}: {k}", v, given[k]) if k in given else v for k, v in defaults.items()}
    for key, accepted in (("weight_dtype", _WEIGHT_DTYPES.get(kind, ())),):
        if key in data and data[key]["_data"] not in accepted:
            raise ConfigError(f"quant_type={kind}: {key}={data[key]['_data']} is none of {', '.join(accepted)}")
    if data.get("group_size") is not None and kind == "Int8WeightOnlyConfig":
        data |= {"granularity": per_group(data["group_size"]), "group_size": None}
    return copy.deepcopy({"_type": kind, "_version": version, "_data": data})


def group_of(granularity: Mapping[str, Any]) -> int | str | None:
    """A granularity as a group size; None where no group size says it."""
    kind, data = granularity["_type"], granularity["_data"]
    if kind == "PerGroup":
        return int(data["group_size"])
    return "none" if kind == "PerRow" or (kind == "PerAxis" and data["axis"] == 0) else None


def is_hqq(data: Mapping[str, Any]) -> bool:
    """Whether a config's fields ask for a search of half-quadratic quantization."""
    names = (data.get(k, {}).get("_data") for k in ("int4_choose_qparams_algorithm", "intx_choose_qparams_algorithm"))
    return any(name in ("HQQ", "HQQ_SCALE_ONLY") for name in names)


def from_mapping(value: Mapping[str, Any]) -> Form:
    """The stored form of a dictionary: torchao's own, or Diffusers' ``{"default": {...}}`` around it."""
    if set(value) == {"default"}:
        value = value["default"]
    if not isinstance(value, Mapping) or not isinstance(value.get("_type"), str):
        raise ConfigError(
            "quant_type: a dictionary has the key default, or torchao's _type, _version and _data; "
            "config_to_dict of torchao writes it"
        )
    data = dict(value.get("_data") or {})
    kind, version = value["_type"], value.get("_version", 1)
    if kind in _PER_MODULE:
        return _per_module(kind, data)
    kind, data = _upgraded(kind, version, data)
    if kind not in DEFAULTS:
        form: Form = to_json_data({"_type": kind, "_version": version, "_data": data})
        return form
    if version > DEFAULTS[kind][0]:
        raise ConfigError(
            f"quant_type={kind}: version {version} was written by a newer torchao; "
            f"this one reads up to {DEFAULTS[kind][0]}"
        )
    return make(kind, **data)


def _per_module(kind: str, data: Form) -> Form:
    """A config a module, under whichever of its three names, with each config inside in its stored form."""
    given = data.get("fqn_to_config") or data.get("module_fqn_to_config") or {}
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(f"quant_type={kind}: it names no module; give fqn_to_config, a mapping from names to configs")
    inner = {str(name): None if form is None else from_mapping(form) for name, form in given.items()}
    return {"_type": PER_MODULE, "_version": 1, "_data": {"fqn_to_config": inner}}


def form_of_layer(form: Form, path: str) -> Form | None:
    """What ``form`` asks of the layer at ``path``, by torchao's precedence; None where it leaves the layer alone."""
    if form["_type"] != PER_MODULE:
        return form
    told: dict[str, Form | None] = form["_data"]["fqn_to_config"]
    for name in (f"{path}.weight", path):
        if name in told:
            return told[name]
    for name in (f"{path}.weight", path):
        for key, inner in told.items():
            if key.startswith("re:") and fits(key.removeprefix("re:"), name, f"fqn_to_config={key}"):
                return inner
    return told.get("_default")


def from_object(value: object) -> Form:
    """The stored form of an ``AOBaseConfig`` object; nothing is imported that its owner has not imported."""
    core = sys.modules.get("torchao.core.config")
    if core is None or not isinstance(value, core.AOBaseConfig):
        raise ConfigError(
            f"quant_type={value!r}: TorchAoConfig accepts a shorthand such as int8wo, a config object of "
            "torchao, or the dictionary that config_to_dict writes"
        )
    try:
        return from_mapping(core.config_to_dict(value))
    except TypeError as error:  # a tensor among its fields
        raise ConfigError(
            f"quant_type={type(value).__name__}: it cannot be written as data ({error}); "
            "a scheme that needs measured scales cannot be stored in a config"
        ) from error


def _like(where: str, default: Any, value: Any) -> Any:
    """``value`` in the form that ``default`` has: names for enums, dtypes and granularities become dictionaries."""
    value = _data(value)
    if isinstance(default, list):
        pair = value if isinstance(value, list) else [value] * len(default)
        if len(pair) != len(default):
            raise ConfigError(f"{where}={value}: one granularity is wanted, or two (activation, weight)")
        return [_like(where, d, v) for d, v in zip(default, pair, strict=True)]
    is_granularity = isinstance(default, dict) and default["_type"].startswith("Per")
    if is_granularity:
        value = _PLAIN_GRANULARITIES.get(value, value) if isinstance(value, str) else value
        if not (isinstance(value, dict) and str(value.get("_type")).startswith("Per")):
            raise ConfigError(f"{where}={value}: a granularity is wanted (PerRow, PerTensor, or torchao's dictionary)")
        return {**value, "_version": 1}
    if isinstance(default, dict) and "_version" not in default:
        if isinstance(value, str):
            is_dtype = default["_type"] == "torch.dtype"
            value = {"_type": default["_type"], "_data": dtype_name(value) if is_dtype else value.upper()}
        if not (isinstance(value, dict) and value.get("_type") == default["_type"]):
            raise ConfigError(f"{where}={value}: a {default['_type']} is wanted, by its name")
        return value
    if where.endswith("dtype") and isinstance(value, str):
        return of_dtype(dtype_name(value))
    wants_bool, is_bool = isinstance(default, bool), isinstance(value, bool)
    if isinstance(default, (bool, int)) and (wants_bool != is_bool or not isinstance(value, int)):
        raise ConfigError(f"{where}={value!r}: {'true or false' if wants_bool else 'a whole number'} is wanted")
    if where.endswith("group_size") and value is not None and (is_bool or not isinstance(value, int) or value < 1):
        raise ConfigError(f"{where}={value!r}: a whole number above 0 is wanted")
    return value


def _data(value: Any) -> Any:
    """Objects of torch and torchao among keyword arguments, as data."""
    if isinstance(value, Enum):
        return of_enum(type(value).__name__, value.name)
    if type(value).__name__ == "dtype":
        return of_dtype(dtype_name(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _data(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"_type": type(value).__name__, "_version": 1, "_data": fields}
    if isinstance(value, Mapping):
        return {str(k): _data(v) for k, v in value.items()}
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return [_data(v) for v in value] if is_sequence else value


# -- what older releases wrote

_STORAGE_LAYOUTS = (
    *("PlainLayout", "TensorCoreTiledLayout", "QDQLayout", "Int4CPULayout", "Int4XPULayout"),
    *("Int8DynamicActInt4WeightCPULayout", "PackedLinearInt8DynamicActivationIntxWeightLayout"),
)
"""Layouts that said how the same numbers are kept."""
_PRUNING_LAYOUTS = ("MarlinSparseLayout", "SemiSparseLayout", "CutlassSemiSparseLayout")
_DROPPED = ("layout", "use_hqq", "zero_point_domain", "preserve_zero", "packing_format")


def check_layout(where: str, layout: Any) -> None:
    """ConfigError for the ``layout`` of an older torchao that says more than how numbers are kept.

    It is torchao's dictionary, or ``[name, fields]`` as transformers wrote it.
    """
    name = layout.get("_type") if isinstance(layout, Mapping) else layout
    name = name[0] if isinstance(name, (list, tuple)) and name else name
    if name is None or name in _STORAGE_LAYOUTS:
        return
    if name in _PRUNING_LAYOUTS:
        raise ConfigError(
            f"{where}: {name} keeps two of four weights, and torchao has it no more; leave the layout out for the "
            "format without pruning"
        )
    raise ConfigError(
        f"{where}: the layout {name} was removed from torchao; "
        "write the config again with today's torchao, without a layout"
    )


def _upgraded(kind: str, version: int, data: Form) -> tuple[str, Form]:
    """A config of an older torchao as the config that means the same today; ConfigError where there is none."""
    dropped = [k for k in _DROPPED if k in data and k not in DEFAULTS.get(kind, (0, {}))[1]]
    if kind in DEFAULTS and version == DEFAULTS[kind][0] and not dropped:
        return kind, data
    check_layout(f"quant_type={kind}", data.get("layout"))
    kept = {k: v for k, v in data.items() if k not in _DROPPED or k in DEFAULTS.get(kind, (0, {}))[1]}
    if kind == "Int8DynamicActivationInt4WeightConfig":
        renamed = {"weight_dtype": "int4", "weight_granularity": per_group(kept.get("group_size", 32))}
        for old, new in (("mapping_type", "weight_mapping_type"), ("act_mapping_type", "act_mapping_type")):
            renamed |= {new: kept[old]} if old in kept else {}
        return "Int8DynamicActivationIntxWeightConfig", renamed
    if kind == "Int4WeightOnlyConfig":
        kept = {"int4_packing_format": "tile_packed_to_4d", **kept}
        kept |= {"int4_choose_qparams_algorithm": "hqq"} if data.get("use_hqq") else {}
    return kind, kept if kind in DEFAULTS else data


def float8_axes(kind: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """The axes that a form of float8 says."""
    granularity = data["granularity"] if kind == FLOAT8 else data["granularity"][1]
    dtype = DTYPES[data["weight_dtype"]["_data"]]
    if kind == FLOAT8:
        return {"dtype": dtype, "group_size": group_of(granularity)}
    group = "auto" if granularity["_type"] == "PerTensor" else group_of(granularity)
    return {"dtype": dtype, "group_size": group, "activation_dtype": dtype}
