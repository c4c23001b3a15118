"""What a layer of ModelOpt occupies."""

from __future__ import annotations

from quantlab.backends.modelopt.algorithms import PARAMETERS, PRE_SCALED
from quantlab.backends.modelopt.config import NVIDIAModelOptConfig
from quantlab.backends.modelopt.quantizers import BLOCKS, is_packable, weight_cfg
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes, item_bytes

_FOUR_BIT = ("int4", "nvfp4", "mxfp4")
_IN_A_BYTE = ("int3", "int2")
"""Formats of fewer bits that are packed as 8."""


def layer_bytes(
    config: NVIDIAModelOptConfig, layer: DenseLayer, dtype: str, compute_dtype: str, device: str
) -> StoredBytes:
    """Codes, one to a byte but in packed 4 bits; scales, and beside them the maxima that they were made of.

    A weight that is not packed stays as it is, in the dtype that the layer computes in, with the maxima alone.
    """
    item, bias_dtype = item_bytes(compute_dtype), compute_dtype if layer.bias_dtype else ""
    cfg = weight_cfg(config, "layer", (layer.rows, layer.columns))
    blocks = cfg.get("block_sizes") or {}
    if (
        config.weight_type in BLOCKS
    ):  # their scales are in the packed weight, beside the maximum; nvfp4 has a float32 one
        codes = layer.numel // 2 if dtype in _FOUR_BIT else layer.numel
        whole = item + (4 if dtype == "nvfp4" else 0)
        return StoredBytes(codes=codes, scales=layer.numel // blocks[-1] + whole, bias_dtype=bias_dtype)
    num_scales = layer.rows * layer.columns // blocks[-1] if blocks else layer.rows if cfg.get("axis") == 0 else 1
    maxima, beside = 4 if blocks else item, _beside(config, layer, item)
    if not is_packable(config, cfg):
        codes, scales = layer.numel * item, maxima * num_scales + beside
        return StoredBytes(codes=codes, scales=scales, bias_dtype=bias_dtype, is_simulated=True)
    codes, scales = layer.numel // 2 if dtype in _FOUR_BIT else layer.numel, (item + maxima) * num_scales + beside
    return StoredBytes(codes=codes, scales=scales, bias_dtype=bias_dtype, is_simulated=dtype in _IN_A_BYTE)


def _beside(config: NVIDIAModelOptConfig, layer: DenseLayer, item: int) -> int:
    """What calibration leaves: a scale a column, a maximum of all inputs, a low-rank branch."""
    columns = layer.columns if config.algorithm in PRE_SCALED else 0
    inputs = 1 if config.activation_type and config.activation_scales == "static" else 0
    rank = 0
    if config.algorithm == "svdquant":
        rank = int((config.algorithm_settings or {}).get("lowrank", PARAMETERS["svdquant"]["lowrank"].default))
    return item * (columns + inputs + rank * (layer.rows + layer.columns))
