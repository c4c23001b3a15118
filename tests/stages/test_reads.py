"""Which weights a model reads is found by one sample; where that cannot be run, it is said, and never hidden."""

import contextlib
import types

import pytest
import torch
from torch import nn

import quantlab
from quantlab.models.loaded import LoadedModel
from quantlab.modules.calls import recorded_calls
from quantlab.modules.reached import recorded_reads
from quantlab.modules.read_in_source import reads_in_source
from quantlab.stages import reads
from quantlab.vocabulary.schema import EvaluationConfig


class Expert(nn.Module):
    """A part whose code asks the second layer for its dtype, as the experts of NLLB-MoE do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return self.layers[1](self.layers[0](x).to(self.layers[1].weight.dtype))


class Routed(nn.Module):
    """Asks one of its experts, and one layer of another without its weight."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([Expert(), Expert(), Expert()])

    def forward(self, x):
        return self.experts[0](x) + self.experts[1].layers[1](x)


def test_of_what_no_token_was_sent_to_the_code_is_read():
    module = Routed()
    with recorded_reads(module) as read:
        module(torch.ones(1, 4))
    assert set(read) == {"experts.0.layers.1", "experts.2.layers.1"}
    assert set(reads_in_source(module)) == {f"experts.{i}.layers.1" for i in range(3)}


def found(monkeypatch, error):
    def calls(*_):
        raise error

    monkeypatch.setattr(reads, "PROTOCOLS", {"module": types.SimpleNamespace(calls=calls)})
    model = LoadedModel(name="mine", protocol="module", components={"model": nn.Sequential(nn.Linear(4, 4))})
    inputs = types.SimpleNamespace(subset=lambda _: None)
    return reads.weights_read(model, inputs, EvaluationConfig(), ["model"])


@pytest.mark.parametrize("error", [ValueError("a batch of one\nis too small"), KeyError("mask")])
def test_a_sample_that_cannot_be_run_is_told(monkeypatch, capsys, error):
    assert found(monkeypatch, error) == {"model": ()}
    told = "".join(capsys.readouterr())
    assert "warning: one sample alone cannot be run, so weights that mine reads may be missed: " in told
    assert "too small" not in told, "the first line of it"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: device-side assert triggered")]
)
def test_what_the_machine_says_is_not_hidden(monkeypatch, error):
    with pytest.raises(type(error)):
        found(monkeypatch, error)


class Masked(nn.Module):
    """Is given a mask that is no data, as AnyFlow FAR's transformer is, and reads a weight."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)

    def forward(self, x, mask):
        return nn.functional.linear(mask(x), self.proj.weight)


def test_a_model_whose_calls_cannot_be_kept_is_run_without_keeping_them(monkeypatch, capsys):
    def calls(model, inputs, evaluation, components):
        with contextlib.ExitStack() as stack:
            kept = [stack.enter_context(recorded_calls(model.components[name])) for name in components]
            model.components["model"](torch.ones(1, 4), lambda x: x)
        yield from (("model", call) for found in kept for call in found)

    monkeypatch.setattr(reads, "PROTOCOLS", {"module": types.SimpleNamespace(calls=calls)})
    model = LoadedModel(name="mine", protocol="module", components={"model": Masked()})
    inputs = types.SimpleNamespace(subset=lambda _: None)
    assert reads.weights_read(model, inputs, EvaluationConfig(), ["model"]) == {"model": ("proj",)}
    assert "".join(capsys.readouterr()) == "", "nothing is wrong with it, and no way out is wanted"


class PastItsHooks(nn.Module):
    """Calls a layer, and also runs its forward, where nothing that hangs on the layer sees the inputs."""

    def __init__(self, run):
        super().__init__()
        self.first, self.both, self.run = nn.Linear(32, 32), nn.Linear(32, 32), run

    def forward(self, x):
        x = self.first(x)
        return self.both(x) + self.run(self.both, 8 * x)


PAST_HOOKS = {
    "its own forward": lambda layer, x: layer.forward(x),
    "its class's forward": lambda layer, x: nn.Linear.forward(layer, x),
    "its weight": lambda layer, x: nn.functional.linear(x, layer.weight, layer.bias),
}


@pytest.mark.parametrize("way", PAST_HOOKS)
def test_a_layer_that_is_not_only_called_is_not_calibrated_on_its_calls_alone(way):
    module = PastItsHooks(PAST_HOOKS[way]).eval()
    batch = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    config = quantlab.QuantoConfig(weights_dtype="int8", activations="int8")
    made, report = quantlab.quantize(module, config, calibration=[batch])
    rows = {row.name: row for row in report.layers}
    assert rows["first"].activation_dtype == "int8"
    assert (rows["both"].status, type(made.both)) == ("excluded", nn.Linear)
    assert "instead of calling it" in rows["both"].reason
    stored, report = quantlab.quantize(module, quantlab.QuantoConfig(weights_dtype="int8"), inputs=[batch])
    assert {row.status for row in report.layers} == {"quantized"}
    module.run = lambda layer, x: layer(x)
    called, _ = quantlab.quantize(module, quantlab.QuantoConfig(weights_dtype="int8"), inputs=[batch])
    torch.testing.assert_close(stored(batch), called(batch))
