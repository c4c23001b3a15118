"""Bytes before there are tensors: what a layer is made of, and what a backend stores of it. Torch-free.

Every backend has one function ``layer_bytes`` beside its own code; it is the only arithmetic of stored bytes, and
``tests/contract/test_planned_bytes.py`` compares it with :func:`quantlab.modules.memory.layer_memory` of real layers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from quantlab.vocabulary.dtypes import DTYPES


@dataclass(frozen=True, kw_only=True)
class DenseLayer:
    """A layer with a weight, unquantized."""

    shape: tuple[int, ...]
    """Of its weight: (out_features, in_features), behind them the sides of a convolution's kernel."""
    dtype: str
    """Of its weight."""
    bias_dtype: str = ""
    """"": it has no bias."""

    @property
    def rows(self) -> int:
        """Outputs: each has a row of weights."""
        return self.shape[0]

    @property
    def columns(self) -> int:
        """Weights of a row."""
        return math.prod(self.shape[1:])

    @property
    def numel(self) -> int:
        """Weights."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class StoredBytes:
    """What a quantized layer holds, as :func:`~quantlab.modules.memory.layer_memory` counts it; and its bias."""

    codes: int
    scales: int
    """Scales, zero points, code tables, and what the library keeps beside them."""
    bias_dtype: str
    """What the backend leaves the bias in; "": there is none."""
    is_simulated: bool = False
    """True where the storage is wider than the dtype's name says."""


def item_bytes(dtype: str) -> int:
    """Bytes of one number of a plain tensor, by the name of its torch dtype."""
    known = {"float64": 8, "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1}
    known |= {"float8_e4m3fn": 1, "float8_e5m2": 1}
    return known[dtype] if dtype in known else math.ceil(DTYPES[dtype].bits / 8)


def plain_bytes(layer: DenseLayer, dtype: str) -> int:
    """Bytes of the layer's weight as a plain tensor of another dtype."""
    return layer.numel * item_bytes(dtype)
