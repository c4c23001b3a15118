"""quanto's activations: scales measured on data, what they are worth, and that they come back from files."""

from __future__ import annotations

import copy
import itertools

import pytest

from quantlab.backends import quanto
from quantlab.backends.quanto import QuantoConfig
from quantlab.errors import ConfigError, ModelError
from quantlab.modules.feed import feed_of_batches
from quantlab.modules.layers import state_digest
from tests.support.quanto_net import MAX_ERROR, WEIGHTS, mlp, relative

COMPUTE = ("float32", "bfloat16")
ACTIVATIONS = {"int8": "int8", "float8": "float8_e4m3", "float8_e5m2": "float8_e5m2"}


def outliers(torch, rows: int = 256, seed: int = 1, dtype: str = "float32"):
    """Inputs whose 8 largest of 512 channels are 30 times the others."""
    scale = torch.ones(512)
    scale[torch.randperm(512, generator=torch.Generator().manual_seed(7))[:8]] = 30
    x = torch.randn(rows, 512, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(getattr(torch, dtype))


def calibrated(torch, model, config, batches, layers=("0", "2"), dtype=None):
    scales = quanto.calibrate(model, list(layers), config, dtype, feed_of_batches(batches))
    quanto.quantize(model, list(layers), config, dtype, scales)
    return scales


@pytest.mark.parametrize("dtype", [*COMPUTE, "float16"])
@pytest.mark.parametrize(("weights", "activations"), list(itertools.product(WEIGHTS, ACTIVATIONS)))
def test_quantize_read_back_save_and_load(torch, tmp_path, weights, activations, dtype):
    config = QuantoConfig(weights_dtype=weights, activations=activations)
    assert config.needs_data
    model = mlp(torch, dtype=dtype)
    fresh, plain, x = copy.deepcopy(model), mlp(torch, dtype=dtype), outliers(torch, 48, 3, dtype)
    with torch.no_grad():
        reference = model[0](x)
    calibrated(torch, model, config, [outliers(torch, 256, s, dtype) for s in (1, 2)])
    quanto.quantize(plain, ["0", "2"], QuantoConfig(weights_dtype=weights), dtype)

    stored = [quanto.read_back(model[i]) for i in (0, 2)]
    assert {(s.dtype, s.activation_dtype) for s in stored} == {(WEIGHTS[weights], ACTIVATIONS[activations])}
    with torch.no_grad():
        output, first, of_weights = model(x), model[0](x), plain[0](x)
    assert type(output) is type(first) is torch.Tensor
    assert output.dtype == x.dtype
    assert output.isfinite().all()
    rounding = {"int8": 0.1, "float8": 0.04, "float8_e5m2": 0.07}[activations]
    error = relative(torch, first, reference)
    assert 0.98 * relative(torch, of_weights, reference) < error < MAX_ERROR[weights] + rounding

    digest = state_digest(model.state_dict())
    quanto.save(model, tmp_path)
    quanto.load(fresh, ["0", "2"], config, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(x), output)
    assert state_digest(fresh.state_dict()) == digest
    assert torch.equal(fresh[0].input_scale, model[0].input_scale)
    assert quanto.read_back(fresh[0]).activation_dtype == ACTIVATIONS[activations]
    for extra in (None, "int8" if activations != "int8" else "float8"):
        with pytest.raises(ModelError, match=f"0 is stored with activations q.*, not {extra}"):
            quanto.load(mlp(torch, dtype=dtype), ["0", "2"], QuantoConfig(weights, activations=extra), tmp_path)


@pytest.mark.parametrize(
    ("weights", "activations", "bounds"),
    [
        ("int8", "int8", (0.06, 0.08)),
        ("int4", "int8", (0.12, 0.18)),
        ("float8", "float8", (0.045, 0.06)),
        ("int8", "float8", (0.033, 0.045)),
    ],
)
def test_measured_scales_are_far_better_than_none(torch, weights, activations, bounds):
    config = QuantoConfig(weights_dtype=weights, activations=activations)
    model, x = mlp(torch), outliers(torch, 256, 99)
    reference = model(x)
    scales = calibrated(torch, model, config, [outliers(torch, 256, s) for s in range(4)])
    error = relative(torch, model(x), reference)
    assert bounds[0] < error < bounds[1]
    ones = {name: (torch.ones(()), torch.ones(())) for name in scales}
    bare = mlp(torch)
    quanto.quantize(bare, ["0", "2"], config, None, ones)
    if activations == "int8":  # 8-bit floats have range enough
        assert relative(torch, bare(x), reference) > 1.1 * error


def test_the_scale_is_of_the_largest_value_in_whatever_order(torch):
    """The library's own calibration has a moving average: 0.9 * (0.9 * 2 + 0.1 * 4) + 0.1 * 10 here."""
    for values in ((254.0, 508.0, -1270.0), (-1270.0, 254.0, 508.0)):
        model = mlp(torch)
        batches = [torch.full((2, 512), value) for value in values]
        scales = calibrated(torch, model, QuantoConfig(activations="int8"), batches)
        assert float(scales["0"][0]) == pytest.approx(10)
        assert float(model[0].input_scale) == float(scales["0"][0])


def test_a_scale_that_float16_takes_for_zero_is_refused(torch):
    """The library's would be 0, and all inputs would be rounded away."""
    config = QuantoConfig(activations="float8_e5m2")
    with pytest.raises(ConfigError, match=r"^calibration: the largest inputs of 0 give a scale of .*, which float16"):
        calibrated(torch, mlp(torch).half(), config, [torch.full((2, 512), 1e-4).half()])


def test_a_batch_of_zeros_first_does_no_harm(torch):
    for activations in ACTIVATIONS:
        model = mlp(torch, bias=False)
        batches = [torch.zeros(2, 512), outliers(torch, 64)]
        scales = calibrated(torch, model, QuantoConfig(activations=activations), batches)
        other = mlp(torch, bias=False)
        alone = calibrated(torch, other, QuantoConfig(activations=activations), batches[1:])
        assert float(scales["0"][0]) == float(alone["0"][0])
        assert model(outliers(torch)).isfinite().all()


@pytest.mark.parametrize("shape", [(512,), (1, 512), (2, 3, 512), (2, 2, 3, 512), (0, 512)], ids=str)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_inputs_of_any_rank_and_gradients(torch, weights, shape):
    model = mlp(torch)
    calibrated(torch, model, QuantoConfig(weights, activations="int8"), [torch.randn(8, 512)])
    x = torch.randn(shape, requires_grad=True)
    out = model(x)
    assert out.shape == (*shape[:-1], 8)
    out.sum().backward()
    assert x.grad.isfinite().all()
    assert bool(x.grad.abs().sum() > 0) == bool(x.numel())


@pytest.mark.parametrize("compute", COMPUTE)
@pytest.mark.parametrize("own", COMPUTE)
def test_another_compute_dtype(torch, tmp_path, own, compute):
    config, model = QuantoConfig(activations="int8"), mlp(torch, dtype=own)
    fresh, x = copy.deepcopy(model), outliers(torch, 64, 5, own)
    with torch.no_grad():
        reference = model(x)
    calibrated(torch, model, config, [outliers(torch, 64, 6, own)], dtype=compute)
    assert str(model[0].input_scale.dtype) == str(model[0].weight.dtype) == f"torch.{compute}"
    with torch.no_grad():
        output = model(x)
    assert output.dtype == x.dtype
    assert relative(torch, output, reference) < 0.1
    quanto.save(model, tmp_path)
    quanto.load(fresh, ["0", "2"], config, tmp_path)
    with torch.no_grad():
        assert torch.equal(fresh(x), output)


def test_the_rest_of_the_model_sees_plain_tensors(torch):
    seen = []

    class Residual(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.out = (torch.nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            q, k = self.q(x), self.k(x)
            seen.extend((type(q), type(k)))
            hidden = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], x[None])[0]
            return x + self.out(self.out(hidden))

    model = Residual().eval()
    reference = model(x := torch.randn(6, 32)).detach()
    calibrated(torch, model, QuantoConfig(activations="int8"), [x], ["q", "k", "out"])
    assert relative(torch, model(x).detach(), reference) < 0.05
    assert set(seen) == {torch.Tensor}


def test_a_layer_that_never_ran_is_named(torch):
    model = torch.nn.ModuleDict({"used": torch.nn.Linear(8, 8), "idle": torch.nn.Linear(8, 8)})
    model.forward = lambda x: model["used"](x)
    with pytest.raises(ConfigError, match=r"^calibration: idle never ran .*modules_to_not_convert"):
        calibrated(torch, model, QuantoConfig(activations="int8"), [torch.randn(2, 8)], ["used", "idle"])
    assert not [hook for hook in model["used"]._forward_pre_hooks.values() if "_measure" in repr(hook)]


def test_the_first_layer_with_bad_inputs_is_named(torch):
    model = mlp(torch)
    model[1].forward = lambda x: x / 0
    with pytest.raises(ConfigError, match="^calibration: 2 got NaN or infinities; use other data"):
        calibrated(torch, model, QuantoConfig(activations="float8"), [torch.randn(2, 512)], ["2", "0"])


def test_without_data_it_is_refused(torch):
    for activations, name in ACTIVATIONS.items():
        with pytest.raises(ConfigError, match=rf"^activation_dtype={name}: .* leave activation_dtype at none$"):
            quanto.quantize(mlp(torch), ["0"], QuantoConfig(activations=activations))
    with pytest.raises(ConfigError, match="^calibration: 2 never ran"):
        quanto.quantize(mlp(torch), ["2"], QuantoConfig(activations="int8"), None, {"0": (1, 1)})


def test_hqq_and_activations(torch):
    config = QuantoConfig("int4", optimizer="hqq", activations="int8")
    hqq, plain = mlp(torch), mlp(torch)
    calibrated(torch, hqq, config, [outliers(torch)])
    quanto.quantize(plain, ["0"], QuantoConfig("int4", optimizer="hqq"))
    assert torch.equal(quanto.read_back(hqq[0]).dense, quanto.read_back(plain[0]).dense)


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(torch):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for weights, activations, shape in itertools.product(
        ("int8", "int4", "float8"), ACTIVATIONS, ((512,), (24, 512), (2, 2, 3, 512))
    ):
        config, x = QuantoConfig(weights, activations=activations), torch.randn(shape)
        here, there = mlp(torch), mlp(torch).cuda()
        calibrated(torch, here, config, [outliers(torch)])
        scales = quanto.calibrate(there, ["0", "2"], config, None, feed_of_batches([outliers(torch)], "cuda"))
        quanto.quantize(there, ["0", "2"], config, None, scales)
        assert relative(torch, there(x.cuda()).cpu(), here(x)) < 0.02


def test_transformers_and_back(torch):
    transformers = pytest.importorskip("transformers")
    config = QuantoConfig("int8", activations="float8")
    theirs = config.to_transformers()
    assert (theirs.weights, theirs.activations) == ("int8", "float8")
    again = QuantoConfig.from_dict(transformers.QuantoConfig(weights="int8", activations="float8").to_dict())
    assert again.axes() == config.axes()
    with pytest.raises(ConfigError, match="activations='float8_e5m2': the QuantoConfig of transformers has no"):
        QuantoConfig("int8", activations="float8_e5m2").to_transformers()
