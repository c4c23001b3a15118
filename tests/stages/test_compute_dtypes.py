"""What a layer computes in is its own: a module may hold layers of several dtypes, and some parameters are codes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlab
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.configs import METHODS, config_of
from tests.support.tables import BACKENDS, layer_memory, native_config


class Mixed(nn.Module):
    """As Wan: the first parameter and one projection are kept in float32, the rest is bfloat16."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(64))
        self.condition = nn.Linear(64, 64)
        self.blocks = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)).to(torch.bfloat16)

    def forward(self, x):
        shift = self.condition(self.table[None]).to(x.dtype)
        return self.blocks(x + shift)


def inputs():
    return [torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)]


@pytest.mark.parametrize("backend", METHODS)
def test_layers_of_one_module_keep_their_own_dtypes(backend):
    """The same bytes as where each layer stands in a module of its own dtype, whatever parameter comes first."""
    config = config_of(backend)
    module, _ = quantlab.quantize(Mixed(), config)
    for name, dtype in (("condition", torch.float32), ("blocks.0", torch.bfloat16)):
        alone = nn.Sequential(Mixed().get_submodule(name))
        assert alone[0].weight.dtype == dtype
        expected, _ = quantlab.quantize(alone, config)
        assert layer_memory(module.get_submodule(name)) == layer_memory(expected[0]), name
    out = module(inputs()[0])
    assert out.dtype == torch.bfloat16
    error = (out.float() - Mixed()(inputs()[0]).float()).norm() / Mixed()(inputs()[0]).float().norm()
    assert 0 < float(error) < 0.3


@pytest.mark.parametrize("backend", METHODS)
def test_a_module_is_fed_in_the_dtype_that_most_of_it_computes_in(backend):
    rows = quantlab.evaluate(Mixed(), [config_of(backend)], inputs(), num_bootstrap=10)
    assert rows[2].quality["output_rel_error"].value < 0.3


FLOAT8 = [b for b in METHODS if "float8_e4m3" in quantlab.backends.table.offers()[b].rows]


@pytest.mark.parametrize("backend", FLOAT8)
@pytest.mark.parametrize("bias", [True, False])
def test_codes_of_8_bit_floats_are_no_compute_dtype(backend, bias):
    """A module whose only parameters are packed float8 is not fed in float8."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64, bias=bias), nn.Linear(64, 64, bias=bias))
    config = native_config(QuantizationAxes(backend=backend, dtype="float8_e4m3"))
    given = [torch.randn(16, 64, generator=torch.Generator().manual_seed(1))]
    row = quantlab.evaluate(net, [config], given, num_bootstrap=10)[2]
    module, _ = quantlab.quantize(net, config)
    expected = net(given[0])
    with torch.no_grad():
        own = float(((module(given[0]) - expected).norm(dim=1) / expected.norm(dim=1)).mean())
    assert row.quality["output_rel_error"].value == pytest.approx(own, rel=1e-4)
    assert own < 0.06
    assert BACKENDS[backend].read_back(module[0]).dtype == "float8_e4m3"
