"""What a layer of bitsandbytes occupies."""

from __future__ import annotations

import math

from quantlab.backends.bitsandbytes.config import LIBRARY_BLOCKSIZE, BitsAndBytesConfig
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes, item_bytes

_NESTED_BLOCK = 256
_CODE_TABLE_BYTES = 16 * 4
_NESTED_TABLE_BYTES = 256 * 4
_OFFSET_BYTES = 4


def layer_bytes(
    config: BitsAndBytesConfig, layer: DenseLayer, dtype: str, compute_dtype: str, device: str
) -> StoredBytes:
    """Codes; then a float32 scale a row (int8), or a block with the table of 16 values.

    With double quantization a scale is a byte, each 256 of them have a float32 scale of their own, and there are their
    mean and a table of 256 values: for blocks of 64, 8/64 + 32/(64 * 256) = 0.127 bits a weight (arXiv 2305.14314, 3).
    """
    if config.load_in_8bit:
        return StoredBytes(codes=layer.numel, scales=4 * layer.rows, bias_dtype=layer.bias_dtype)
    num_blocks = math.ceil(layer.numel / (config.bnb_4bit_blocksize or LIBRARY_BLOCKSIZE))
    scales = 4 * num_blocks + _CODE_TABLE_BYTES
    if config.bnb_4bit_use_double_quant:
        nested = 4 * math.ceil(num_blocks / _NESTED_BLOCK) + _NESTED_TABLE_BYTES + _OFFSET_BYTES
        scales = num_blocks + nested + _CODE_TABLE_BYTES
    unit = item_bytes(config.bnb_4bit_quant_storage)
    codes = math.ceil(layer.numel / 2 / unit) * unit
    return StoredBytes(codes=codes, scales=scales, bias_dtype=layer.bias_dtype)
