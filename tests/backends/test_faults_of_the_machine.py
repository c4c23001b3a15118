"""Lack of memory inside a library, and a GPU that it lost, are told as that and not as a fault of the scheme."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

import quantlab
from quantlab.errors import ConfigError
from quantlab.models.reading import as_model_error

LIBRARIES = {
    "torchao": ("torchao.quantization", "quantize_", lambda: quantlab.TorchAoConfig.from_axes(axes("torchao"))),
    "modelopt": (
        "modelopt.torch.quantization",
        "quantize",
        lambda: quantlab.NVIDIAModelOptConfig.from_axes(axes("modelopt")),
    ),
}
ERRORS = ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: device-side assert triggered"]


def axes(backend):
    from quantlab.vocabulary.axes import QuantizationAxes

    return QuantizationAxes(backend=backend, dtype="int8")


@pytest.mark.parametrize("text", [*ERRORS, "mat1 and mat2 shapes cannot be multiplied"])
@pytest.mark.parametrize("backend", LIBRARIES)
def test_a_library_that_fails_while_it_quantizes(backend, text, monkeypatch):
    module, name, config = LIBRARIES[backend]

    def broken(*_, **__):
        raise RuntimeError(text)

    monkeypatch.setattr(importlib.import_module(module), name, broken)
    is_schemes = text not in ERRORS
    with pytest.raises(ConfigError if is_schemes else RuntimeError) as caught:
        quantlab.quantize(nn.Sequential(nn.Linear(64, 64)), config())
    assert ("choose another dtype" in str(caught.value)) == is_schemes


@pytest.mark.parametrize("text", ERRORS)
def test_a_checkpoint_that_does_not_fit_is_not_called_unreadable(text):
    with pytest.raises(RuntimeError, match="^" + text), as_model_error("model.path=x", "give another"):
        raise RuntimeError(text)
    with pytest.raises(torch.OutOfMemoryError), as_model_error("model.path=x", "give another"):
        raise torch.OutOfMemoryError("CUDA out of memory")
