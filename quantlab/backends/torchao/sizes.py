"""What a layer of torchao occupies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantlab.backends.torchao.config import TorchAoConfig, layer_form
from quantlab.backends.torchao.forms import INT4, INT8_INTX, INTX
from quantlab.backends.torchao.rules import FLOAT8_STATIC, INT8_STATIC, OPAQUE
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes, item_bytes

_NF4_BLOCK, _NF4_NESTED_BLOCK, _NF4_CODES = 64, 256, 16
_TILE_COLUMNS, _TILE_ROWS = 1024, 8  # what tinygemm's layout is padded to


def layer_bytes(config: TorchAoConfig, layer: DenseLayer, dtype: str, compute_dtype: str, device: str) -> StoredBytes:
    """Codes, one to a byte but in packed int4, nf4, mxfp4 and nvfp4; and what stands beside them, by tensor class."""
    form = layer_form(config, layer.columns)
    kind, data = form["_type"], form["_data"]
    packed = kind in (OPAQUE, "NF4WeightOnlyConfig", "NVFP4WeightOnlyConfig") or dtype == "mxfp4"
    codes, item = layer.numel // 2 if packed else layer.numel, item_bytes(compute_dtype)
    num_groups = 1 if kind == FLOAT8_STATIC else _groups(form, layer)
    if kind == INT4:  # tile-packed: a scale and a zero point of bfloat16 a group
        columns = -(-layer.columns // _TILE_COLUMNS) * _TILE_COLUMNS
        rows = -(-layer.rows // _TILE_ROWS) * _TILE_ROWS
        codes, scales = rows * columns // 2, 2 * 2 * rows * columns // data["group_size"]
    elif kind == OPAQUE:
        scales = 2 * item * num_groups
    elif kind == "NF4WeightOnlyConfig":
        scales = _nf4_scales(layer, item)
    elif kind == "NVFP4WeightOnlyConfig":
        scales = _swizzled(layer, 16) + 4
    elif kind == "MXDynamicActivationMXWeightConfig":
        scales = _swizzled(layer, data["block_size"])
    elif dtype == "int8":
        scales = (4 + 1) * num_groups  # float32, and a zero point
    elif dtype.startswith("float8"):
        scales = 4 * num_groups
    else:
        scales = (item + 1) * num_groups
    scales += _for_inputs(config, layer, kind, item)
    is_simulated = kind in (INTX, INT8_INTX) and dtype != "int8"  # a code to a byte
    bias_dtype = compute_dtype if layer.bias_dtype else ""
    return StoredBytes(codes=codes, scales=scales, bias_dtype=bias_dtype, is_simulated=is_simulated)


def _groups(form: Mapping[str, Any], layer: DenseLayer) -> int:
    data = form["_data"]
    if "group_size" in data and data["group_size"]:
        return layer.rows * (layer.columns // int(data["group_size"]))
    of = data.get("granularity") or data.get("weight_granularity") or {}
    of = of if isinstance(of, Mapping) else of[-1]  # that of the inputs, and the weight's
    if of.get("_type") == "PerTensor":
        return 1
    size = (of.get("_data") or {}).get("group_size")
    return layer.rows * (layer.columns // int(size) if size else 1)


def _nf4_scales(layer: DenseLayer, item: int) -> int:
    """A byte a block of 64; each 256 of these have a scale of their own; their mean; the table of 16 values."""
    num_blocks = layer.numel // _NF4_BLOCK
    num_nested = num_blocks // _NF4_NESTED_BLOCK
    kept = _NF4_NESTED_BLOCK if num_nested == 1 else num_nested  # a single one is a view into those it was chosen from
    return num_blocks + item * (kept + _NF4_CODES + 1)


def _swizzled(layer: DenseLayer, block: int) -> int:
    """A byte a block, padded to tiles of 128 rows and 4 columns (cuBLAS)."""
    return -(-layer.rows // 128) * 128 * (-(-(layer.columns // block) // 4) * 4)


def _for_inputs(config: TorchAoConfig, layer: DenseLayer, kind: str, item: int) -> int:
    """What calibration leaves beside a weight: a scale a column, and a float32 scale for all inputs."""
    columns = item * layer.columns if config.algorithm in ("awq", "smoothquant") else 0
    return columns + (4 if kind in (INT8_STATIC, FLOAT8_STATIC) else 0)
