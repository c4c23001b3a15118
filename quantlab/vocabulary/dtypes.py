"""The stored weight formats, by their usual names. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

_RCEIL = "rounded up, so that no weight is cut (RCEIL; OCP's own rule rounds it down)"


@dataclass(frozen=True)
class Dtype:
    """One stored weight format: its payload bits per weight (scales not counted), what it is, and how it rounds."""

    name: str
    bits: float
    description: str
    rel_error: float
    """Largest rounding error of a weight as a share of the weight itself: half a unit in the last place of a float."""
    max_error: float
    """The part that is a share of the largest weight under the same scale: half of the widest gap between two codes,
    or a whole step where the code of the largest is cut off."""


def _table(*rows: tuple[str, float, str, float, float]) -> dict[str, Dtype]:
    return {row[0]: Dtype(*row) for row in rows}


DTYPES: dict[str, Dtype] = _table(
    ("float32", 32, "IEEE single precision", 2**-24, 0),
    ("bfloat16", 16, "8 exponent bits, 7 mantissa bits", 2**-8, 0),
    ("float16", 16, "IEEE half precision", 2**-11, 0),
    ("int8", 8, "8-bit integers and a scale", 0, 1 / 254),
    ("int4", 4, "4-bit integers and a scale per group", 0, 1 / 14),
    ("int3", 3, "3-bit integers and a scale per group", 0, 1 / 6),
    ("int2", 2, "2-bit integers and a scale per group", 0, 1 / 2),
    ("nf4", 4, "16 quantiles of a normal distribution, a scale per block (QLoRA, arXiv 2305.14314)", 0, 0.152),
    ("fp4", 4, "4-bit float (e2m1) and a scale per block", 0, 1 / 6),
    ("float8_e4m3", 8, "8-bit float, 4 exponent bits, no infinities (arXiv 2209.05433)", 2**-4, 2**-10 / 448),
    ("float8_e5m2", 8, "8-bit float, 5 exponent bits (arXiv 2209.05433)", 2**-3, 2**-17 / 57344),
    ("mxfp8", 8, f"OCP microscaling: e4m3 in blocks of 32 with a power-of-two scale, {_RCEIL}", 2**-4, 2**-9 / 448),
    ("mxfp4", 4, f"OCP microscaling: e2m1 in blocks of 32 with a power-of-two scale, {_RCEIL}", 1 / 4, 1 / 12),
    ("nvfp4", 4, "e2m1 in blocks of 16 with an e4m3 scale", 1 / 4, 1 / 24),
    ("q8_0", 8, "ggml: blocks of 32, 8-bit integers, fp16 scale", 0, 1 / 254),
    ("q6_k", 6, "ggml K-quant: superblocks of 256", 0, 1 / 32),
    ("q5_k", 5, "ggml K-quant: superblocks of 256", 0, 1 / 31),
    ("q4_k", 4, "ggml K-quant: superblocks of 256", 0, 1 / 15),
    ("q3_k", 3, "ggml K-quant: superblocks of 256", 0, 1 / 4),
    ("q2_k", 2, "ggml K-quant: superblocks of 256", 0, 1 / 3),
    ("q5_0", 5, "ggml: blocks of 32, symmetric", 0, 1 / 16),
    ("q5_1", 5, "ggml: blocks of 32, scale and minimum", 0, 1 / 31),
    ("q4_0", 4, "ggml: blocks of 32, symmetric", 0, 1 / 8),
    ("q4_1", 4, "ggml: blocks of 32, scale and minimum", 0, 1 / 15),
    ("iq4_nl", 4, "ggml: blocks of 32, non-linear codebook", 0, 1 / 8),
    ("iq4_xs", 4, "ggml: superblocks of 256, non-linear codebook", 0, 1 / 8),
)

E4M3_SCALE = 2**-10 / 448
"""What a block's scale in e4m3 loses, as a share of the largest weight of the tensor (nvfp4)."""
FLOAT16_SCALE = 2**-25
"""The largest error of a number that float16 holds below its normal range: the floor of what such a scale says."""

TORCH_DTYPE_NAMES = (
    "float64",
    "float32",
    "bfloat16",
    "float16",
    "float8_e4m3fn",
    "float8_e5m2",
    "int64",
    "int32",
    "int16",
    "int8",
    "uint8",
    "bool",
)
COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
UNREAD = "unread"
"""What stands for the format of a layer of a checkpoint that no backend decodes."""


def dtype_name(value: object) -> str:
    """``torch.bfloat16``, ``"torch.bfloat16"`` or ``"bfloat16"`` -> ``"bfloat16"``; nothing is imported."""
    return str(value).removeprefix("torch.")
