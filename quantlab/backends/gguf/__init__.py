"""GGUF: ggml's block formats, written by libgguf (byte for byte what ggml writes) and read by every GGUF reader.

Stored bytes of a layer are exactly ``n / block * bytes_per_block`` for n weights (``gguf.GGML_QUANT_SIZES``). Layers
dequantize at every forward: the format saves memory, not time.
"""

from __future__ import annotations

from quantlab.backends.gguf.config import GGUFQuantizationConfig, resolve
from quantlab.backends.gguf.export import check_export, export
from quantlab.backends.gguf.imatrix import InputSquares, read_imatrix, write_imatrix
from quantlab.backends.gguf.kernels import logits_of, own_kernels
from quantlab.backends.gguf.quantize import adopt, calibrate, owns, quantize, read_back, write_calibration
from quantlab.backends.gguf.sizes import file_bytes, layer_bytes
from quantlab.backends.gguf.storage import load, save

Config = GGUFQuantizationConfig

__all__ = [
    "Config",
    "GGUFQuantizationConfig",
    "InputSquares",
    "adopt",
    "calibrate",
    "check_export",
    "export",
    "file_bytes",
    "layer_bytes",
    "load",
    "logits_of",
    "own_kernels",
    "owns",
    "quantize",
    "read_back",
    "read_imatrix",
    "resolve",
    "save",
    "write_calibration",
    "write_imatrix",
]
