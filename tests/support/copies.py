"""Quantized copies of a small stack of layers, by any backend."""

import copy

import torch
from torch import nn

from quantlab.modules.feed import feed_of_batches
from quantlab.stages.calibrate import calibrate_component
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_layers
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES, the_scheme


def net(dtype=torch.float32):
    torch.manual_seed(0)
    layers = (nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.Linear(256, 64))
    return nn.Sequential(*layers).eval().requires_grad_(False).to(dtype)


def inputs(num=5):
    return torch.randn(num, 256, generator=torch.Generator().manual_seed(1))


def quantized(module, backend, dtype, calibration=None, settings=None, **axes):
    """A quantized copy of the module, and its report."""
    scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype, **axes), settings)
    compute = axes.get("compute_dtype", CAPABILITIES[backend][dtype].compute_dtypes[0])
    request = QuantizationRequest(component="model", scheme=scheme, compute_dtype=compute, device="cpu")
    made = copy.deepcopy(module)
    selection = select_layers(request, made)
    calibrated = None
    if scheme.native.needs_data:
        calibrated = calibrate_component(request, made, selection, feed_of_batches(calibration))
    return quantize_component(request, made, module, selection, calibrated)
