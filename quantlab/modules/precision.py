"""The switches of torch that change numbers on a GPU: set for reference and candidates alike, recorded, put back.

By default torch convolves float32 in TF32 (10 bits of mantissa) and lets cuDNN choose its algorithm by what was fastest
this time: a float32 reference would be none, and the next run another. On a CPU they change nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypedDict


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


def _leaves() -> list[Any]:
    """What has a switch by torch's newer name, ``fp32_precision``: each outweighs those above it and the older ones."""
    import torch

    backends: Any = torch.backends
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [backends.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn]


@contextmanager
def exact_arithmetic(deterministic: bool = True) -> Iterator[None]:
    """While open float32 is float32, and, with ``deterministic``, cuDNN takes the same algorithm each time."""
    before, leaves = _readable(), _leaves()
    said = [leaf.fp32_precision for leaf in leaves]
    exact: Precision = {
        "matmul_allow_tf32": False,
        "cudnn_allow_tf32": False,
        "cudnn_deterministic": deterministic or before["cudnn_deterministic"],
        "cudnn_benchmark": before["cudnn_benchmark"] and not deterministic,
        "float32_matmul_precision": "highest",
    }
    _set(exact)
    for leaf in leaves:
        leaf.fp32_precision = "ieee"
    try:
        yield
    finally:
        _set(before)
        for leaf, value in zip(leaves, said, strict=True):
            if leaf.fp32_precision != value:
                leaf.fp32_precision = value


@contextmanager
def own_modes() -> Iterator[None]:
    """While open no autocast, inference mode, default dtype, device or kernels of the caller's count: numbers are of
    the model, and what is kept of a run is everybody's. A number of threads that was set meanwhile ends with it."""
    import torch

    default, threads, plain = torch.get_default_dtype(), torch.get_num_threads(), contextlib.ExitStack()
    plain.enter_context(_usual_kernels())
    for kind in ("cpu", "cuda"):
        if torch.is_autocast_enabled(kind):
            plain.enter_context(torch.autocast(kind, enabled=False))
    if torch.is_inference_mode_enabled():
        plain.enter_context(torch.inference_mode(False))
    if torch.get_default_device() != torch.device("cpu"):
        plain.enter_context(torch.device("cpu"))
    torch.set_default_dtype(torch.float32)
    try:
        with plain:
            yield
    finally:
        torch.set_default_dtype(default)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)


@contextmanager
def _usual_kernels() -> Iterator[None]:
    """oneDNN, all kernels of attention, and the sums of 16-bit products as torch begins with them; no layer's own fast
    path, which reads its weights and so bypasses quantized layers."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    matmul: Any = torch.backends.cuda.matmul
    usual = [
        (torch.backends.mkldnn, "enabled", True),
        (matmul, "allow_fp16_accumulation", False),
        (matmul, "allow_fp16_reduced_precision_reduction", True),
        (matmul, "allow_bf16_reduced_precision_reduction", True),
    ]
    changed = [(owner, name, now) for owner, name, value in usual if (now := getattr(owner, name)) != value]
    is_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    for owner, name, value in changed:
        setattr(owner, name, not value)
    try:
        with sdpa_kernel([kind for kind in SDPBackend.__members__.values() if kind is not SDPBackend.ERROR]):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fast)
        for owner, name, value in changed:
            setattr(owner, name, value)


def _readable() -> Precision:
    """How the switches stand; torch does not tell one that was set by its newer name too, which then counts."""
    import torch

    with contextlib.suppress(RuntimeError):
        return precision()
    matmul, convolution, *_ = (leaf.fp32_precision == "tf32" for leaf in _leaves())
    return {
        "matmul_allow_tf32": matmul,
        "cudnn_allow_tf32": convolution,
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": "high" if matmul else "highest",
    }


def _set(switches: Precision) -> None:
    import torch

    torch.set_float32_matmul_precision(switches["float32_matmul_precision"])
    torch.backends.cuda.matmul.allow_tf32 = switches["matmul_allow_tf32"]
    torch.backends.cudnn.allow_tf32 = switches["cudnn_allow_tf32"]
    torch.backends.cudnn.deterministic = switches["cudnn_deterministic"]
    torch.backends.cudnn.benchmark = switches["cudnn_benchmark"]
