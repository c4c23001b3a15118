"""What a layer of optimum-quanto occupies."""

from __future__ import annotations

from quantlab.backends.quanto.config import QuantoConfig
from quantlab.vocabulary.dtypes import DTYPES
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes, item_bytes

_GROUP, _SMALLEST_GROUP = 128, 32


def layer_bytes(config: QuantoConfig, layer: DenseLayer, dtype: str, compute_dtype: str, device: str) -> StoredBytes:
    """Codes, a scale a row (8 bits) or a scale and a zero point a group, and a scale each for inputs and outputs.

    Scales and zero points are of the dtype that the layer computes in, and so is its bias.
    """
    bits, item = int(DTYPES[dtype].bits), item_bytes(compute_dtype)
    bias_dtype = compute_dtype if layer.bias_dtype else ""
    if bits == 8:
        return StoredBytes(codes=layer.numel, scales=item * (layer.rows + 2), bias_dtype=bias_dtype)
    group = _group_size(layer.columns)
    per_row = layer.columns // group
    # a packed byte holds codes of rows that are a half or a quarter of the grouped weight apart
    num_rows = layer.rows * per_row
    codes = -(-num_rows * bits // 8) * group
    return StoredBytes(codes=codes, scales=item * (2 * num_rows + 2), bias_dtype=bias_dtype)


def _group_size(columns: int) -> int:
    """The library's own: 128, or the next smaller multiple of 32 that divides a row; else the whole row."""
    group = _GROUP
    if columns <= group:
        return columns
    while columns % group and group > _SMALLEST_GROUP:
        group -= 32
    return columns if columns % group else group
