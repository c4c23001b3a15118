"""Modules that change as they run, hold other numbers than floats, or return what is no tuple."""

import functools
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import quantlab
from quantlab.errors import ConfigError
from tests.support.tiers import default_of

INT8 = quantlab.QuantoConfig("int8")
PLAIN = [
    INT8,
    quantlab.GGUFQuantizationConfig(gguf_type="q4_0"),
    quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    quantlab.TorchAoConfig("int8wo"),
    quantlab.NVIDIAModelOptConfig("INT8"),
]
EVERY_KIND = ("linear", "conv", "embedding", "expert", "recurrent", "parameter")
X = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))


class OneLinear(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(64, 64)


class Counting(OneLinear):
    """Adds up what it has seen, a little of it into each answer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + 1e-5 * x.mean(0)  # another tensor at each call
        return self.linear(x) + self.seen


class Normalizing(OneLinear):
    """Stays in train mode, whatever it is told."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(64)

    def train(self, mode=True):
        return super().train(True)

    def forward(self, x):
        return self.norm(self.linear(x))


class Caching(OneLinear):
    """Makes a weight of its own at the first call, and keeps it: in a tensor, a list and a mapping."""

    def __init__(self):
        super().__init__()
        self.doubled, self.kept, self.by_name, self.calls = None, [], {}, 0

    def forward(self, x):
        self.calls += 1
        if self.doubled is None:
            self.doubled = 2 * self.linear.weight.detach()
            self.kept.append(self.doubled + 1)
            self.by_name["more"] = self.doubled - 1
        weight = self.doubled + self.kept[0] + self.by_name["more"]
        return torch.nn.functional.linear(x, weight)


def test_a_candidate_makes_its_own_of_what_a_module_keeps():
    """Else it would run with the reference's weights, and cost nothing."""
    module = Caching()
    _, row = quantlab.evaluate(module, [INT8], [X, X], num_bootstrap=10, floors=False)
    weight_error = next(layer.weight_rel_error for layer in row.quantization.layers if layer.name == "linear")
    assert row.quality["output_rel_error"].value == pytest.approx(weight_error, rel=0.3)
    assert (module.doubled, module.kept, module.by_name, module.calls) == (None, [], {}, 0)
    made, _ = quantlab.quantize(module, INT8, inputs=[X])
    assert made.doubled is None


CALIBRATED = {
    "torchao awq": quantlab.TorchAoConfig("int4wo", group_size=32, algorithm="awq"),
    "torchao smoothquant": quantlab.TorchAoConfig("int8dq", algorithm="smoothquant"),
    "quanto static": quantlab.QuantoConfig("int8", activations="int8"),
    "modelopt awq": quantlab.NVIDIAModelOptConfig("INT4", algorithm="awq_lite"),
    "gguf imatrix": quantlab.GGUFQuantizationConfig(gguf_type="q4_0", algorithm="imatrix"),
}


class Tabulating(OneLinear):
    """Keeps what its first layer answers to a fixed input, as tables of positions are made."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Linear(64, 64)
        self.table = None

    def forward(self, x):
        if self.table is None:
            self.table = self.positions(torch.eye(64))
        return x @ self.table + 1e-3 * self.linear(x)


SLOW = pytest.mark.slow
CASES = [pytest.param(name, marks=() if name.startswith(("torchao", "gguf")) else SLOW) for name in CALIBRATED]


@pytest.mark.parametrize("name", CASES)
def test_so_does_one_that_calibration_has_run_before(name):
    other = [torch.randn(8, 64, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    _, row = quantlab.evaluate(Tabulating(), [CALIBRATED[name]], [X], calibration=other, num_bootstrap=10, floors=False)
    weight_error = next(layer.weight_rel_error for layer in row.quantization.layers if layer.name == "positions")
    assert row.quality["output_rel_error"].value > 0.5 * weight_error


class Changing(OneLinear):
    """Changes what it is given."""

    def forward(self, x):
        return self.linear(x.mul_(0.5))


def test_inputs_that_a_module_changes_are_the_users_still():
    given = X.clone()
    reference, row = quantlab.evaluate(Changing(), [INT8], [given], num_bootstrap=10, floors=False)
    assert torch.equal(given, X)
    assert reference.quality["output_rel_error"].value == 0
    assert 0 < row.quality["output_rel_error"].value < 0.05


def test_a_module_whose_shapes_are_not_known_yet_is_told_so():
    module = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    with pytest.raises(quantlab.ConfigError, match=r"^module: 0.weight takes its shape from the first input"):
        quantlab.evaluate(module, [INT8], [X], floors=False)


def test_a_module_that_is_compiled_is_told_so():
    whole, part = torch.compile(nn.Sequential(nn.Linear(64, 64))), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    part[1].compile()
    for module, told in ((whole, "it is compiled .*; pass what it was made of"), (part, "1 is compiled .* before")):
        with pytest.raises(quantlab.ConfigError, match=f"^module: {told}"):
            quantlab.evaluate(module, [INT8], [X], floors=False)


class Scripted(OneLinear):
    def __init__(self):
        super().__init__()
        self.scripted = torch.jit.script(nn.Sequential(nn.Linear(64, 64)))

    def forward(self, x):
        return self.scripted(self.linear(x))


@pytest.mark.parametrize("kinds", [("linear",), EVERY_KIND])
def test_what_torchscript_compiled_is_left(kinds):
    _, row = quantlab.evaluate(Scripted(), [INT8], [X], num_bootstrap=10, floors=False, layer_kinds=kinds)
    found = {layer.name: layer for layer in row.quantization.layers}
    assert found["linear"].status == "quantized"
    assert [layer.reason for name, layer in found.items() if name.startswith("scripted")] == [
        "compiled by TorchScript, whose parts cannot be replaced"
    ]


@pytest.mark.parametrize("kind", [Counting, Normalizing])
def test_what_changes_as_it_runs_is_compared_from_one_state_and_given_back(kind):
    module = kind()
    before = {name: (buffer, buffer.clone()) for name, buffer in module.named_buffers()}
    reference, row = quantlab.evaluate(module, [INT8], [X] * 20, num_bootstrap=10, floors=False)
    once, again = quantlab.evaluate(kind(), [INT8], [X], num_bootstrap=10, floors=False)
    assert reference.quality["output_rel_error"].value == once.quality["output_rel_error"].value == 0
    assert row.quality["output_rel_error"].value == pytest.approx(again.quality["output_rel_error"].value, rel=1e-3)
    for name, buffer in module.named_buffers():
        assert buffer is before[name][0]
        assert torch.equal(buffer, before[name][1])


@pytest.mark.parametrize("config", [quantlab.TorchAoConfig("int8wo"), quantlab.QuantoConfig("int8")])
def test_a_module_whose_weights_are_quantized_already_is_told_so(config):
    made, _ = quantlab.quantize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)), config)
    for ask in (quantlab.evaluate, quantlab.quantize):
        more = ([INT8], [X]) if ask is quantlab.evaluate else (INT8,)
        with pytest.raises(
            quantlab.ConfigError, match=r"^module: 0.weight is a \w+, already quantized: pass the unquantized one"
        ):
            ask(nn.Sequential(made[0], nn.Linear(64, 64)), *more)


class Uncopied(OneLinear):
    """A library's own module, which says nothing of why it cannot be copied."""

    def __deepcopy__(self, memo):
        raise NotImplementedError

    def forward(self, x):
        return self.linear(x)


def test_a_module_that_cannot_be_copied_is_told_so():
    with pytest.raises(quantlab.ConfigError, match=r"^module: it cannot be copied \(NotImplementedError\); "):
        quantlab.evaluate(Uncopied(), [INT8], inputs=[X])


class Rescaling(OneLinear):
    """Divides its weights at its first call in eval mode and remembers it, as RWKV does."""

    is_scaled = False

    def forward(self, x):
        if not self.is_scaled and not self.training:
            with torch.no_grad():
                self.linear.weight.div_(4)
            self.is_scaled = True
        return self.linear(x).relu()


@pytest.mark.parametrize(
    "ask",
    [
        lambda module: quantlab.evaluate(module, [INT8], [X], num_bootstrap=10),
        lambda module: quantlab.quantize(module, INT8, inputs=[X]),
    ],
)
def test_a_module_that_changes_its_weights_is_refused_unless_it_has_done_so(ask):
    module, expected = Rescaling().eval(), Rescaling().eval()(X)
    with pytest.raises(
        quantlab.ModelError, match=r"^module: it changes its own weights .*\(linear.weight\).* run it once"
    ):
        ask(module)
    assert torch.equal(module(X), expected)  # it is not left with the weights of one state and the memory of another
    ask(module)
    assert torch.equal(module(X), expected)
    made, _ = quantlab.quantize(module, INT8, inputs=[X])
    assert float((made(X) - expected).norm() / expected.norm()) < 0.02


def test_without_inputs_a_module_whose_code_changes_weights_is_warned_of(capsys):
    quantlab.quantize(OneLinear(), INT8)
    assert "changes weights" not in capsys.readouterr().err
    quantlab.quantize(Rescaling(), INT8)
    assert "module: Rescaling.forward changes weights as it runs" in capsys.readouterr().err


class Spectral(OneLinear):
    """A layer of complex numbers, and one of integers that is decoded as it is read."""

    def __init__(self):
        super().__init__()
        self.spectrum = nn.Parameter(torch.randn(64, 64, dtype=torch.complex64), requires_grad=False)
        self.codes = nn.Parameter(torch.randint(-127, 127, (64, 64), dtype=torch.int8), requires_grad=False)
        self.narrow = nn.Parameter(torch.randn(64, 64).to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        decoded = self.codes.float() / 64 + self.narrow.float()
        return (torch.fft.fft(self.linear(x)) @ self.spectrum).real @ decoded


def test_complex_numbers_and_codes_are_left_and_said_so():
    _, row = quantlab.evaluate(Spectral(), [INT8], [X], num_bootstrap=10, floors=False, layer_kinds=EVERY_KIND)
    found = {layer.name: layer for layer in row.quantization.layers}
    assert found["linear"].status == "quantized"
    for name, dtype in (("spectrum", "complex64"), ("codes", "int8"), ("narrow", "float8_e4m3fn")):
        assert found[name].status != "quantized"
        assert f"of {dtype}, which no backend rounds" in found[name].reason


class Listing(OneLinear):
    """Calls its layers by a list, a dictionary and a bound method, which are no parts of it."""

    def __init__(self):
        super().__init__()
        self.second, self.third, self.fourth = nn.Linear(64, 64), nn.Linear(64, 64), Conv1D(64, 64)
        self.steps = [self.linear, self.fourth]
        vars(self)["table"] = {"after": (self.second, torch.tanh)}
        self.last = functools.partial(self._last, self.third)

    def _last(self, layer, x):
        return layer(x)

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        after, activation = self.table["after"]
        return self.last(activation(after(x)))


class Called(OneLinear):
    """The same layers, called by their names."""

    def __init__(self):
        super().__init__()
        self.second, self.third, self.fourth = nn.Linear(64, 64), nn.Linear(64, 64), Conv1D(64, 64)

    def forward(self, x):
        return self.third(torch.tanh(self.second(self.fourth(self.linear(x)))))


@pytest.mark.parametrize("config", default_of(PLAIN, *PLAIN[:2]), ids=str)
def test_a_layer_that_is_called_from_a_list_is_the_quantized_one(config):
    listing, called = Listing(), Called()
    called.load_state_dict(listing.state_dict())
    rows = [quantlab.evaluate(m, [config], [X], num_bootstrap=10, floors=False)[1] for m in (listing, called)]
    assert rows[1].quality["output_rel_error"].value > 1e-4
    assert rows[0].quality == rows[1].quality
    assert rows[0].memory == rows[1].memory


class Closing(OneLinear):
    """Keeps a function that holds the module itself, which no copy of it can have."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(64, 64)
        self.step = lambda x: self.linear(x)

    def forward(self, x):
        return self.second(self.step(x))


def test_a_copy_that_runs_the_layers_of_the_original_is_refused():
    with pytest.raises(ConfigError, match=r"^module: .*: linear ran unquantized: .* make it a method"):
        quantlab.evaluate(Closing(), [INT8], [X], num_bootstrap=10, floors=False)
    left_out = quantlab.QuantoConfig("int8", modules_to_not_convert=["linear"])
    assert len(quantlab.evaluate(Closing(), [left_out], [X], num_bootstrap=10, floors=False)) == 2


class Keeping(OneLinear):
    """Multiplies by a weight that it keeps in a list."""

    def __init__(self, keeps):
        super().__init__()
        self.second = nn.Linear(64, 64)
        self.kept = keeps(self.linear.weight)

    def forward(self, x):
        kept = self.kept
        return self.second(kept(x) if callable(kept) else x @ kept[0].T)


@pytest.mark.parametrize(
    "keeps", [lambda w: [w], lambda w: {0: (w,)}[0], lambda w: functools.partial(F.linear, weight=w)]
)
def test_a_weight_that_is_kept_in_a_list_is_left_and_said_so(keeps):
    _, row = quantlab.evaluate(Keeping(keeps), [INT8], [X], num_bootstrap=10, floors=False, layer_kinds=EVERY_KIND)
    found = {layer.name: layer for layer in row.quantization.layers}
    assert found["linear"].status == "excluded"
    assert "its weight is also kept" in found["linear"].reason
    assert found["second"].status == "quantized"


@dataclass
class Answer:
    prediction: torch.Tensor
    parts: tuple
    note: str = ""


class Answering(OneLinear):
    def forward(self, x):
        y = self.linear(x)
        return Answer(prediction=y, parts=(None, {"twice": 2 * y + 1}))


def test_a_data_class_is_looked_into():
    _, row = quantlab.evaluate(Answering(), [INT8], [X], num_bootstrap=10, floors=False)
    assert set(row.measurements.resolved["output_rel_errors"].replace(":", "").split(", ")[0].split()) & {"prediction"}
    assert row.measurements.resolved["compared_output"] in ("prediction", "parts.1.twice")
    assert 0 < row.quality["output_rel_error"].value < 0.05


class Iterating(OneLinear):
    """Its first layer's weight goes through a step of power iteration whenever it is read in train mode."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(64, 64))

    def forward(self, x):
        return self.linear(self.first(x))


@pytest.mark.parametrize("inputs", [[], [X]], ids=["unseen", "run once"])
def test_a_module_in_train_mode_is_as_it_was_when_it_is_quantized(inputs):
    module = Iterating().train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    made, _ = quantlab.quantize(module, INT8, inputs=inputs)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(part.training for part in module.modules())
    assert not any(part.training for part in made.modules())
    with torch.no_grad():
        wanted, found = module.eval()(X), made(X)
    measured = quantlab.evaluate(module, [INT8], [X], num_bootstrap=10, floors=False)[-1]
    error = ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).mean().item()
    assert error == pytest.approx(measured.quality["output_rel_error"].value, rel=1e-4)
