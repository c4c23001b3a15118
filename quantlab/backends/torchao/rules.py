"""Which torchao schemes take scales that are measured on data, and the library's config for each. Torch-free."""

from __future__ import annotations

from typing import Protocol

from quantlab.backends.torchao.forms import (
    DEFAULTS,
    FLOAT8_FLOAT8,
    INT4,
    INT8,
    INT8_INT8,
    INT8_INTX,
    PER_MODULE,
    PER_TENSOR,
    Form,
    is_hqq,
)
from quantlab.errors import ConfigError

OPAQUE = "PrototypeInt4WeightOnlyConfig"
OPAQUE_GROUPS = (32, 64, 128)
INT8_STATIC = "Int8StaticActivationInt8WeightConfig"
FLOAT8_STATIC = "Float8StaticActivationFloat8WeightConfig"
_SCALED_KINDS = (INT8, INT8_INT8, INT4)
_STATIC_KINDS = (INT8_INT8, FLOAT8_FLOAT8)
_WRITTEN_AS = {
    "AWQConfig": "algorithm=awq with the base_config as quant_type",
    "SmoothQuantConfig": "algorithm=smoothquant with the base_config as quant_type",
    INT8_STATIC: f"{INT8_INT8} with activation_scales=static",
    FLOAT8_STATIC: f"{FLOAT8_FLOAT8} with activation_scales=static",
    "GPTQConfig": "algorithm=gptq with the base_config as quant_type (on CUDA only)",
}
"""Steps of calibration that the library has as configs -> how the same is said here."""


class Settings(Protocol):
    """What is read of a ``TorchAoConfig``, which itself asks these rules."""

    @property
    def quant_type(self) -> Form: ...
    @property
    def int4_packing_format(self) -> str: ...
    @property
    def mapping_type(self) -> str: ...
    @property
    def algorithm(self) -> str: ...
    @property
    def smoothquant_alpha(self) -> float: ...
    @property
    def activation_scales(self) -> str: ...
    @property
    def calibration_layers_at_once(self) -> int: ...


def check_calibration(config: Settings) -> None:
    """ConfigError where the settings of a ``TorchAoConfig`` that concern calibration contradict its ``quant_type``."""
    kind, data = config.quant_type["_type"], config.quant_type["_data"]
    if kind in _WRITTEN_AS:
        raise ConfigError(f"quant_type={kind}: it is one step of a calibration; write {_WRITTEN_AS[kind]}")
    if config.calibration_layers_at_once < 0:
        raise ConfigError(
            f"calibration_layers_at_once={config.calibration_layers_at_once}: a number of layers is "
            "wanted; 0 takes all at once"
        )
    if config.algorithm != "auto":
        _check_algorithm(config, kind)
    if config.smoothquant_alpha != 0.5 and config.algorithm != "smoothquant":
        raise ConfigError(
            f"smoothquant_alpha={config.smoothquant_alpha}: it is for algorithm=smoothquant; leave it out"
        )
    if not 0 <= config.smoothquant_alpha <= 1:
        raise ConfigError(f"smoothquant_alpha={config.smoothquant_alpha}: a number from 0 to 1 is wanted, such as 0.5")
    if config.activation_scales == "static":
        _check_static(kind, data)


def _check_algorithm(config: Settings, kind: str) -> None:
    key, data = f"algorithm={config.algorithm}", config.quant_type["_data"]
    if config.algorithm == "gptq" and (kind != INT8 or data["granularity"]["_type"] != "PerRow"):
        raise ConfigError(
            f"{key}: torchao has it for {INT8} with one scale a row; set dtype=int8, "
            "activation_dtype=none and group_size=none, or choose backend=modelopt"
        )
    if kind not in _SCALED_KINDS:
        raise ConfigError(
            f"{key}: torchao scales the inputs of {', '.join(_SCALED_KINDS)}, and this is {kind}; choose "
            "dtype=int8, or dtype=int4 with activation_dtype=none, or leave the algorithm at auto"
        )
    if kind == INT4 and (data["group_size"] not in OPAQUE_GROUPS or is_hqq(data)):
        raise ConfigError(
            f"{key}: int4 has it in groups of {', '.join(map(str, OPAQUE_GROUPS))} and without hqq; set "
            "such a group_size, or leave the algorithm at auto"
        )
    if config.int4_packing_format == "unpacked_to_int8" or config.mapping_type == "SYMMETRIC":
        raise ConfigError(
            f"{key}: torchao scales the inputs of packed int4 only, which is asymmetric; leave "
            "int4_packing_format and mapping_type at auto"
        )
    if config.algorithm == "awq" and config.activation_scales == "static":
        raise ConfigError(
            "activation_scales=static: torchao's AWQ searches with dynamic activations; set "
            "algorithm=smoothquant, or activation_scales=dynamic"
        )


def _check_static(kind: str, data: Form) -> None:
    key = "activation_scales=static"
    if kind not in _STATIC_KINDS:
        raise ConfigError(
            f"{key}: torchao has it for {' and '.join(_STATIC_KINDS)}, and this is {kind}; set dtype and "
            "activation_dtype both to int8 or both to float8_e4m3, or activation_scales=dynamic"
        )
    if kind == INT8_INT8 and (data["act_mapping_type"]["_data"] != "SYMMETRIC" or data["weight_only_decode"]):
        raise ConfigError(
            f"{key}: it is measured for symmetric activations in every call; leave act_mapping_type and "
            "weight_only_decode at their defaults, or set activation_scales=dynamic"
        )
    if kind == FLOAT8_FLOAT8 and any(granularity["_type"] != "PerTensor" for granularity in data["granularity"]):
        raise ConfigError(
            f"{key}: static float8 has one scale for the whole weight; leave group_size=auto (the "
            "granularity PerTensor), or set activation_scales=dynamic"
        )


def granularity_of(form: Form) -> str:
    """Which activations share a scale in a config that takes their scales at run time; "" where they are left alone.

    Of a config a module the coarsest. What is not known counts as one scale for all of a call.
    """
    kind, data = form["_type"], form["_data"]
    if kind == PER_MODULE:
        found = {granularity_of(inner) for inner in data["fqn_to_config"].values() if inner is not None}
        return next((name for name in ("per-tensor", "per-token", "per-block") if name in found), "")
    if kind == INT8_INTX:
        return "per-token"
    if kind in (INT8_INT8, FLOAT8_FLOAT8):
        of = data["granularity"]
        first = of[0] if isinstance(of, (list, tuple)) else of
        return "per-tensor" if first["_type"] == "PerTensor" else "per-token"
    if kind not in DEFAULTS:
        return "per-tensor" if "Activation" in kind else ""
    return "per-block" if kind.startswith("MX") else ""


def static(form: Form) -> Form:
    """The static counterpart of a config with dynamic activations; its activation scale is set when it is built."""
    data = form["_data"]
    granularity: Form | list[Form]
    if form["_type"] == INT8_INT8:
        kind, granularity = INT8_STATIC, [PER_TENSOR, data["granularity"]]
        shared: tuple[str, ...] = ("act_mapping_type", "reduce_range", "set_inductor_config")
    else:
        kind, granularity = FLOAT8_STATIC, PER_TENSOR
        shared = ("activation_dtype", "weight_dtype", "mm_config", "kernel_preference", "set_inductor_config")
    fields = {"granularity": granularity, **{name: data[name] for name in shared}}
    return {"_type": kind, "_version": 1, "_data": fields}


def opaque(form: Form, group: int | str | None, in_features: int) -> Form:
    """The prototype that packs an ``Int4WeightOnlyConfig`` for a CPU, in groups of ``group``.

    Raises ConfigError where no group size of the prototype divides ``in_features``.
    """
    if not isinstance(group, int) or group not in OPAQUE_GROUPS:
        raise ConfigError(
            f"int4_packing_format=opaque: in_features {in_features} divides by none of its group sizes "
            f"{', '.join(map(str, OPAQUE_GROUPS))}; exclude the layer, or set algorithm=max and "
            "int4_packing_format=unpacked_to_int8"
        )
    names = ("int4_choose_qparams_algorithm", "set_inductor_config")
    return {
        "_type": OPAQUE,
        "_version": 1,
        "_data": {"group_size": group, **{name: form["_data"][name] for name in names}},
    }
