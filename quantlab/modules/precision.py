"""The switches of torch that change numbers on a GPU: set for reference and candidates alike, recorded, put back.

By default torch convolves float32 in TF32 (10 bits of mantissa) and lets cuDNN choose its algorithm by what was fastest
this time: a float32 reference would be none, and the next run another. On a CPU they change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict


class Precision(TypedDict):
    """torch's switches, by their own names."""

    matmul_allow_tf32: bool
    cudnn_allow_tf32: bool
    cudnn_deterministic: bool
    cudnn_benchmark: bool
    float32_matmul_precision: str


def precision() -> Precision:
    """How the switches stand."""
    import torch

    return {
        "matmul_allow_tf32": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


@contextmanager
def exact_arithmetic(deterministic: bool = True) -> Iterator[None]:
    """While open float32 is float32, and, with ``deterministic``, cuDNN takes the same algorithm each time."""
    before = precision()
    exact: Precision = {
        "matmul_allow_tf32": False,
        "cudnn_allow_tf32": False,
        "cudnn_deterministic": deterministic or before["cudnn_deterministic"],
        "cudnn_benchmark": before["cudnn_benchmark"] and not deterministic,
        "float32_matmul_precision": "highest",
    }
    _set(exact)
    try:
        yield
    finally:
        _set(before)


def _set(switches: Precision) -> None:
    import torch

    torch.set_float32_matmul_precision(switches["float32_matmul_precision"])
    torch.backends.cuda.matmul.allow_tf32 = switches["matmul_allow_tf32"]
    torch.backends.cudnn.allow_tf32 = switches["cudnn_allow_tf32"]
    torch.backends.cudnn.deterministic = switches["cudnn_deterministic"]
    torch.backends.cudnn.benchmark = switches["cudnn_benchmark"]
