"""A model casts its inputs to the dtype of its first parameter, which may be codes after quantization."""

import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

import quantlab
from tests.support.configs import METHODS, config_of
from tests.support.tiers import covering


class Casts(nn.Module):
    """As OpenAI's GPT, Swin and the embedders of sound do it."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(256, 256)
        self.norm = nn.LayerNorm(256)
        self.b = nn.Linear(256, 256)

    def forward(self, x):
        x = x.to(next(self.parameters()).dtype)
        return self.b(self.norm(torch.relu(self.a(x))))


class Around(nn.Module):
    """Asks another part."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(256, 256, bias=False)
        self.inner = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 256))

    def forward(self, x):
        return self.inner(torch.zeros(4, 256, dtype=next(self.inner.parameters()).dtype) + self.first(x))


class InIts(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layers = nn.ModuleList([kind()])

    def forward(self, x):
        return self.layers[0](x)


MODELS = {"casts": Casts, "around": Around, "deeper": lambda: InIts(Casts), "around deeper": lambda: InIts(Around)}


CASES = itertools.product(MODELS, METHODS, (torch.float32, torch.bfloat16))


@pytest.mark.parametrize(("name", "method", "dtype"), covering(CASES))
def test_the_first_parameters_dtype_is_that_of_values(name, method, dtype):
    torch.manual_seed(0)
    model, x = MODELS[name]().eval().to(dtype), torch.randn(4, 256).to(dtype)
    made, report = quantlab.quantize(model, config_of(method), inputs=[x])
    assert {r.status for r in report.layers} == {"quantized"}
    expected, found = model(x).float(), made(x).float()
    assert float((found - expected).norm() / expected.norm()) < 0.2
    assert next(made.parameters()).dtype == dtype
    assert {id(p) for p in made.parameters()} == {id(p) for _, p in made.named_parameters()}
    assert type(made).__name__ == type(model).__name__
    if method in ("bitsandbytes", "gguf"):
        assert torch.equal(copy.deepcopy(made)(x).float(), found)


def test_such_a_model_can_be_pickled():
    config = quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    x = torch.randn(4, 256)
    made, _ = quantlab.quantize(Casts().eval(), config, inputs=[x])
    again = pickle.loads(pickle.dumps(made))
    assert next(again.parameters()).dtype == torch.float32
    assert torch.equal(again(x), made(x))
