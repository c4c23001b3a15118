"""The mixes of GGUF files of diffusion models, in Diffusers' names of layers. Torch-free.

llama.cpp itself writes no such files. Those in circulation are made by its ``quantize`` with the patch of ComfyUI-GGUF
(``tools/lcpp.patch``: ``img_tensor_get_type`` and the rules for image models) from what ``tools/convert.py`` there
writes: the embedders of inputs, time, vectors and guidance, the final projection and small refiners keep 16 bits, what
has one dimension or at most 1,024 values is in float32, and only matrices inside the blocks are quantized. Files of
Flux, SD 3 and Z-Image hold queries, keys and values of a block as one tensor, which is of other rules.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

SMALL = 1024
"""Values up to which a tensor is in float32."""
WIDTH = 256
"""Values of a row into which the tensors of a UNet are rearranged, where their own rows do not divide by it."""
_BLOCKS = re.compile(r"(?:\w*_)?(?:blocks?|layers)\.")
"""How the paths begin of what stands in a model's blocks; refiners and embedders are called otherwise."""
_UNET = re.compile(r"(?:down|mid|up)_blocks?\.")
_FLOAT32 = ("scale_shift_table",)
"""Parameters that are in float32 whatever their size."""
_FUSED = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
_DOWN = re.compile(r"\.(?:ff|ffn)\.net\.2$|\.feed_forward\.w2$")
_JOINT, _SINGLE, _TOGETHER = "joint_transformer_blocks.", "single_transformer_blocks.", ".norm1_context."
_VALUES = {
    "q2_k": "q3_k",
    "q3_k_l": "q5_k",
    "q4_k_m": "q6_k",
    "q5_k_m": "q6_k",
}
_EARLY = {"q3_k_m": (2, "q5_k", "q4_k"), "q4_k_s": (4, "q5_k", "q4_k")}
"""File type -> of how many projections of values, the first by name, which format; and of the others."""
_QKV = {"q3_k_m": "q4_k", "q3_k_l": "q4_k", "q4_k_m": "q5_k", "q5_k_m": "q6_k"}
_DOWNS = {
    "q3_k_m": "q4_k",
    "q3_k_l": "q5_k",
    "q4_k_s": "q5_k",
    "q4_k_m": "q6_k",
    "q5_k_m": "q6_k",
    "q4_0": "q4_1",
    "q5_0": "q5_1",
}


def is_diffusion(paths: Iterable[str]) -> bool:
    """Whether the layers are of a model of Diffusers, by the names of its attention."""
    return any(leaf_of(path) == "to_v" for path in paths)


def has_fused_attention(paths: Iterable[str]) -> bool:
    """Whether the files of such a model hold queries, keys and values as one tensor."""
    names = list(paths)
    if any(path.startswith(_JOINT) for path in names):
        return False
    joined = any(path.startswith(_SINGLE) or _TOGETHER in path for path in names)
    return joined or any(".attention.to_v" in path for path in names)


def first_values(paths: Iterable[str]) -> tuple[str, ...]:
    """The first projections of values by name, as many as a rule speaks of."""
    values = sorted(path for path in paths if _is_value(path) and not is_kept(path))
    return tuple(values[: max(num for num, _, _ in _EARLY.values())])


def is_kept(path: str) -> bool:
    """Whether a layer stays in 16 bits: it stands outside of the blocks."""
    return _BLOCKS.match(path) is None


def diffusion_format(file_type: str, base: str, path: str, fused: bool, first: Sequence[str]) -> str:
    """The block format of a layer in a block; ``first`` are :func:`first_values` of its model."""
    path = path.removesuffix(".weight")
    if fused:
        parent = path.rpartition(".")[0].rpartition(".")[2]
        if leaf_of(path) in _FUSED and parent in ("attn", "attention") and not path.startswith(_SINGLE):
            return _QKV.get(file_type, base)
        is_down = path.endswith(".feed_forward.w2")  # the second layer of a Flux or SD 3 block has no rule
        return _DOWNS.get(file_type, base) if is_down else base
    if _is_value(path):
        if file_type in _EARLY:
            num, early, late = _EARLY[file_type]
            return early if path in first[:num] else late
        return _VALUES.get(file_type, base)
    return _DOWNS.get(file_type, base) if _DOWN.search(path) else base


def _is_value(path: str) -> bool:
    leaf = leaf_of(path)
    return leaf == "to_v" or (leaf == "add_v_proj" and path.startswith(_JOINT))


def leaf_of(path: str) -> str:
    return path.removesuffix(".weight").rpartition(".")[2]


# -- the file


def stored_width(path: str, shape: Sequence[int], is_unet: bool) -> int:
    """Values of a row of a tensor that is quantized; 0 for one that is not: it keeps 16 or 32 bits."""
    num = math.prod(shape)
    if len(shape) < 2 or num <= SMALL or is_kept(path) or leaf_of(path) in _FLOAT32:
        return 0
    if is_unet and num % WIDTH == 0 and shape[-1] % WIDTH:
        return WIDTH
    return shape[-1] if len(shape) == 2 else 0


def kept_bytes(path: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor that is not quantized."""
    num = math.prod(shape)
    is_float32 = len(shape) == 1 or num <= SMALL or leaf_of(path) in _FLOAT32
    return (4 if is_float32 else 2) * num


def is_unet(paths: Iterable[str]) -> bool:
    """Whether the layers are of a UNet, whose tensors are rearranged."""
    return any(_UNET.match(path) for path in paths)
