"""torchao's scales that are measured on data: AWQ, SmoothQuant and static activations, on a CPU."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys

import pytest
import torch
from torch import nn

from quantlab.backends import torchao as backend
from quantlab.backends.torchao.build import build_form, quiet_library
from quantlab.errors import ConfigError
from quantlab.modules.feed import CalibrationFeed, feed_of_batches
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import layer_memory, native_config, storages
from tests.support.torchao_net import IN, NAMES, OUT, SCHEMES, Net, batches, calibrated, config_of, net


def error_of(model, compute="float32"):
    """Relative error of the first layer's output on data that calibration did not see."""
    x = torch.cat(batches(dtype=compute, seed=5))
    reference = net(compute).first(x).float()
    return float((model.first(x).float() - reference).norm() / reference.norm())


BYTES = {"int8": OUT * IN, "int4": OUT * IN // 2, "float8_e4m3": OUT * IN}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_promise(scheme, tmp_path):
    """Read back as asked, effective weights, true bytes, nothing changed by a forward, save -> load bit-equal."""
    asked = SCHEMES[scheme]
    compute = "bfloat16" if asked.get("dtype") == "int4" else "float32"
    config = config_of(compute=compute, **asked)
    model = net(compute)
    before = copy.deepcopy(model.state_dict())
    found = backend.calibrate(model, NAMES[:2], config, compute, feed_of_batches(batches(dtype=compute)))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(layer._forward_pre_hooks for layer in model.modules())
    backend.quantize(model, NAMES[:2], config, compute, found)

    stored = backend.read_back(model.first)
    assert stored.dtype == asked.get("dtype", "int8")
    assert stored.group_size == (asked["group_size"] if isinstance(asked.get("group_size"), int) else None)
    assert stored.activation_dtype == asked.get("activation_dtype", "none")
    assert not stored.is_simulated
    x = torch.cat(batches((1,), dtype=compute, seed=5))
    if stored.activation_dtype == "none":  # the effective weight explains the output, so the scales are in it
        through = nn.functional.linear(x.float(), stored.dense.float(), model.first.bias.float())
        assert float((through - model.first(x).float()).norm() / through.norm()) < (
            1e-5 if compute == "float32" else 0.01
        )
    weight = before["first.weight"].float()
    assert 0 < float((stored.dense - weight).norm() / weight.norm()) < (0.4 if compute == "bfloat16" else 0.06)

    codes, scales = layer_memory(model.first)
    assert codes == BYTES[stored.dtype]
    plain = config.without_data()
    if plain is not None:
        width = 2 if compute == "bfloat16" else 4
        extra = (IN * width if config.algorithm != "auto" else 0) + 4 * (config.activation_scales == "static")
        assert scales - layer_memory(calibrated(plain, compute).first)[1] == extra

    y = model(x)
    model.state_dict()
    assert torch.equal(model(x), y)
    backend.save(model, tmp_path)
    fresh = net(compute)
    fresh.first.weight.mul_(0.5)
    backend.load(fresh, NAMES[:2], config, tmp_path)
    assert torch.equal(fresh(x), y)
    assert layer_memory(fresh.first) == (codes, scales)
    assert sum(storages(copy.deepcopy(model).first).values()) == sum(storages(model.first).values())


# -- errors on outliers, as ratios to round-to-nearest

RATIOS = {
    "int8 awq": 0.8,
    "int8 smoothquant": 1.1,
    "int8 group awq": 0.8,
    "int8 group smoothquant": 0.9,
    "int8 int8 awq": 0.4,
    "int8 int8 smoothquant": 0.4,
    "int4 32 awq": 0.45,
    "int4 32 smoothquant": 0.5,
    "int4 64 awq": 0.5,
    "int4 64 smoothquant": 0.55,
    "int4 128 awq": 0.55,
    "int4 128 smoothquant": 0.65,
    "int8 int8 static smoothquant": 0.35,
}


@pytest.mark.parametrize("scheme", RATIOS)
def test_outliers_cost_less(scheme):
    compute = "bfloat16" if scheme.startswith("int4") else "float32"
    config = config_of(compute=compute, **SCHEMES[scheme])
    plain = dataclasses.replace(config, algorithm="auto")
    ratio = error_of(calibrated(config, compute), compute) / error_of(calibrated(plain, compute), compute)
    assert ratio < RATIOS[scheme]


def test_static_scales_are_those_of_the_data():
    """One scale of the largest input: worse than a token's own, and what is larger than the data saturates."""
    dynamic = error_of(calibrated(config_of(activation_dtype="int8")))
    model = calibrated(config_of(activation_dtype="int8", activation_scales="static"))
    assert dynamic < error_of(model) < 4 * dynamic
    largest = max(float(x.abs().max()) for x in batches())
    assert float(model.first.weight.act_quant_scale) == pytest.approx(largest / 127.5)
    far = torch.zeros(1, IN)
    far[0, 0] = 10 * largest
    near = far.clone().clamp(max=largest * 127 / 127.5)
    assert torch.equal(model.first(far), model.first(near))
    float8 = calibrated(config_of(dtype="float8_e4m3", activation_dtype="float8_e4m3", activation_scales="static"))
    assert float(float8.first.weight.act_quant_scale) == pytest.approx(largest / 448)
    assert error_of(float8) < 0.05


@pytest.mark.parametrize("alpha", [0, 0.2, 0.5, 1])
def test_smoothing_is_that_of_the_paper(alpha):
    """s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), equation 4 of arXiv:2211.10438."""
    config = config_of(activation_dtype="int8", algorithm="smoothquant", smoothquant_alpha=alpha)
    found = backend.calibrate(net(), ["first"], config, None, feed_of_batches(batches()))
    x, w = torch.cat(batches()).abs().amax(dim=(0, 1)), net().first.weight.abs().amax(dim=0)
    assert torch.allclose(found["first"].pre_scale, x**alpha / w ** (1 - alpha), rtol=1e-4)


# -- the library's own steps give the same


def rows(compute):
    """Batches without a dimension of tokens: the library puts those in another order, which moves a mean's last bit."""
    return [x.flatten(0, 1) for x in batches(dtype=compute)]


def by_the_library(make_config, compute):
    """The first layer quantized by the library's prepare, run, convert."""
    model = nn.Sequential(net(compute).first)
    with quiet_library():
        from torchao.quantization import quantize_

        quantize_(model, make_config("prepare"))
        for batch in rows(compute):
            model(batch)
        quantize_(model, make_config("convert"))
    return model


@pytest.mark.parametrize(
    "scheme",
    [
        "int8 awq",
        "int8 int8 awq",
        "int8 int8 smoothquant",
        "int8 int8 static",
        "int8 int8 static smoothquant",
        "float8 static",
        "int4 64 awq",
    ],
)
def test_equal_to_the_library(scheme):
    from quantlab.backends.torchao.config import layer_form

    asked = SCHEMES[scheme]
    compute = "bfloat16" if asked.get("dtype") == "int4" else "float32"
    config = config_of(compute=compute, **asked)
    with quiet_library():
        from torchao.prototype.awq import AWQConfig
        from torchao.prototype.smoothquant import SmoothQuantConfig

    def make_config(step):
        base = build_form(layer_form(config, IN))
        if scheme == "float8 static":
            base.step = step
            return base
        if config.algorithm == "awq":
            return AWQConfig(base, step=step)
        return SmoothQuantConfig(base, step=step, alpha=0.5 if config.algorithm == "smoothquant" else None)

    ours = nn.Sequential(net(compute).first)
    found = backend.calibrate(ours, ["0"], config, compute, feed_of_batches(rows(compute)))
    backend.quantize(ours, ["0"], config, compute, found)
    theirs, x = by_the_library(make_config, compute), rows(compute)[0]
    assert torch.equal(ours(x), theirs(x))


# -- data


class CountedFeed(CalibrationFeed):
    passes = 0

    def __call__(self, module):
        type(self).passes += 1
        super().__call__(module)


@pytest.mark.parametrize(("at_once", "passes"), [(0, 1), (1, 3), (2, 2), (7, 1)])
def test_layers_at_once_change_the_passes_and_nothing_else(at_once, passes):
    config = config_of(activation_dtype="int8", algorithm="awq", calibration_layers_at_once=at_once)
    plain = feed_of_batches(batches())
    CountedFeed.passes = 0
    feed = CountedFeed(calls=plain.calls, num_samples=plain.num_samples, batch_size=plain.batch_size)
    model = calibrated(config, data=feed, names=NAMES)
    assert CountedFeed.passes == passes
    all_at_once = calibrated(config_of(activation_dtype="int8", algorithm="awq"), names=NAMES)
    x = torch.cat(batches(seed=5))
    assert torch.equal(model(x), all_at_once(x))


@pytest.mark.parametrize("scheme", ["int8 int8 awq", "int8 int8 smoothquant", "int8 int8 static", "float8 static"])
def test_batches_may_be_uneven_and_their_cut_does_not_matter(scheme):
    whole = torch.cat(batches((5,)))
    config = config_of(**SCHEMES[scheme])
    uneven = calibrated(config, data=list(whole.split(2)))
    one = calibrated(config, data=[whole])
    x = torch.cat(batches((1,), seed=5))
    assert torch.equal(uneven.first(x), one.first(x))


def test_inputs_that_are_written_into_later_are_kept_as_they_were():
    class Overwriting(Net):
        def forward(self, x):
            h = self.first(x)
            x.zero_()
            return h

    model, config = Overwriting(), config_of(algorithm="awq", activation_dtype="int8")
    model.load_state_dict(net().state_dict())
    found = backend.calibrate(model.requires_grad_(False), ["first"], config, None, feed_of_batches(batches()))
    wanted = backend.calibrate(net(), ["first"], config, None, feed_of_batches(batches()))
    assert torch.equal(found["first"].pre_scale, wanted["first"].pre_scale)


@pytest.mark.parametrize("scheme", ["int8 int8 awq", "int8 int8 smoothquant", "int8 int8 static", "float8 static"])
def test_a_layer_that_never_ran_is_named(scheme):
    class Skipping(Net):
        def forward(self, x):
            return self.first(x)

    with pytest.raises(ConfigError, match="^calibration: second never ran .*exclude it with modules_to_not_convert"):
        backend.calibrate(Skipping(), NAMES, config_of(**SCHEMES[scheme]), None, feed_of_batches(batches()))


def test_inputs_that_overflow_are_named():
    config = config_of(activation_dtype="int8", algorithm="smoothquant", compute="float16")
    data = [x * 1e4 for x in batches()]
    with pytest.raises(ConfigError, match="^calibration: first got NaN or infinity in torch.float16"):
        backend.calibrate(net(), ["first"], config, "float16", feed_of_batches(data))


@pytest.mark.parametrize("scheme", ["int4 64 awq", "int8 awq", "int8 int8 smoothquant", "int8 int8 static smoothquant"])
def test_a_channel_that_was_silent_may_speak_later(scheme):
    asked = SCHEMES[scheme]
    compute = "bfloat16" if asked.get("dtype") == "int4" else "float32"
    data = batches(dtype=compute)
    for x in data:
        x[..., 3] = 0
    model = calibrated(config_of(compute=compute, **asked), compute, data)
    assert error_of(model, compute) < 2 * error_of(calibrated(config_of(compute=compute, **asked), compute), compute)
    weight = net(compute).first.weight.float()
    column = backend.read_back(model.first).dense[:, 3]
    assert float((column - weight[:, 3]).norm() / weight[:, 3].norm()) < 0.3


def test_inputs_of_any_number_of_dimensions():
    for asked in ("int8 int8 static", "float8 static"):
        model = calibrated(config_of(**SCHEMES[asked]))
        x = torch.cat(batches((2,), seed=5))
        y = model.first(x)
        assert torch.equal(model.first(x[0]), y[0])
        single = model.first(x[0, 0])  # the kernel for one row may add up in another order
        assert float((single - y[0, 0]).norm() / single.norm()) < 1e-4
        assert torch.equal(model.first(x), y)


def test_another_compute_dtype_than_the_model(tmp_path):
    config = config_of(dtype="int4", group_size=64, algorithm="awq", compute="bfloat16")
    model = net()
    found = backend.calibrate(model, ["first"], config, "bfloat16", feed_of_batches(batches()))
    assert found["first"].pre_scale.dtype == torch.bfloat16
    backend.quantize(model, ["first"], config, "bfloat16", found)
    x = torch.cat(batches(seed=5))
    assert model(x).dtype == torch.float32
    backend.save(model, tmp_path)
    fresh = net()
    backend.load(fresh, ["first"], config, tmp_path)
    assert torch.equal(fresh(x), model(x))


@pytest.mark.slow
def test_files_load_in_a_new_process(tmp_path):
    config = config_of(dtype="float8_e4m3", activation_dtype="float8_e4m3", activation_scales="static")
    opaque = config_of(dtype="int4", group_size=64, int4_packing_format="opaque")
    for name, one in (("float8", config), ("int4", opaque)):
        model = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
        found = (
            backend.calibrate(model, ["0"], one, None, feed_of_batches([torch.ones(2, 64)]))
            if (one.needs_data)
            else None
        )
        backend.quantize(model, ["0"], one, None, found)
        backend.save(model, tmp_path / name)
        one.to_json_file(tmp_path / f"{name}.json")
        torch.save(model(torch.ones(2, 64)), tmp_path / f"{name}.pt")
    code = (
        "import sys, torch\n"
        "from quantlab.backends import torchao\n"
        "for name in ('float8', 'int4'):\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(64, 32)).requires_grad_(False)\n"
        "    torchao.load(model, ['0'], torchao.Config.from_json_file(name + '.json'), name)\n"
        "    assert torch.equal(model(torch.ones(2, 64)), torch.load(name + '.pt')), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- opaque int4 without data


@pytest.mark.parametrize("algorithm", ["max", "hqq"])
@pytest.mark.parametrize("compute", ["float32", "bfloat16", "float16"])
def test_opaque_int4_stores_half_a_byte(algorithm, compute, tmp_path):
    config = config_of("int4", group_size=64, algorithm=algorithm, compute=compute, int4_packing_format="opaque")
    model = calibrated(config, compute, names=["third"])
    stored = backend.read_back(model.third)
    assert (stored.dtype, stored.group_size, stored.is_simulated) == ("int4", 64, False)
    reference = net(compute).third.weight.float()
    assert 0 < float((stored.dense - reference).norm() / reference.norm()) < 0.1
    assert layer_memory(model.third)[0] == OUT * 32 // 2
    x = torch.randn(3, OUT, generator=torch.Generator().manual_seed(2)).to(getattr(torch, compute))
    through = nn.functional.linear(x.float(), stored.dense.float(), model.third.bias.float())
    assert float((model.third(x).float() - through).norm() / through.norm()) < (1e-5 if compute == "float32" else 0.01)


def test_auto_takes_the_packing_that_scales_inputs():
    assert config_of("int4", algorithm="awq").int4_packing_format == "opaque"
    assert config_of("int4").int4_packing_format == "unpacked_to_int8"
    unresolved = native_config(QuantizationAxes(backend="torchao", dtype="int4", algorithm="awq"))
    assert backend.resolve(unresolved, "cuda", "bfloat16").int4_packing_format == "tile_packed_to_4d"


def test_auto_group_sizes_are_fitted_to_the_layer():
    config = config_of("int4", algorithm="awq", compute="bfloat16")
    model = nn.Sequential(nn.Linear(96, 32), nn.Linear(32, 48)).to(torch.bfloat16).requires_grad_(False)
    data = feed_of_batches([torch.randn(4, 96, dtype=torch.bfloat16)])
    backend.quantize(model, ["0", "1"], config, None, backend.calibrate(model, ["0", "1"], config, None, data))
    assert [backend.read_back(layer).group_size for layer in model] == [32, None]  # a row of 32 is a group


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((32, 40), r"in_features 40 divides by none of its group sizes 32, 64, 128.*layer 0, \[32, 40\]"),
        ((33, 64), r"out_features 33 does not divide by 16 \(layer 0, \[33, 64\]\)"),
    ],
)
def test_layers_that_the_library_would_skip_are_refused_before_any_data_runs(shape, message):
    model = nn.Sequential(nn.Linear(shape[1], shape[0]))
    plain = feed_of_batches([torch.randn(2, shape[1])])
    CountedFeed.passes = 0
    feed = CountedFeed(calls=plain.calls, num_samples=2, batch_size=2)
    with pytest.raises(ConfigError, match=message):
        backend.calibrate(model, ["0"], config_of("int4", algorithm="awq"), None, feed)
    assert CountedFeed.passes == 0


# -- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["awq", "smoothquant"])
def test_tile_packed_int4_with_scaled_inputs(algorithm, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    axes = QuantizationAxes(backend="torchao", dtype="int4", group_size=64, algorithm=algorithm)
    config = backend.resolve(native_config(axes), "cuda", "bfloat16")
    plain, model = config.without_data(), net("bfloat16").cuda()
    feed = feed_of_batches([x.cuda() for x in batches(dtype="bfloat16")], device="cuda")
    backend.quantize(model, ["first"], config, "bfloat16", backend.calibrate(model, ["first"], config, None, feed))
    x = torch.cat(batches(dtype="bfloat16", seed=5)).cuda()
    reference, rounded = net("bfloat16").cuda(), net("bfloat16").cuda()
    backend.quantize(rounded, ["first"], plain, "bfloat16")
    errors = [float((m.first(x) - reference.first(x)).float().norm()) for m in (model, rounded)]
    assert errors[0] < 0.8 * errors[1]
    backend.save(model, tmp_path)
    backend.load(reference, ["first"], config, tmp_path)
    assert torch.equal(reference.first(x), model.first(x))
