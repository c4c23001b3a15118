"""NVIDIA ModelOpt: integers, 8-bit floats and the 4-bit block formats, simulated while calibrated, then packed.

The library inserts quantizers into a layer and, in a second step, packs its weight; with algorithm ``max`` the packed
weight is the simulated one (up to the rounding of the scales to the layer's dtype). A packed layer cannot be
deep-copied: copy the model before.
"""

from __future__ import annotations

from quantlab.backends.modelopt.config import NVIDIAModelOptConfig, build_quant_cfg
from quantlab.backends.modelopt.quantize import load, quantize, read_back, resolve, save
from quantlab.config import QuantizationConfigMixin

Config: type[QuantizationConfigMixin] = NVIDIAModelOptConfig

__all__ = ["Config", "NVIDIAModelOptConfig", "build_quant_cfg", "load", "quantize", "read_back", "resolve", "save"]
