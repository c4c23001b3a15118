"""optimum-quanto: 8-, 4- and 2-bit weights with a scale a row or a group, in pure PyTorch.

The library chooses the group size itself: 2 and 4 bits use 128, lowered by 32 until it divides in_features (32 at
least), one scale a row where in_features is 128 or less or nothing divides. Weights are kept in the library's
kernel-agnostic packing: its packings for one kernel round the shifts in bfloat16, refuse some shapes
(out_features % 16) and need a CUDA compiler. A quantized model cannot be deep-copied: copy it before.

Activations are the inputs of the layers, in 8 bits with one scale a layer, a running mean of the largest magnitudes
of the calibration batches. Outputs are never quantized: the library would do it only where another of its layers
takes them unchanged, which quantizes them itself, and tensors of its own class would reach the rest of the model.
"""

from __future__ import annotations

from quantlab.backends.quanto.config import QuantoConfig
from quantlab.backends.quanto.quantize import adopt, calibrate, quantize, read_back, resolve
from quantlab.backends.quanto.sizes import layer_bytes
from quantlab.backends.quanto.storage import as_stored, check_stored, load, save

Config = QuantoConfig

__all__ = [
    "Config",
    "QuantoConfig",
    "adopt",
    "as_stored",
    "check_stored",
    "calibrate",
    "layer_bytes",
    "load",
    "quantize",
    "read_back",
    "resolve",
    "save",
]
