"""The stored weight formats, by their usual names. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """One stored weight format: its payload bits per weight (scales not counted) and what it is."""

    name: str
    bits: float
    description: str


def _table(*rows: tuple[str, float, str]) -> dict[str, Dtype]:
    return {name: Dtype(name, bits, description) for name, bits, description in rows}


DTYPES: dict[str, Dtype] = _table(
    ("float32", 32, "IEEE single precision"),
    ("bfloat16", 16, "8 exponent bits, 7 mantissa bits"),
    ("float16", 16, "IEEE half precision"),
    ("int8", 8, "8-bit integers and a scale"),
    ("int4", 4, "4-bit integers and a scale per group"),
    ("int3", 3, "3-bit integers and a scale per group"),
    ("int2", 2, "2-bit integers and a scale per group"),
    ("nf4", 4, "16 quantiles of a normal distribution, a scale per block (QLoRA, arXiv 2305.14314)"),
    ("fp4", 4, "4-bit float (e2m1) and a scale per block"),
    ("float8_e4m3", 8, "8-bit float, 4 exponent bits, no infinities (arXiv 2209.05433)"),
    ("float8_e5m2", 8, "8-bit float, 5 exponent bits (arXiv 2209.05433)"),
    ("mxfp8", 8, "OCP microscaling: e4m3 in blocks of 32 with a power-of-two scale"),
    ("mxfp4", 4, "OCP microscaling: e2m1 in blocks of 32 with a power-of-two scale"),
    ("nvfp4", 4, "e2m1 in blocks of 16 with an e4m3 scale"),
    ("q8_0", 8, "ggml: blocks of 32, 8-bit integers, fp16 scale"),
    ("q6_k", 6, "ggml K-quant: superblocks of 256"),
    ("q5_k", 5, "ggml K-quant: superblocks of 256"),
    ("q4_k", 4, "ggml K-quant: superblocks of 256"),
    ("q3_k", 3, "ggml K-quant: superblocks of 256"),
    ("q2_k", 2, "ggml K-quant: superblocks of 256"),
    ("q5_0", 5, "ggml: blocks of 32, symmetric"),
    ("q5_1", 5, "ggml: blocks of 32, scale and minimum"),
    ("q4_0", 4, "ggml: blocks of 32, symmetric"),
    ("q4_1", 4, "ggml: blocks of 32, scale and minimum"),
    ("iq4_nl", 4, "ggml: blocks of 32, non-linear codebook"),
    ("iq4_xs", 4, "ggml: superblocks of 256, non-linear codebook"),
)

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


def dtype_name(value: object) -> str:
    """``torch.bfloat16``, ``"torch.bfloat16"`` or ``"bfloat16"`` -> ``"bfloat16"``; nothing is imported."""
    return str(value).removeprefix("torch.")
