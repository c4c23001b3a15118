"""Errors blame what is to blame, and name the way out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import quantlab
from quantlab.errors import ConfigError
from quantlab.modules.layers import linear_layers
from quantlab.modules.reached import check_weights_are_here, other_matrices, uncalled
from quantlab.planning.plan import plan

E4M3 = ["float8_e4m3", "float8_e4m3fn", "qfloat8", "fp8", "e4m3"]


@pytest.mark.parametrize("name", E4M3)
def test_quantos_float8_is_e4m3(name):
    with pytest.raises(ConfigError, match=rf"{name} is called float8$"):
        quantlab.QuantoConfig(name)
    with pytest.raises(ConfigError, match=rf"{name} is called float8$"):
        quantlab.QuantoConfig("int8", activations=name)
    with pytest.raises(ConfigError, match=rf"{name} is called float8$"):
        plan([f"quantization.quantization_config={{quant_method:quanto,weights_dtype:{name}}}"])


@pytest.mark.parametrize(
    "node", ["quantization", "sweep", "model", "dataset", "evaluation", "calibration", "tracking", "launcher"]
)
def test_a_whole_node_in_one_word_says_how_it_is_typed(node):
    with pytest.raises(ConfigError, match=rf"^{node}: its keys are set one by one, as in {node}\."):
        plan(["backend=quanto", f"{node}={{a:1}}"])


def test_a_whole_mapping_of_free_keys_is_taken():
    assert len(plan(["backend=quanto", "sweep.grid={dtype:[int8,int4]}"]).jobs) == 2
    (job,) = plan(["backend=quanto", "quantization.modules_to_not_convert={mine:[a]}"]).jobs
    assert job.config.quantization.modules_to_not_convert == {"mine": ["a"]}


class Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Kept(nn.Linear):
    """A Linear of another name, with a Linear's forward."""


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return x @ self.weight


class Reads(nn.Module):
    """Calls ``b``, and reads the weight of ``a``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.b(x @ self.a.weight.T)


@pytest.mark.parametrize("layer", [Conv1D, lambda: Own(64, 64)], ids=["no Linear", "a forward of its own"])
def test_matrices_that_are_no_linear_are_blamed_and_not_the_exclusions(layer):
    model = nn.ModuleDict({"h": nn.Sequential(layer(), layer()), "head": nn.Linear(64, 64)})
    config = quantlab.QuantoConfig("int8", modules_to_not_convert=["head"])
    with pytest.raises(
        ConfigError, match=r"^model.components=model: its matrices are in 2 (Conv1D|Own) layers, .*head"
    ) as caught:
        quantlab.quantize(model, config)
    assert "modules_to_not_convert" not in str(caught.value)
    del model["head"]
    with pytest.raises(ConfigError, match=r"no Linear layer; its matrices are in 2 (Conv1D|Own) layers"):
        quantlab.quantize(model, quantlab.QuantoConfig("int8"))


def test_exclusions_that_leave_nothing_are_still_blamed():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    with pytest.raises(ConfigError, match=r"^modules_to_not_convert: all 2 Linear layers"):
        quantlab.quantize(model, quantlab.QuantoConfig("int8", modules_to_not_convert=["*"]))
    assert other_matrices(model, linear_layers(model).values()) == ""
    kept = nn.Sequential(Kept(64, 64), Kept(64, 64))
    with pytest.raises(ConfigError, match=r"^modules_to_not_convert: all 2 Linear layers"):
        quantlab.quantize(kept, quantlab.QuantoConfig("int8", modules_to_not_convert=["*"]))


@pytest.mark.parametrize("call", ["quantize", "evaluate"])
def test_weights_that_are_not_here_are_named(call):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
    config = quantlab.QuantoConfig("int8")
    calls = {
        "quantize": lambda: quantlab.quantize(model, config),
        "evaluate": lambda: quantlab.evaluate(model, [config], [torch.randn(2, 64)]),
    }
    with pytest.raises(ConfigError, match=r"^module: 2 of 4 weights have no values here \(1.weight: offloaded"):
        calls[call]()


def test_a_module_offloaded_by_accelerate_is_named():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), execution_device="cpu")
    with pytest.raises(ConfigError, match=r"^module: 2 of 2 weights have no values here"):
        check_weights_are_here(model, "module")


CONFIGS = {
    "bitsandbytes nf4": quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes int8": quantlab.BitsAndBytesConfig(load_in_8bit=True),
    "torchao": quantlab.TorchAoConfig("int8wo"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_weight_that_a_parent_reads_is_named_with_the_exclusion_that_helps(name):
    model, inputs = Reads(), [torch.randn(4, 64), torch.randn(4, 64)]
    with pytest.raises(
        ConfigError, match=r"^module: .*it reads the weights of a instead of calling the layers"
    ) as caught:
        quantlab.evaluate(model, [CONFIGS[name]], inputs)
    assert str(caught.value).endswith("leave them out: modules_to_not_convert=['a']")
    config = type(CONFIGS[name]).from_dict({**CONFIGS[name].to_dict()})
    data = config.to_dict()
    field = config._exclusions_field
    quantlab.evaluate(model, [type(config).from_dict({**data, field: ["a"], "exclusion_rule": "quantlab"})], inputs)


@pytest.mark.parametrize("config", [quantlab.GGUFQuantizationConfig(gguf_type="q8_0"), quantlab.QuantoConfig("int8")])
def test_a_weight_that_a_parent_reads_is_the_quantized_one_where_it_can_be_read(config):
    model, x = Reads(), torch.randn(4, 64)
    made, report = quantlab.quantize(model, config)
    assert {r.name for r in report.layers if r.status == "quantized"} == {"a", "b"}
    error = torch.linalg.vector_norm(made(x) - model(x)) / torch.linalg.vector_norm(model(x))
    assert 1e-4 < float(error) < 0.1


def test_which_layers_are_called():
    model = Reads()
    assert uncalled(model, ["a", "b"], lambda: model(torch.randn(1, 64))) == ["a"]
    assert not model.b._forward_pre_hooks
