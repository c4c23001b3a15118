"""What ``quantlab.evaluate`` says of modules whose outputs, inputs or tensors are unusual, recomputed here."""

import numpy as np
import pytest
import torch
from torch import nn

import quantlab

INT8 = quantlab.QuantoConfig("int8")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """One layer, and a function of what it answers."""

    def __init__(self, after=lambda y: y, out_features=16):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, out_features)
        self.after = after

    def forward(self, x):
        return self.after(self.linear(x))


def evaluated(module, inputs, floors=False):
    return quantlab.evaluate(module, [INT8], inputs, num_bootstrap=50, floors=floors)


def relative(module, x):
    """What the layer's own weights, rounded by the library alone, do to the answer as a whole."""
    made, _ = quantlab.quantize(module, INT8)
    with torch.no_grad():
        expected, found = (m(x).double().numpy() for m in (module, made))
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


# -- outputs


def test_answers_of_several_lengths_are_compared_row_by_row():
    inputs = [randn(3, 5, 16), randn(3, 7, 16, seed=1)]
    row = evaluated(Net(), inputs)[-1]
    errors = [relative(Net(), x[i]) for x in inputs for i in range(3)]
    assert row.measurements.samples["output_rel_error"] == pytest.approx(errors, rel=1e-4)


@pytest.mark.parametrize("module", [Net(lambda y: y.sum(-1)), Net(out_features=1), Net(lambda y: y.sum(-1, True))])
@pytest.mark.parametrize("rows", [1, 8, 48])
def test_one_number_a_row_is_compared_with_all_others_whatever_the_batches_are(module, rows):
    """By itself its cosine is 1 or -1, and its relative error is large wherever the number is near 0."""
    x = randn(48, 16)
    row = evaluated(module, list(x.split(rows)))[-1]
    made, _ = quantlab.quantize(module, INT8)
    with torch.no_grad():
        r, q = (m(x).double().numpy().ravel() for m in (module, made))
    error, cosine = relative(module, x), float(q @ r / np.linalg.norm(q) / np.linalg.norm(r))
    assert row.quality["output_rel_error"].value == pytest.approx(error, rel=1e-4)
    assert row.quality["output_cosine"].value == pytest.approx(cosine, abs=1e-7)
    drawn = np.random.default_rng(0).integers(0, 48, (4000, 48))
    again = np.linalg.norm((q - r)[drawn], axis=1) / np.linalg.norm(r[drawn], axis=1)
    assert row.quality["output_rel_error"].se == pytest.approx(again.std(), rel=0.2)
    assert 0 < row.quality["output_rel_error"].ci_lo < error < row.quality["output_rel_error"].ci_hi
    assert row.quality["output_cosine"].ci_lo < cosine < row.quality["output_cosine"].ci_hi < 1


def test_one_number_a_batch_is_compared_with_all_others():
    inputs = [randn(3 + seed, 16, seed=seed) for seed in range(5)]
    module = Net(lambda y: y.mean())
    row = evaluated(module, inputs, floors=True)[-1]
    made, _ = quantlab.quantize(module, INT8)
    with torch.no_grad():
        r, q = (np.array([float(m(x)) for x in inputs]) for m in (module, made))
    expected = np.linalg.norm(q - r) / np.linalg.norm(r)
    assert row.quality["output_rel_error"].value == pytest.approx(expected, rel=1e-4)
    assert row.quality["output_cosine"].value < 1


@pytest.mark.parametrize("is_alone", [True, False])
def test_complex_answers_are_compared(is_alone):
    x = randn(8, 16)
    module = Net(torch.fft.fft if is_alone else lambda y: {"ones": torch.ones_like(y), "spectrum": torch.fft.fft(y)})
    row = evaluated(module, [x])[-1]
    expected = [relative(Net(), x[i]) for i in range(8)]  # Parseval: a spectrum's norm is that of what it is of
    assert row.measurements.samples["output_rel_error"] == pytest.approx(expected, rel=1e-4)


class Selecting(nn.Module):
    """Returns some of its rows, of the quantized layer others."""

    def __init__(self):
        super().__init__()
        self.linear = Net().linear

    def forward(self, x):
        is_quantized = type(self.linear).__name__ != "Linear"
        return self.linear(x)[: 4 if is_quantized == bool(x[0, 0] > 0) else 6]


def test_rows_that_do_not_belong_together_are_not_compared():
    """There are as many of them in all."""
    with pytest.raises(quantlab.QuantlabError, match=r"the output of batch 0 has shape \(., 16\), the reference's"):
        evaluated(Selecting(), [torch.ones(8, 16), -torch.ones(8, 16)])


class Reusing(Net):
    """Writes each answer into the memory of the one before."""

    def __init__(self, is_buffer):
        super().__init__()
        out = torch.zeros(8, 16)
        if is_buffer:
            self.register_buffer("out", out)
        else:
            self.out = out

    def forward(self, x):
        return self.out.copy_(self.linear(x))


@pytest.mark.parametrize("is_buffer", [True, False])
def test_answers_in_one_memory_are_each_its_own(is_buffer):
    inputs = [randn(8, 16, seed=seed) for seed in range(3)]
    row = evaluated(Reusing(is_buffer), inputs)[-1]
    expected = [relative(Net(), x[i]) for x in inputs for i in range(8)]
    assert row.measurements.samples["output_rel_error"] == pytest.approx(expected, rel=1e-4)


SPARSE = {"sparse": lambda y: y.to_sparse(), "nested": lambda y: torch.nested.as_nested_tensor([*y])}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_and_nested_answers_are_compared(kind):
    x = randn(8, 16)
    row = evaluated(Net(SPARSE[kind]), [x])[-1]
    expected = [relative(Net(), x[i]) for i in range(8)]
    assert row.measurements.samples["output_rel_error"] == pytest.approx(expected, rel=1e-4)


# -- how many independent samples there are


def test_what_is_compared_as_a_whole_is_one_sample_a_batch():
    inputs = [randn(8, 16, seed=seed) for seed in range(5)]
    module = Net(lambda y: {"rows": torch.ones_like(y), "loss": y.pow(2).mean()})
    row = evaluated(module, inputs)[-1]
    assert row.measurements.resolved["compared_output"] == "loss"
    values = row.measurements.samples["output_rel_error"][::8]
    assert row.quality["output_rel_error"].se == pytest.approx(values.std(ddof=1) / 5**0.5, rel=0.2)  # not of 40


@pytest.mark.parametrize("repeated", ["batches", "rows", "named"])
def test_inputs_that_repeat_themselves_say_nothing_new(repeated):
    x = randn(6, 16)
    given = {"batches": [x] * 8, "rows": [x.repeat(8, 1)], "named": [{"x": x}, ((x,), {})] * 4}[repeated]
    once, again = evaluated(Net(), [x])[-1], evaluated(Net(), given)[-1]
    for name, value in once.quality.items():
        assert again.quality[name].value == pytest.approx(value.value, rel=1e-6)
        assert again.quality[name].se == pytest.approx(value.se, rel=1e-3)


@pytest.mark.parametrize(
    "after",
    [lambda y: torch.cat([y, y.tanh()]), lambda y: torch.cat([y, y.tanh(), y.sin()], 1).reshape(-1, 16)],
    ids=["two conditions", "three boxes"],
)
def test_several_rows_of_one_input_are_no_independent_samples(after):
    many, one = [randn(4, 16, seed=i) for i in range(6)], [randn(1, 16, seed=i) for i in range(6)]
    for batches in (many, one):
        row = evaluated(Net(after), batches)[-1]
        num = row.quality["output_rel_error"].n // len(batches)
        assert list(row.measurements.clusters) == [i for i in range(len(batches)) for _ in range(num)]
    assert evaluated(Net(lambda y: y.transpose(0, 1)), [randn(3, 8, 16)])[-1].measurements.clusters is None


def test_rows_that_differ_in_one_argument_are_different():
    class Adding(Net):
        def forward(self, x, y):
            return self.linear(x) + y

    x, same = randn(6, 16), randn(1, 16, seed=1).expand(6, 16)
    assert evaluated(Adding(), [(x, same)])[-1].measurements.clusters is None
    assert evaluated(Adding(), [(same, x)])[-1].measurements.clusters is None


# -- complex numbers in another dtype


class Rotating(nn.Module):
    """Positions as complex numbers in a buffer, as many a Llama keeps them."""

    def __init__(self):
        super().__init__()
        self.linear = Net().linear
        self.register_buffer("positions", torch.polar(torch.ones(8), randn(8)))

    def forward(self, x):
        y = self.linear(x)
        turned = torch.view_as_complex(y.float().reshape(-1, 8, 2)) * self.positions
        return torch.view_as_real(turned).flatten(1).to(y.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_floor_keeps_the_imaginary_parts(dtype):
    """Without them it was as large as the answer, and every scheme was inside it."""
    module = Rotating()
    module.linear.to(dtype)
    _, floor, _ = evaluated(module, [randn(8, 16).to(dtype)], floors=True)
    assert floor.status == "FINISHED", floor.error
    assert 0 < floor.quality["output_rel_error"].value < 0.01


# -- bits a weight of what changes as it runs


class Remembering(Net):
    """Keeps its last answer and a table that it makes at the first call."""

    def __init__(self):
        super().__init__()
        self.last, self.table = None, None

    def forward(self, x):
        self.table = torch.ones(16, 16) if self.table is None else self.table
        self.last = self.linear(x)
        return self.last @ self.table


def test_what_a_module_keeps_of_its_calls_is_no_weight():
    module = Remembering()
    reference, row = evaluated(module, [randn(50, 16)])
    assert reference.memory["model"].weights_bytes == 4 * (16 * 16 + 16)
    assert row.memory["model"].bits_per_weight < 12
    assert {*vars(module)} == {*vars(Remembering())}


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
def test_a_weight_that_is_made_at_each_call_counts_on_both_sides(norm, has_run):
    """Before the first call it is another name of what it will be made of."""
    module = nn.Sequential(norm(nn.Linear(16, 16)), nn.Linear(16, 16)).eval()
    if has_run:
        module(randn(1, 16))
    reference, floor, row = evaluated(module, [randn(8, 16)], floors=True)
    saved = 16 * 16 * 3 - 16 * 4 - 8  # of the one layer that is quantized: a byte each, a scale a row, two of the layer
    assert reference.memory["model"].bits_per_weight == 32
    assert floor.memory["model"].bits_per_weight == 16
    assert reference.memory["model"].weights_bytes - row.memory["model"].weights_bytes == saved
