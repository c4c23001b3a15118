"""What a layer of ggml's blocks occupies."""

from __future__ import annotations

import math
from collections.abc import Mapping

from quantlab.backends.gguf.blocks import block_size
from quantlab.backends.gguf.config import GGUFQuantizationConfig
from quantlab.backends.gguf.diffusion_mixes import is_diffusion, is_unet, kept_bytes, stored_width
from quantlab.backends.gguf.mixes import embedding_format, format_of, head_format, measures
from quantlab.vocabulary.sizes import DenseLayer, StoredBytes

_HEAD, _EMBEDDING = "lm_head", "embed_tokens"


def file_bytes(config: GGUFQuantizationConfig, shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Bytes of the tensors in the file that llama.cpp's ``quantize`` writes of a model; None without a file type.

    ``shapes`` are of all that a checkpoint holds, by name; one that is tied to another is named once. Of a language
    model matrices are stored by the file type's rules, everything else in float32; of a diffusion model see
    :mod:`quantlab.backends.gguf.diffusion_mixes`, for a checkpoint in bfloat16 or float32.
    """
    kind = config.file_type
    if kind is None:
        return None
    if is_diffusion([name.removesuffix(".weight") for name in shapes]):
        return _diffusion_bytes(kind, shapes)
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


def _diffusion_bytes(kind: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    model, rearranged, total = measures(shapes), is_unet(shapes), 0
    for name, shape in shapes.items():
        path = name.removesuffix(".weight")
        width = stored_width(path, shape, rearranged)
        stored = format_of(kind, path, width, model) if width else ""
        if not width or stored == "float16":
            total += kept_bytes(path, shape)
            continue
        block, num_bytes = block_size(stored)
        total += math.prod(shape) // block * num_bytes
    return total


def layer_bytes(
    config: GGUFQuantizationConfig, layer: DenseLayer, dtype: str, compute_dtype: str, device: str
) -> StoredBytes:
    """Whole blocks a row, with their scales in them."""
    block, num_bytes = block_size(dtype)
    return StoredBytes(codes=layer.rows * (layer.columns // block) * num_bytes, scales=0, bias_dtype=layer.bias_dtype)
