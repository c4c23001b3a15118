"""What a layer of ggml's blocks occupies."""

from __future__ import annotations

from quantlab.backends.gguf.blocks import block_size
from quantlab.backends.gguf.config import GGUFQuantizationConfig
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes


def layer_bytes(
    config: GGUFQuantizationConfig, layer: DenseLayer, dtype: str, compute_dtype: str, device: str
) -> StoredBytes:
    """Whole blocks a row, with their scales in them."""
    block, num_bytes = block_size(dtype)
    return StoredBytes(codes=layer.rows * (layer.columns // block) * num_bytes, scales=0, bias_dtype=layer.bias_dtype)
