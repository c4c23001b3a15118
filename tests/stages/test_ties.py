"""Weights that several places share: stored once, counted once, never untied without a word."""

import copy

import pytest
import torch
from torch import nn

import quantlab
from quantlab.modules.layers import view_of
from quantlab.modules.ties import copied, tied_parameters
from tests.support.configs import METHODS, config_of
from tests.support.tables import component_memory


class Net(nn.Module):
    """An embedding, and layers that may be tied to it and to one another."""

    def __init__(self, num: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(256, 256)
        self.layers = nn.ModuleList(nn.Linear(256, 256, bias=False) for _ in range(num))
        self.eval().requires_grad_(False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


IDS = torch.arange(64).reshape(8, 8)


def tie_parameter(net):
    net.layers[2].weight = net.layers[0].weight


def tie_tensor(net):
    net.layers[2].weight = nn.Parameter(net.layers[0].weight.data, requires_grad=False)


def share_all(net):
    for layer in net.layers[1:]:
        layer.weight = net.layers[0].weight


TIES = {"one Parameter": tie_parameter, "one tensor": tie_tensor, "all": share_all}


def rows_of(report):
    return {r.name: r for r in report.layers}


@pytest.mark.parametrize("tie", TIES)
@pytest.mark.parametrize("method", METHODS)
def test_layers_that_share_a_weight_are_stored_once(method, tie):
    net = Net()
    TIES[tie](net)
    made, report = quantlab.quantize(net, config_of(method))
    rows = rows_of(report)
    assert [n for n in rows if n.startswith("layers")] == [f"layers.{i}" for i in range(4)]
    assert {rows[f"layers.{i}"].status for i in range(4)} == {"quantized"}
    assert rows["layers.2"].shares == "layers.0"
    num = len({net.layers[i].weight.data_ptr() for i in range(4)})
    assert report.coverage == pytest.approx(num / (num + 1))
    separate, _ = quantlab.quantize(copy.deepcopy(Net(num)), config_of(method))
    names = [f"layers.{i}" for i in range(4)]
    ledger = component_memory(made, names, net)
    assert ledger.quantized_bytes == component_memory(separate, names[:num], Net(num)).quantized_bytes
    assert ledger.bits_per_weight < 32
    expected = net(IDS)
    assert torch.linalg.vector_norm(made(IDS) - expected) < 0.4 * torch.linalg.vector_norm(expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["embedding", "transposed", "excluded", "bare parameter"])
def test_a_weight_that_another_place_needs_is_left_and_told(method, how):
    """The model never grows by what was meant to shrink it."""
    net, config = Net(), config_of(method)
    if how == "embedding":
        net.layers[3].weight = net.embed.weight
        partner = "embed.weight"
    elif how == "transposed":
        net.layers[3].weight = nn.Parameter(net.layers[1].weight.data.T, requires_grad=False)
        partner = "layers.1.weight"
    elif how == "bare parameter":
        net.logits = net.layers[3].weight
        partner = "logits"
    else:
        net.layers[3].weight = net.layers[1].weight
        partner = "layers.1.weight"
        config = config_of(method, ["layers.1"], exclusion_rule="quantlab")
    made, report = quantlab.quantize(net, config)
    row = rows_of(report)["layers.3"]
    assert row.status == "excluded"
    assert partner in row.reason
    assert "would be stored twice" in row.reason
    taken = [n for n, r in rows_of(report).items() if r.status == "quantized"]
    ledger = component_memory(made, taken, net)
    assert ledger.weights_bytes <= 4 * ledger.num_parameters
    assert report.coverage < 1
    assert made.layers[3].weight.dtype == torch.float32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("how", ["own bias", "hooked"])
def test_layers_that_are_not_one_share_what_they_read(method, how):
    """Each keeps its bias and its hooks."""
    net, calls = Net(), []
    net.layers[3].weight = net.layers[1].weight
    if how == "own bias":
        net.layers[3].bias = nn.Parameter(torch.ones(256), requires_grad=False)
    else:
        net.layers[1].register_forward_hook(lambda *_: calls.append(1))
    made, report = quantlab.quantize(net, config_of(method))
    rows = rows_of(report)
    assert rows["layers.3"].shares == "layers.1"
    assert torch.equal(made.layers[3].weight, made.layers[1].weight)
    expected = net(IDS)
    calls.clear()
    assert torch.linalg.vector_norm(made(IDS) - expected) < 0.4 * torch.linalg.vector_norm(expected)
    assert len(calls) == (how == "hooked")


def test_parts_of_one_storage_that_do_not_overlap_are_not_tied():
    """As after a fused matrix was cut, and in files that are mapped into memory."""
    whole = torch.randn(3 * 256, 256)
    net = Net(3)
    for layer, part in zip(net.layers, whole.split(256), strict=True):
        layer.weight = nn.Parameter(part, requires_grad=False)
    assert not tied_parameters(net)
    _, report = quantlab.quantize(net, quantlab.QuantoConfig("int8"))
    assert {r.status for r in report.layers if r.name.startswith("layers")} == {"quantized"}
    assert report.coverage == pytest.approx(3 / 4)


def test_a_layer_that_falls_back_to_a_float_is_not_covered():
    net = nn.Sequential(nn.Linear(33, 64, bias=False), nn.Linear(64, 33, bias=False))
    _, report = quantlab.quantize(net, quantlab.GGUFQuantizationConfig(gguf_type="q8_0"), on_mismatch="bfloat16")
    assert [r.status for r in report.layers] == ["fallback", "quantized"]
    assert report.coverage == pytest.approx(0.5)


def test_buffers_are_on_both_sides_of_the_bits():
    net = nn.Sequential(nn.Linear(64, 64))
    net.register_buffer("table", torch.zeros(10_000))
    assert component_memory(net, [], net).bits_per_weight == 32


def test_python_leaves_what_the_command_line_leaves():
    """A tied head beside its unquantized embedding made a model larger."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    for tied in (True, False):
        model = LlamaForCausalLM(LlamaConfig(vocab_size=256, tie_word_embeddings=tied, **sizes)).eval()
        _, report = quantlab.quantize(model, quantlab.QuantoConfig("int8"))
        assert rows_of(report)["lm_head"].reason == "modules_to_not_convert: lm_head"
        _, report = quantlab.quantize(model, quantlab.QuantoConfig("int8"), replace_default_exclusions=True)
        assert rows_of(report)["lm_head"].status == ("excluded" if tied else "quantized")
        assert report.coverage <= 1


def test_a_module_that_computes_a_weight_at_each_call_is_copied():
    with pytest.warns(FutureWarning):
        layer = torch.nn.utils.weight_norm(torch.nn.Linear(4, 3))
    module, x = torch.nn.Sequential(layer), torch.ones(2, 4)
    expected = module(x)
    assert layer.weight.grad_fn is not None
    for made in (copied(module), view_of(module)):
        assert torch.equal(made(x), expected)
        assert type(made[0].weight) is torch.Tensor
