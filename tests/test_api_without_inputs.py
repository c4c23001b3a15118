"""``quantlab.quantize`` of a module that it has seen no input of: what its code reads, and what is said where it fails."""

import copy
import traceback

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantlab
from quantlab.modules.read_in_source import reads_in_source
from tests.support.configs import METHODS, config_of

NF4 = quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


class Reads(nn.Module):
    """Multiplies by the weight of one layer itself, asks another's for its dtype, and calls a third."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(256, 256)
        self.cast = nn.Linear(256, 256)
        self.called = nn.Linear(256, 256)
        self._init_weights()

    def _init_weights(self):
        nn.init.normal_(self.called.weight, std=0.05)

    def forward(self, x):
        x = self.called(F.linear(x, self.proj.weight, self.proj.bias))
        return self.cast(x.to(self.cast.weight.dtype))


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(256, 256) for _ in range(3))
        self.inner = Reads()

    def forward(self, x):
        for i in range(len(self.experts)):
            x = x @ self.experts[i].weight.T
        return self.inner(x)


class Hidden(nn.Module):
    """Reads a weight by another name."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(256, 256)
        self.other = nn.Linear(256, 256)

    def forward(self, x):
        layer = self.proj
        return self.other(torch.einsum("bi,oi->bo", x, F.silu(layer.weight)))


def test_what_the_code_reads_is_found_and_what_makes_weights_is_not():
    assert reads_in_source(Reads()) == ("proj", "cast")
    assert reads_in_source(Several()) == ("experts.0", "experts.1", "experts.2", "inner.proj", "inner.cast")
    assert reads_in_source(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == ()


@pytest.mark.parametrize("method", METHODS)
def test_a_module_that_reads_weights_is_quantized_without_inputs(method):
    config = config_of(method)
    if config.axes().activation_dtype != "none":
        pytest.skip("it rounds inputs")
    torch.manual_seed(0)
    model, x = Several().eval(), torch.randn(4, 256)
    made, report = quantlab.quantize(model, config)
    assert {r.status for r in report.layers} == {"quantized"}
    same, _ = quantlab.quantize(model, config, inputs=[x])
    assert torch.equal(made(x), same(x))


def test_calibration_batches_show_what_is_read_too():
    torch.manual_seed(0)
    config = quantlab.GGUFQuantizationConfig(gguf_type="q4_1", algorithm="imatrix")
    made, report = quantlab.quantize(Hidden().eval(), config, calibration=[torch.randn(4, 256)])
    assert {r.name: r.status for r in report.layers} == {"proj": "excluded", "other": "quantized"}
    assert torch.isfinite(made(torch.randn(2, 256))).all()


def test_a_forward_that_fails_says_where_and_what_to_do():
    made, _ = quantlab.quantize(nn.ModuleDict({"body": Hidden()}).eval()["body"], NF4)
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        made(torch.randn(2, 256))
    told = "".join(traceback.format_exception(caught.value))
    assert "quantlab: it arose in the module itself (Hidden), near the quantized proj, other: " in told
    assert "pass inputs=[batch] to quantlab.quantize" in told
    whole, _ = quantlab.quantize(nn.Sequential(nn.Linear(256, 256), Hidden()).eval(), NF4)
    with pytest.raises((RuntimeError, NotImplementedError)) as caught:
        copy.deepcopy(whole)(torch.randn(2, 256))
    assert "it arose in 1 (Hidden), near the quantized 1.proj, 1.other: " in caught.value.__notes__[0]


def test_a_module_that_works_is_left_alone():
    made, _ = quantlab.quantize(nn.Sequential(nn.Linear(64, 64)).eval(), quantlab.QuantoConfig("int8"))
    x = torch.randn(2, 64)
    assert torch.equal(torch.compile(made, backend="eager")(x), made(x))
