"""ModelOpt's calibration algorithms as data: their settings, what each needs, and where one would do nothing.

What they keep while they run, for a layer of ``out x in`` weights (read in the library's source; none keeps inputs):

``max``, ``smoothquant``
    maxima: one number a tensor, or ``in`` numbers.
``mse``
    the summed error of each candidate scale, one number a scale and candidate; no data.
``awq_lite``, ``svdquant``
    ``in`` mean magnitudes and one error a candidate; ``svdquant`` then factorizes the weight in double precision.
``awq_clip``, ``awq_full``
    11 errors for each scale, and for one call ``max_co_batch_size x max_tokens_per_batch x in`` products.
``gptq``
    ``in x in`` numbers in float32. Time grows with ``out x in^2``: each column rounds the whole weight.
``local_hessian``
    ``in x block_size`` numbers in float32.

The library collects for all layers at once; :mod:`quantlab.backends.modelopt.calibrate` bounds what is kept together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantlab.errors import ConfigError, nearest


@dataclass(frozen=True)
class Parameter:
    """One setting of an algorithm: its type, default and inclusive bounds."""

    kind: type
    default: float | int | None
    low: float
    high: float


_SEARCH = {  # 1.0, the maximum itself, is among the candidates; the library's own grid (0.25 to 4) misses it
    "start_multiplier": Parameter(float, 0.25, 0.01, 1.0),
    "stop_multiplier": Parameter(float, 1.0, 0.01, 4.0),
    "step_size": Parameter(float, 0.05, 0.001, 1.0),
}
_SCALE = {"alpha_step": Parameter(float, 0.1, 0.001, 1.0)}
_CLIP = {
    "max_co_batch_size": Parameter(int, 1024, 1, 1 << 20),
    "max_tokens_per_batch": Parameter(int, 64, 1, 1 << 20),
    "min_clip_ratio": Parameter(float, 0.5, 0.01, 0.99),
    "shrink_step": Parameter(float, 0.05, 0.001, 1.0),
}
PARAMETERS: dict[str, dict[str, Parameter]] = {
    "max": {},
    "mse": _SEARCH,
    "smoothquant": {"alpha": Parameter(float, 0.5, 0.0, 1.0)},  # the library's 1.0 leaves all outliers to the weights
    "awq_lite": _SCALE,
    "awq_clip": _CLIP,
    "awq_full": {**_SCALE, **_CLIP},
    "svdquant": {"lowrank": Parameter(int, 32, 1, 1 << 16)},
    "gptq": {"perc_damp": Parameter(float, 0.01, 1e-6, 1.0), "block_size": Parameter(int, 128, 1, 1 << 20)},
    "local_hessian": {**_SEARCH, "block_size": Parameter(int, None, 1, 1 << 20)},
}
"""Algorithm -> its settings. ``local_hessian``'s block is the layer's own where it is not set."""
ALGORITHMS = tuple(PARAMETERS)
DATA_FREE = ("max", "mse")
PRE_SCALED = ("smoothquant", "awq_lite", "awq_full", "svdquant")
"""Those that scale a layer's input channels, and its weight's columns the other way."""
CLIPPING = ("awq_clip", "awq_full")
"""Those that search a scale for each block, and leave a weight without blocks as ``max`` has it."""


def checked_settings(algorithm: str, given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings of ``algorithm`` that are not default; ConfigError naming an unknown key or a bad value."""
    known, kept = PARAMETERS[algorithm], {}
    for key, value in (given or {}).items():
        if key not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ConfigError(
                f"algorithm_settings.{key}: {algorithm} has no such setting ({has}){nearest(str(key), known)}"
            )
        row = known[key]
        accepted = (int,) if row.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, accepted) or not row.low <= value <= row.high:
            what = "a whole number" if row.kind is int else "a number"
            raise ConfigError(
                f"algorithm_settings.{key}={value!r}: {algorithm} takes {what} from {row.low:g} to "
                f"{row.high:g}; the default is {row.default}"
            )
        if row.kind(value) != row.default:
            kept[key] = row.kind(value)
    start, stop = ({**_defaults(algorithm), **kept}.get(f"{k}_multiplier", 0) for k in ("start", "stop"))
    if start > stop:
        raise ConfigError(
            f"algorithm_settings.start_multiplier={start}: it lies above stop_multiplier={stop}; lower it"
        )
    return kept


def _defaults(algorithm: str) -> dict[str, Any]:
    return {key: row.default for key, row in PARAMETERS[algorithm].items() if row.default is not None}


def library_algorithm(
    algorithm: str, settings: Mapping[str, Any] | None, block: int | None = None
) -> str | dict[str, Any]:
    """The ``algorithm`` of ModelOpt's config: a name, or a mapping that spells every setting out."""
    if algorithm == "max":
        return algorithm
    told = {"method": algorithm, **_defaults(algorithm), **(settings or {})}
    if algorithm == "local_hessian":
        told = {"block_size": block, **told, "fp8_scale_sweep": False}  # the sweep is for NVFP4 and skips all others
    return told


def without_effect(algorithm: str, weight: str, activation_bits: object) -> str:
    """Why ``algorithm`` would silently be ``max`` (or another algorithm) for these formats; "" where it works.

    Args:
        weight: half of a ``quant_type``.
        activation_bits: ``num_bits`` of the activations' quantizer; None without one.
    """
    if algorithm == "smoothquant" and (weight != "INT8" or activation_bits != 8):
        return (
            "it smooths INT8 activations into INT8 weights, and ModelOpt skips all others in silence; set "
            "dtype=int8 and activation_dtype=int8, or algorithm=awq_lite"
        )
    if algorithm in CLIPPING and weight == "FP8":
        alone = "max" if algorithm == "awq_clip" else "awq_lite"
        return (
            f"it clips blocks of integers and of NVFP4; FP8 has none, and ModelOpt would do {alone} in silence; "
            f"set algorithm={alone}"
        )
    if algorithm == "mse" and weight in ("INT8", "FP8"):
        return (
            "with 8 bits no smaller scale than the maximum's has a smaller error, so that it would be max in "
            "silence; set algorithm=max, or dtype=int4"
        )
    if algorithm == "gptq" and weight == "INT2":
        return (
            "the errors that it carries from column to column outgrow weights of 2 bits; set algorithm=awq_full, "
            "or dtype=int3"
        )
    if algorithm != "max" and weight in ("MXFP8", "MXFP4"):
        return f"the scales of {weight} are powers of two that follow each block's maximum; set algorithm=max"
    if algorithm in ("mse", "local_hessian", "gptq") and weight == "NVFP4":
        return "ModelOpt has it for NVFP4 with static blocks only, which it does not pack; set algorithm=awq_full"
    return ""
