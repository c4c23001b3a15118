"""What a layer of ggml's blocks occupies."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quantlab.backends.gguf.blocks import block_size
from quantlab.backends.gguf.config import GGUFQuantizationConfig
from quantlab.backends.gguf.mixes import embedding_format, format_of, head_format, measures
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes

_HEAD, _EMBEDDING = "lm_head", "embed_tokens"


def file_bytes(config: GGUFQuantizationConfig, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Bytes of the tensors in the file that llama.cpp's ``quantize`` writes of a language model; None without a file
    type.

    ``shapes`` are of all parameters, by name; one that is tied to another is named once. Matrices are stored by the
    file type's rules, everything else in float32.
    """
    kind = config.file_type
    if kind is None:
        return None
    matrices = {name: shape for name, shape in shapes.items() if len(shape) > 1}
    model, heads = measures(matrices), [name for name in matrices if name.startswith(_HEAD)]
    total = sum(4 * math.prod(shape) for name, shape in shapes.items() if name not in matrices)
    for name, shape in matrices.items():
        columns, rows = shape[-1], math.prod(shape[:-1])
        if name in heads or (not heads and _EMBEDDING in name):
            stored = head_format(kind, columns)
        else:
            stored = embedding_format(kind, columns) if _EMBEDDING in name else format_of(kind, name, columns, model)
        block, num_bytes = (1, 2) if stored == "float16" else block_size(stored)
        total += rows * (columns // block) * num_bytes
    return total


def layer_bytes(
    config: GGUFQuantizationConfig, layer: DenseLayer, dtype: str, compute_dtype: str, device: str
) -> StoredBytes:
    """Whole blocks a row, with their scales in them."""
    block, num_bytes = block_size(dtype)
    return StoredBytes(codes=layer.rows * (layer.columns // block) * num_bytes, scales=0, bias_dtype=layer.bias_dtype)
