"""bitsandbytes: LLM.int8 (arXiv 2208.07339) and 4-bit nf4 / fp4 blocks (QLoRA, arXiv 2305.14314).

Stored bytes of a layer with n weights and o rows, blocks of b: 4 bit ``ceil(n/2) + 4 ceil(n/b) + 64``; with double
quantization ``ceil(n/2) + ceil(n/b) + 4 ceil(ceil(n/b)/256) + 64 + 1024 + 4``; int8 ``n + 4 o``.
"""

from __future__ import annotations

from quantlab.backends.bitsandbytes.config import BitsAndBytesConfig
from quantlab.backends.bitsandbytes.quantize import adopt, quantize, read_back, resolve
from quantlab.backends.bitsandbytes.sizes import layer_bytes
from quantlab.backends.bitsandbytes.storage import as_stored, load, save

Config = BitsAndBytesConfig
DIFFUSERS_NEEDS_GPU = True
"""Its loader refuses machines without one, which the library itself runs on."""

__all__ = [
    "BitsAndBytesConfig",
    "Config",
    "adopt",
    "as_stored",
    "layer_bytes",
    "load",
    "quantize",
    "read_back",
    "resolve",
    "save",
]
