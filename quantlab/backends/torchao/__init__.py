"""torchao: integers of 8 to 2 bits, 8-bit floats, and prototypes of nf4, nvfp4 and the MX formats.

Weights become tensor subclasses inside the same ``nn.Linear``. Integers below 8 bits are kept one to a byte except on
CUDA, where int4 has a packed kernel, and on a CPU with ``int4_packing_format=opaque``; ``read_back`` says so. AWQ,
SmoothQuant and static activation scales are measured on data (``calibrate``).
"""

from __future__ import annotations

from quantlab.backends.torchao.config import TorchAoConfig
from quantlab.backends.torchao.quantize import build_ao_config, calibrate, check_layers, quantize, resolve
from quantlab.backends.torchao.readback import read_back
from quantlab.backends.torchao.sizes import layer_bytes
from quantlab.backends.torchao.storage import as_stored, flattened, load, save

Config = TorchAoConfig

__all__ = [
    "Config",
    "TorchAoConfig",
    "as_stored",
    "build_ao_config",
    "calibrate",
    "check_layers",
    "flattened",
    "layer_bytes",
    "load",
    "quantize",
    "read_back",
    "resolve",
    "save",
]
