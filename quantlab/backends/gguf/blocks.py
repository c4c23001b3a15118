"""ggml's blocks: encoding, decoding, and the layer that keeps them."""

from __future__ import annotations

import functools
import math
import queue
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

from quantlab.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import Tensor, nn

    class GGUFLinear(nn.Module):
        """What :func:`linear_class` makes, as far as others use it."""

        qweight: Tensor
        gguf_type: str
        compute_dtype: torch.dtype
        out_features: int
        in_features: int

        def __init__(self, codes: Tensor, gguf_type: str, bias: Tensor | None, compute_dtype: torch.dtype) -> None: ...
        def dequantize(self, dtype: torch.dtype | None = None) -> Tensor: ...

    LinearClass = type[GGUFLinear]

WEIGHTS_PER_SCALE = {
    "q8_0": 32,
    "q5_0": 32,
    "q5_1": 32,
    "q4_0": 32,
    "q4_1": 32,
    "iq4_nl": 32,
    "q6_k": 16,
    "q5_k": 32,
    "q4_k": 32,
    "q3_k": 16,
    "q2_k": 16,
    "iq4_xs": 32,
}
"""The block that has a scale of its own; in the 256-weight superblocks these scales are themselves 4 to 8 bits."""

_WEIGHTS_AT_ONCE = 1 << 20
SUPERBLOCK = 256
SCALES: dict[str, tuple[int, float | None]] = {
    "q8_0": (127, None),
    "q5_0": (16, None),
    "q5_1": (31 + 1, None),
    "q4_0": (8, None),
    "q4_1": (15 + 1, None),
    "iq4_nl": (127, None),
    "q6_k": (32 * 127, 0.5 / 127),
    "q5_k": ((31 + 1) * 63, 1.5 / 63),
    "q4_k": ((15 + 1) * 63, 1.5 / 63),
    "q3_k": (4 * 31, 0.5 / 31),
    "q2_k": ((3 + 1) * 15, 1.5 / 15),
    "iq4_xs": (127 * 31, 0.5 / 31),
}
"""Type -> by how much its codes multiply the float16 scale (and minimum), and for superblocks the error of a block's
own integer scale (and minimum) as a share of the superblock's largest weight."""


def block_size(gguf_type: str) -> tuple[int, int]:
    """(weights, bytes) of one block."""
    import gguf

    sizes: tuple[int, int] = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[gguf_type.upper()]]
    return sizes


def encode(name: str, weight: Tensor, gguf_type: str, importance: NDArray[np.float32] | None = None) -> Tensor:
    """A weight (out_features, in_features) as blocks: uint8 tensor (out_features, bytes of a row), on its device.

    ``importance``: float32 array (in_features,), how much each input channel's error counts; None: all the same.
    Raises ConfigError where rows do not divide into blocks, ModelError where the format cannot hold the weights.
    """
    import libgguf
    import numpy as np
    import torch

    block, num_bytes = block_size(gguf_type)
    if weight.shape[1] % block:
        raise ConfigError(
            f"dtype={gguf_type}: {name} of shape {tuple(weight.shape)}: in_features {weight.shape[1]} "
            f"does not divide by {block}; exclude it with modules_to_not_convert or choose another dtype"
        )
    kind = libgguf.GGMLQuantizationType[gguf_type.upper()]
    num_rows, columns = weight.shape
    codes = torch.empty(num_rows, columns // block * num_bytes, dtype=torch.uint8)
    step = _rows_at_once(weight.shape, torch.get_num_threads())
    rooms: queue.SimpleQueue[Tensor] = queue.SimpleQueue()  # a piece's memory serves the next: new pages take as long

    def write(rows: Tensor, own: Tensor) -> None:
        try:
            room = rooms.get_nowait()
        except queue.Empty:
            room = torch.empty(step, columns)
        dense = room[: len(rows)].copy_(rows)
        low, high = map(float, dense.aminmax())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ModelError(f"{name}.weight: holds NaN or infinities; exclude the layer with modules_to_not_convert")
        libgguf.quantize_rows_into_raw(kind, dense.numpy(), own.numpy(), *dense.shape, importance)
        if max(-low, high) > 65504 and not np.isfinite(libgguf.dequantize_rows(own.numpy(), kind)).all():
            raise ModelError(
                f"{name}.weight: holds weights too large for the float16 scales of {gguf_type}; "
                "exclude the layer with modules_to_not_convert"
            )
        rooms.put(room)

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # rows are independent
        list(pool.map(write, torch.split(weight.detach(), step), torch.split(codes, step)))
    return codes.to(weight.device)


def _rows_at_once(shape: Sequence[int], num_threads: int) -> int:
    """Rows of a piece: a share for each thread, and no more than a few megabytes in float32."""
    rows, columns = shape
    return max(1, min(-(-rows // num_threads), _WEIGHTS_AT_ONCE // columns))


def decode(codes: Tensor, gguf_type: str, dtype: torch.dtype | None = None) -> Tensor:
    """Blocks (out_features, bytes of a row) -> weight (out_features, in_features): the same values everywhere.

    ``dtype``: of the result, to which the float32 values are rounded; None: they stay as they are."""
    import torch

    if codes.device.type == "cpu":
        import libgguf

        kind = libgguf.GGMLQuantizationType[gguf_type.upper()]
        block, num_bytes = block_size(gguf_type)
        made = torch.empty(codes.shape[0], codes.shape[1] // num_bytes * block, dtype=dtype or torch.float32)
        step = _rows_at_once(made.shape, 1)
        room = None if made.dtype == torch.float32 else torch.empty(min(step, len(made)), made.shape[1])
        for rows, own in zip(torch.split(made, step), torch.split(codes.contiguous(), step), strict=True):
            into = rows if room is None else room[: len(rows)]
            libgguf.dequantize_rows_into_raw(kind, own.numpy(), into.numpy(), *into.shape)
            if room is not None:
                rows.copy_(into)
        return made
    from libgguf import libgguf_torch  # torch operations; exact when the scales are taken in fp32

    block, num_bytes = block_size(gguf_type)
    shape = (codes.shape[0], codes.shape[1] // num_bytes * block)
    kind = libgguf_torch.GGMLQuantizationType[gguf_type.upper()]
    dense: Tensor = libgguf_torch.dequantize(codes, kind, shape, dtype=torch.float32)
    return dense.to(dtype or torch.float32)


@functools.cache
def linear_class() -> LinearClass:
    """The layer's class, made at first use because its base needs torch."""
    import torch

    class GGUFLinear(torch.nn.Module):
        """A Linear whose weight is kept as ggml blocks: ``qweight``, uint8 (out_features, bytes of a row)."""

        qweight: Tensor

        def __init__(self, codes: Tensor, gguf_type: str, bias: Tensor | None, compute_dtype: torch.dtype) -> None:
            super().__init__()
            block, num_bytes = block_size(gguf_type)
            self.gguf_type = gguf_type
            self.compute_dtype = compute_dtype
            self.out_features = codes.shape[0]
            self.in_features = codes.shape[1] // num_bytes * block
            self.register_buffer("qweight", codes)
            self.bias = bias

        def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
            """The weight (out_features, in_features), in float32 or rounded to ``dtype``."""
            return decode(self.qweight, self.gguf_type, dtype)

        @property
        def weight(self) -> Tensor:
            """The weight in the compute dtype, made anew at each use: models look at the dtypes of their layers."""
            return self.dequantize(self.compute_dtype)

        def forward(self, input: Tensor) -> Tensor:
            """input (..., in_features) -> (..., out_features), in its dtype; named as ``nn.Linear`` names it."""
            bias = None if self.bias is None else self.bias.to(self.compute_dtype)
            return torch.nn.functional.linear(input.to(self.compute_dtype), self.weight, bias).to(input.dtype)

        def extra_repr(self) -> str:
            return f"in_features={self.in_features}, out_features={self.out_features}, {self.gguf_type}"

    GGUFLinear.__qualname__ = "GGUFLinear"  # found by pickle through __getattr__ below
    return cast("LinearClass", GGUFLinear)


def __getattr__(name: str) -> Any:
    if name == "GGUFLinear":
        return linear_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
