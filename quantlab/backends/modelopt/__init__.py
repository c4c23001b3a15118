"""NVIDIA ModelOpt: integers, 8-bit floats and the 4-bit block formats, simulated while calibrated, then packed.

The library inserts quantizers into a layer; in a second step its weight is packed with the scales that calibration
found, so that the packed weight is the simulated one (up to the rounding of the scales to the layer's dtype). A packed
layer cannot be deep-copied: copy the model before.
"""

from __future__ import annotations

from quantlab.backends.modelopt.calibrate import calibrate, check_layers
from quantlab.backends.modelopt.checkpointing import beside
from quantlab.backends.modelopt.config import NVIDIAModelOptConfig
from quantlab.backends.modelopt.library import prepare
from quantlab.backends.modelopt.quantize import quantize, read_back, resolve
from quantlab.backends.modelopt.quantizers import build_quant_cfg
from quantlab.backends.modelopt.sizes import layer_bytes
from quantlab.backends.modelopt.storage import load, save
from quantlab.vocabulary.native import QuantizationConfigMixin

Config: type[QuantizationConfigMixin] = NVIDIAModelOptConfig

__all__ = [
    "Config",
    "NVIDIAModelOptConfig",
    "beside",
    "build_quant_cfg",
    "calibrate",
    "check_layers",
    "layer_bytes",
    "load",
    "prepare",
    "quantize",
    "read_back",
    "resolve",
    "save",
]
