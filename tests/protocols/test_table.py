"""What every protocol's file holds."""

import pytest
import torch

from quantlab.metrics import METRICS
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import replay
from quantlab.protocols import module
from quantlab.protocols.table import PROTOCOLS
from quantlab.vocabulary.schema import EvaluationConfig


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_headline_metrics_are_of_their_protocol_and_have_a_direction(protocol):
    assert PROTOCOLS[protocol].HEADLINE
    for name in PROTOCOLS[protocol].HEADLINE:
        assert protocol in METRICS[name].protocols
        assert METRICS[name].higher_is_better is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_calls_of_a_module_are_those_that_it_is_observed_by(dtype):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 3)

        def forward(self, x, scale=1.0):
            return {"y": self.inner(x) * scale}

    net = Both().to(getattr(torch, dtype))
    model = LoadedModel(name="module", protocol="module", components={"model": net}, dtype=dtype)
    first, second = torch.randn(2, 4), torch.randn(3, 4)
    inputs = module.inputs_of([first, ((second,), {"scale": 2.0})], dtype)
    seen, told = EvaluationConfig(), []
    calls = list(module.calls(model, inputs, seen, ["model"], lambda *done: told.append(done)))
    assert [name for name, _ in calls] == ["model", "model"]
    assert told == [(1, 2), (2, 2)]
    replayed = torch.cat([replay(net, call, "cpu")["y"].float() for _, call in calls])
    assert torch.equal(replayed, torch.cat(module.observe(model, inputs, seen)["outputs"]["y"]))
