"""A layer with one input, as many embed a time or a size with: stored, or named as one that cannot be."""

import pytest
import torch
from torch import nn

import quantlab
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES, native_config

EVERY = [(b, d) for b, rows in CAPABILITIES.items() if b != "none" for d, row in rows.items() if "cpu" in row.devices]


@pytest.mark.parametrize(("backend", "dtype"), EVERY)
def test_it_is_stored_or_skipped(backend, dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(1, 512), nn.Linear(512, 512)).bfloat16()
    config = native_config(QuantizationAxes(backend=backend, dtype=dtype))
    _, report = quantlab.quantize(module, config, on_mismatch="skip")
    found = {layer.name: layer for layer in report.layers}
    assert found["1"].status == "quantized"
    assert found["0"].status in ("quantized", "skipped")
    if found["0"].status == "skipped":
        assert "in_features 1" in found["0"].reason or "512 x 1 weights" in found["0"].reason
