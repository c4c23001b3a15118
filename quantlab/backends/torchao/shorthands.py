"""The 51 strings that ``TorchAoConfig`` of Diffusers 0.32 to 0.37 accepted, and what each means today."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantlab.backends.torchao.forms import DEFAULTS, Form, check_layout, make, per_group
from quantlab.errors import ConfigError, nearest

_E5M2 = "float8_e5m2"
_FPX = tuple(name for x in range(3, 8) for name in (f"fp{x}", *(f"fp{x}_e{e}m{x - 1 - e}" for e in range(1, x))))
_NO_FPX = (
    "torchao removed its X-bit floats in 0.16; float8wo_e4m3 keeps 8 bits, and the 4-bit floats are "
    "NF4WeightOnlyConfig and NVFP4WeightOnlyConfig (dtype=nf4, dtype=nvfp4)"
)
_NO_STATIC = (
    "it needs an activation scale that calibration measures; "
    "float8dq measures it at run time (activation_dtype=float8_e4m3)"
)


def _get_torchao_quant_type_to_method() -> dict[str, Form | str]:
    """Shorthand -> the stored form of today's torchao config, or the reason and the replacement where there is none.

    ``float8wo`` is e5m2, as it was, while ``float8_weight_only`` is the library's default, e4m3.
    """
    int4 = make("Int4WeightOnlyConfig", group_size=128, int4_packing_format="tile_packed_to_4d")
    int4_dynamic = make("Int8DynamicActivationIntxWeightConfig", weight_dtype="int4", weight_granularity=per_group(32))
    int8, int8_dynamic = make("Int8WeightOnlyConfig"), make("Int8DynamicActivationInt8WeightConfig")
    e4m3, e5m2 = make("Float8WeightOnlyConfig"), make("Float8WeightOnlyConfig", weight_dtype=_E5M2)
    float8 = make("Float8DynamicActivationFloat8WeightConfig")
    return {
        "int4wo": int4,
        "int4_weight_only": int4,
        "int4dq": int4_dynamic,
        "int8_dynamic_activation_int4_weight": int4_dynamic,
        "int8wo": int8,
        "int8_weight_only": int8,
        "int8dq": int8_dynamic,
        "int8_dynamic_activation_int8_weight": int8_dynamic,
        "float8wo": e5m2,
        "float8wo_e5m2": e5m2,
        "float8_weight_only": e4m3,
        "float8wo_e4m3": e4m3,
        "float8dq": float8,
        "float8_dynamic_activation_float8_weight": float8,
        "float8dq_e4m3": float8,
        "float8dq_e4m3_tensor": make("Float8DynamicActivationFloat8WeightConfig", granularity="PerTensor"),
        "float8dq_e4m3_row": make("Float8DynamicActivationFloat8WeightConfig", granularity="PerRow"),
        "float8_static_activation_float8_weight": _NO_STATIC,
        "uintx_weight_only": _no_uint("N"),
        **{f"uint{bits}wo": _no_uint(str(bits)) for bits in range(1, 8)},
        **dict.fromkeys(_FPX, _NO_FPX),
    }


def _no_uint(bits: str) -> str:
    return (
        f"torchao's unsigned integers need the package gemlite and a GPU; the nearest is "
        f"IntxWeightOnlyConfig(weight_dtype=torch.int{bits}, granularity=PerGroup(64)), that is dtype=int{bits} "
        "group_size=64"
    )


def expand(name: str, keywords: Mapping[str, Any]) -> Form:
    """The stored form of a shorthand with its keyword arguments.

    ``group_size`` is accepted where the config has groups, whatever the config calls them. Raises ConfigError for an
    unknown shorthand or keyword, with the nearest that exists, and for one without an equivalent.
    """
    table = _get_torchao_quant_type_to_method()
    if name not in table:
        raise ConfigError(
            f"quant_type={name!r}: no such shorthand{nearest(name, table)} "
            f"(there are {', '.join(n for n, form in table.items() if isinstance(form, dict))})"
        )
    form = table[name]
    if isinstance(form, str):
        raise ConfigError(f"quant_type={name!r}: {form}")
    kind, given = form["_type"], dict(keywords)
    check_layout(f"quant_type={name!r}", given.pop("layout", None))
    grouped = {"Int8WeightOnlyConfig": "granularity", "Int8DynamicActivationIntxWeightConfig": "weight_granularity"}
    accepted = (*DEFAULTS[kind][1], *(("group_size",) if kind in grouped else ()))
    for key in given:
        if key not in accepted:
            raise ConfigError(
                f"{key}: {name} has no such keyword{nearest(key, accepted)} "
                f"(it has {', '.join(dict.fromkeys(accepted))})"
            )
    if kind in grouped and given.get("group_size") is not None:
        size = given.pop("group_size")
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ConfigError(f"group_size={size!r}: {name} wants a whole number above 0")
        given[grouped[kind]] = per_group(size)
    return make(kind, **{**form["_data"], **given})
