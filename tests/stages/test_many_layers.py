"""A model of many layers (experts, one by one) takes a time that grows with their number, not with its square."""

import copy
import cProfile

import pytest
import torch
from torch import nn

from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest, select_layers
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import the_scheme

SCHEMES = {"bitsandbytes": "nf4", "torchao": "int8", "quanto": "int8", "gguf": "q8_0", "modelopt": "int8"}
FEW, MANY = 150, 600


def calls(num_layers, backend):
    """Calls of Python's functions while so many layers are quantized and read back."""
    torch.manual_seed(0)
    original = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(num_layers)))
    axes = QuantizationAxes(backend=backend, dtype=SCHEMES[backend])
    request = QuantizationRequest(component="model", scheme=the_scheme(axes), compute_dtype="float32", device="cpu")
    module = copy.deepcopy(original)
    with cProfile.Profile() as profile:
        quantize_component(request, module, original, select_layers(request, module))
    return sum(entry.callcount for entry in profile.getstats())


@pytest.mark.slow
@pytest.mark.parametrize("backend", SCHEMES)
def test_work_grows_with_the_number_of_layers(backend):
    calls(2, backend)  # imports, and what is made once
    few, many = calls(FEW, backend), calls(MANY, backend)
    assert many < 1.2 * MANY / FEW * few
