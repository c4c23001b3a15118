"""What Python users hand over: modules of any signature and of several dtypes, and floors that cannot be."""

import copy

import pytest
import torch
from torch import nn

import quantlab

INT8 = quantlab.QuantoConfig("int8")
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


class Anything(nn.Module):
    """Takes positional and named arguments of every kind, and returns several tensors and what is none."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x, how, *, scale=1.0, mask=None, nested=None):
        y = self.first(x) * scale if how == "plain" else x
        y = y if mask is None else y.masked_fill(mask, 0.0)
        z = self.second(torch.tanh(4 * y)) + (nested["shift"][0] if nested else 0)
        return {"first": y, "deep": (z, "text", None), "loss": z.mean() + 3, "index": z.argmax(-1)}


SIGNATURES = {
    "positional": (X, "plain"),
    "named": {"x": X, "how": "plain", "scale": 2.0},
    "both": ((X, "plain"), {"scale": 0.5, "mask": X > 1}),
    "nested": ((X,), {"how": "plain", "nested": {"shift": [torch.ones(64)]}}),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_inputs_of_any_signature(name):
    reference, row = quantlab.evaluate(Anything(), [INT8], [SIGNATURES[name]] * 2, num_bootstrap=10, floors=False)
    assert reference.quality["output_rel_error"].value == 0
    assert 0 < row.quality["output_rel_error"].value < 0.05
    assert row.quality["output_rel_error"].n == 16


def test_each_tensor_that_is_returned_is_compared_and_the_worst_counts():
    _, row = quantlab.evaluate(Anything(), [INT8], [(X, "plain")], num_bootstrap=10, floors=False)
    told = row.measurements.resolved
    errors = {k: float(v) for k, v in (part.split(": ") for part in told["output_rel_errors"].split(", "))}
    assert set(errors) == {"first", "deep.0", "loss"}
    assert told["compared_output"] == max(errors, key=errors.get)
    assert row.quality["output_rel_error"].value == pytest.approx(max(errors.values()), rel=0.01)


def test_batches_that_are_answered_otherwise_are_refused():
    class Odd(Anything):
        def forward(self, x, how):
            return super().forward(x, "plain") if how == "all" else self.first(x)

    with pytest.raises(quantlab.ConfigError, match=r"^module: on batch 1 of inputs it returns .*answered alike"):
        quantlab.evaluate(Odd(), [INT8], [(X, "all"), (X, "one")], floors=False)

    class Silent(Anything):
        def forward(self, x):
            self.first(x)
            return "nothing"

    with pytest.raises(quantlab.ConfigError, match=r"^module: on batch 0 of inputs it returns no floating tensor"):
        quantlab.evaluate(Silent(), [INT8], [X], floors=False)


class Mixed(nn.Module):
    """A body in bfloat16 with a head in float32, as many models are loaded."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(64, 256).bfloat16(), nn.Linear(256, 8)

    def forward(self, x, exact):
        return self.head(self.body(x).float()) + exact


def test_a_module_of_several_dtypes_gets_what_it_is_given():
    inputs = [(X.bfloat16(), torch.full((8, 8), 1 / 3))]
    reference, floor, row = quantlab.evaluate(Mixed(), [INT8], inputs, num_bootstrap=10)
    assert reference.quality["output_rel_error"].value == 0
    assert row.status == "FINISHED"
    assert 0 < row.quality["output_rel_error"].value < 0.05
    assert floor.name == "floor_fp32"


class OnlyFloat32(nn.Module):
    """Its forward casts, so that it runs in one dtype only."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(64, 64), nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.body(x).float())


def test_a_floor_that_cannot_be_is_a_row_with_its_name_and_can_be_left_out():
    _, floor, row = quantlab.evaluate(OnlyFloat32(), [INT8], [X], num_bootstrap=10)
    assert (floor.name, floor.status, row.status) == ("floor_bf16", "FAILED", "FINISHED")
    assert floor.error.startswith("floor_bf16: the module does not run in bfloat16 (RuntimeError")
    assert floor.error.endswith("floors=False does without this row")
    assert row.floors == {}
    names = [r.name for r in quantlab.evaluate(OnlyFloat32(), [INT8], [X], num_bootstrap=10, floors=False)]
    assert names == ["reference", "quanto int8"]


@pytest.mark.parametrize("call", ["quantize", "evaluate"])
def test_float64_is_refused_in_the_words_of_python(call):
    module = nn.Sequential(nn.Linear(64, 64).double(), nn.Linear(64, 64))
    calls = {
        "quantize": lambda: quantlab.quantize(module, INT8),
        "evaluate": lambda: quantlab.evaluate(module, [INT8], [X.double()]),
    }
    with pytest.raises(
        quantlab.ConfigError, match=r"^module: 0.weight is of float64, .*pass module.float\(\)"
    ) as caught:
        calls[call]()
    assert "model.dtype" not in str(caught.value)
    quantlab.quantize(copy.deepcopy(module).float(), INT8)


def test_kinds_of_layers_are_those_of_the_command_line():
    net = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    _, row = quantlab.evaluate(
        net, [INT8], [torch.arange(8)[:, None]], num_bootstrap=10, floors=False, layer_kinds=["linear", "embedding"]
    )
    assert row.name == "quanto int8 +embedding"
    assert row.quantization.coverage > 0.9
