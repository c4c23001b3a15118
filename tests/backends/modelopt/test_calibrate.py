"""ModelOpt's calibration: what each algorithm gains on outliers, that packing loses nothing of it, and its data."""

from __future__ import annotations

import copy
import functools
import sys

import pytest
import torch
from torch import nn

from quantlab.backends import modelopt as backend
from quantlab.errors import ConfigError, ModelError
from quantlab.modules.feed import feed_of_batches
from tests.support.modelopt_net import (
    HIDDEN,
    IN,
    LAYERS,
    NUM_BATCHES,
    RANK,
    calibrated,
    config_of,
    feed,
    make_model,
    outliers,
    quantized,
    relative,
)
from tests.support.tables import CAPABILITIES, layer_memory, storages
from tests.support.tiers import covering

ROWS = CAPABILITIES["modelopt"]
CASES = [(d, a) for d, row in ROWS.items() if "cpu" in row.devices for a in row.algorithms]
ACTIVATIONS = [
    *[
        ("int8", a, x, "static")
        for a in ROWS["int8"].algorithms
        for x in ("int8", "float8_e4m3")
        if (a, x) != ("smoothquant", "float8_e4m3")
    ],
    *[("int4", a, "int8", "dynamic") for a in ROWS["int4"].algorithms],
    ("int8", "smoothquant", "int8", "dynamic"),
    ("float8_e4m3", "awq_lite", "float8_e4m3", "static"),
    ("int3", "gptq", "int8", "static"),
]


@functools.cache
def errors(dtype, algorithm, activation="none", scales="dynamic", group="auto"):
    """(error of the first layer's output, error of the model's) on data that was not calibrated on."""
    x, model, reference = outliers(99), quantized(config_of(dtype, algorithm, activation, scales, group)), make_model()
    return relative(model[0](x), reference[0](x)), relative(model(x), reference(x))


def ratios(*case):
    dtype, algorithm, *rest = case
    return tuple(a / b for a, b in zip(errors(*case), errors(dtype, "max", *rest), strict=True))


# -- what it is for


@pytest.mark.parametrize(
    ("algorithm", "layer", "model"),
    [
        ("mse", 0.97, 0.98),
        ("awq_lite", 0.55, 0.85),
        ("awq_clip", 0.55, 0.70),
        ("awq_full", 0.45, 0.68),
        ("svdquant", 0.45, 0.68),
        ("gptq", 1.05, 0.88),
        ("local_hessian", 0.55, 0.70),
    ],
)
def test_four_bits_in_blocks_of_32(algorithm, layer, model):
    """Upper bounds of error over that of max; GPTQ helps layers behind the outliers only."""
    found = ratios("int4", algorithm, "none", "dynamic", 32)
    assert found[0] < layer
    assert found[1] < model


@pytest.mark.parametrize("scales", ["dynamic", "static"])
def test_smoothing_of_eight_bit_activations(scales):
    smooth = ratios("int8", "smoothquant", "int8", scales)
    assert smooth[0] < 0.4
    assert smooth[1] < 0.5
    assert ratios("int8", "awq_lite", "int8", scales)[0] < 0.7


@pytest.mark.parametrize(("dtype", "bound"), [("int3", 0.65), ("int2", 0.55)])
def test_fewer_bits(dtype, bound):
    assert ratios(dtype, "awq_full", "none", "dynamic", 32)[1] < bound
    assert errors(dtype, "max", "none", "dynamic", 32)[1] > errors("int4", "max", "none", "dynamic", 32)[1] * 2


def test_static_scales_are_those_of_the_data():
    config = config_of("int8", "max", "int8", "static")
    model, reference = quantized(config), make_model()
    largest = max(float(outliers(i).abs().max()) for i in range(NUM_BATCHES))
    assert float(model[0].input_quantizer.amax) == pytest.approx(largest, rel=1e-6)
    step = largest / 127
    x = outliers(99)
    by_hand = nn.functional.linear(
        (x / step).round().clamp(-128, 127) * step, backend.read_back(model[0]).dense, reference[0].bias
    )
    assert relative(model[0](x), by_hand) < 1e-6
    assert float(config_scale(quantized(config_of("int8", "max", "int8")))) == 0


def config_scale(model):
    """The stored scale of the first layer's activations; 0 where it is taken at run time."""
    amax = model[0].input_quantizer.amax
    return amax if amax is not None else 0


# -- nothing calibrated is lost


PACKED = [(d, a, g if g in ROWS[d].group_sizes else "auto") for g in ("none", 32) for d, a in CASES]


@pytest.mark.parametrize(("dtype", "algorithm", "group"), covering(dict.fromkeys(PACKED)))
def test_packed_is_simulated(dtype, algorithm, group):
    x, packed = outliers(99), quantized(config_of(dtype, algorithm, group=group))
    loose = quantized(config_of(dtype, algorithm, group=group, compress=False))
    for i in (0, 2):
        a, b = backend.read_back(packed[i]), backend.read_back(loose[i])
        # plain maxima are packed by the library, which rounds ties otherwise
        assert relative(a.dense, b.dense) < (1e-3 if algorithm == "max" else 1e-6)
        assert b.is_simulated
        assert a.is_simulated == (dtype in ("int3", "int2"))
        assert (a.dtype, a.group_size) == (b.dtype, b.group_size)
        assert a.dtype == dtype
    assert relative(packed[0](x), loose[0](x)) < (1e-3 if algorithm == "max" else 1e-6)
    if algorithm != "smoothquant":  # the weight in effect, smoothing and low-rank branch included
        by_hand = nn.functional.linear(x, backend.read_back(packed[0]).dense, packed[0].bias)
        assert relative(packed[0](x), by_hand) < 1e-5


@pytest.mark.parametrize(("dtype", "algorithm"), covering(c for c in CASES if c[1] != "max"))
def test_no_algorithm_is_max_in_silence(dtype, algorithm):
    activation = "int8" if algorithm == "smoothquant" else "none"
    plain = quantized(config_of(dtype, "max", activation))
    model = quantized(config_of(dtype, algorithm))
    assert not torch.equal(backend.read_back(model[0]).dense, backend.read_back(plain[0]).dense)
    assert errors(dtype, algorithm)[1] < errors(dtype, "max", activation)[1]


@pytest.mark.parametrize(("dtype", "algorithm", "activation", "scales"), covering(ACTIVATIONS))
def test_files_with_activations(dtype, algorithm, activation, scales, tmp_path):
    config = config_of(dtype, algorithm, activation, scales)
    model, x = quantized(config), outliers(99)
    inputs = model[0].input_quantizer
    assert backend.read_back(model[0]).activation_dtype == activation
    assert inputs._dynamic == (scales == "dynamic")
    assert inputs.axis is None
    assert hasattr(inputs, "_amax") == (scales == "static")
    check_files(model, config, x, tmp_path)


@pytest.mark.parametrize(
    ("dtype", "algorithm", "compute", "compress"),
    covering((*case, *how) for how in (("bfloat16", True), ("float32", False)) for case in CASES),
)
def test_files(dtype, algorithm, compute, compress, tmp_path):
    """Packed float32 layers are in the test of every backend's files."""
    config = config_of(dtype, algorithm, compress=compress)
    check_files(quantized(config, compute), config, outliers(99).to(getattr(torch, compute)), tmp_path)


def check_files(model, config, x, folder):
    y = model(x)
    assert y.isfinite().all()
    backend.save(model, folder)
    fresh = make_model(str(x.dtype).removeprefix("torch."))
    for layer in (fresh[0], fresh[2]):
        layer.weight.mul_(0.5)
        layer.bias.zero_()
    backend.load(fresh, LAYERS, config, folder)
    assert torch.equal(fresh(x), y)
    for i in (0, 2):
        assert layer_memory(fresh[i]) == layer_memory(model[i])


def test_another_compute_dtype_than_the_models(tmp_path):
    model, config = make_model(), config_of("int4", "awq_full")
    backend.calibrate(model, LAYERS, config, "bfloat16", feed())
    backend.quantize(model, LAYERS, config, "bfloat16")
    assert model[0].weight.metadata["dtype"] == torch.bfloat16
    check_files(model, config, outliers(99), tmp_path)


def test_files_of_another_algorithm_are_refused(tmp_path):
    backend.save(quantized(config_of("int4", "awq_lite")), tmp_path)
    for algorithm in ("max", "svdquant"):
        with pytest.raises(ModelError, match="was saved in another format"):
            backend.load(make_model(), LAYERS, config_of("int4", algorithm), tmp_path)
    backend.save(quantized(config_of("int3", "mse", group=32)), tmp_path)
    with pytest.raises(ModelError, match="0 is stored as int3, not int2"):
        backend.load(make_model(), LAYERS, config_of("int2", "mse", group=32), tmp_path)


# -- bytes


def test_branches_and_scales_are_counted_and_leftovers_are_not():
    plain = layer_memory(quantized(config_of("int4", "max"))[0])
    assert plain == (IN * HIDDEN // 2, 2 * 4 * IN * HIDDEN // 128)
    for algorithm, extra in {
        "awq_lite": IN,
        "awq_full": IN,
        "svdquant": IN + RANK * (IN + HIDDEN),
        "awq_clip": 0,
        "gptq": 0,
        "local_hessian": 0,
        "mse": 0,
    }.items():
        model = quantized(config_of("int4", algorithm))
        assert layer_memory(model[0]) == (plain[0], plain[1] + 4 * extra), algorithm
        loose = calibrated(config_of("int4", algorithm, compress=False))
        held = sum(storages(loose[0]).values())
        assert held == 4 * (IN * HIDDEN + HIDDEN + IN * HIDDEN // 128 + extra), algorithm
        assert not loose[0]._forward_pre_hooks
        assert "forward" not in vars(loose[0])


def test_moments_are_bounded_and_rounds_change_nothing(monkeypatch):
    config = config_of("int4", "gptq")
    whole = quantized(config)
    monkeypatch.setattr(sys.modules[backend.calibrate.__module__], "_HESSIAN_BYTES", 1)
    parted = quantized(config)
    for i in (0, 2):
        assert torch.equal(backend.read_back(whole[i]).dense, backend.read_back(parted[i]).dense)


# -- what is asked of the data


def test_a_layer_that_never_runs_is_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(IN, 32), nn.Linear(IN, 32)

        def forward(self, x):
            return self.used(x)

    for dtype, algorithm in (("int4", "awq_lite"), ("int4", "gptq"), ("int8", "smoothquant")):
        with pytest.raises(ConfigError, match=r"^calibration: idle never ran .*; exclude it with modules_to_not_conv"):
            backend.calibrate(Half().requires_grad_(False), ["used", "idle"], config_of(dtype, algorithm), None, feed())


def test_inputs_that_are_not_finite_are_named():
    class Overflows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(IN, 32)

        def forward(self, x):
            return self.first(x / 0)

    with pytest.raises(ConfigError, match="^calibration: first got NaN or infinity on the calibration data"):
        backend.calibrate(Overflows().requires_grad_(False), ["first"], config_of("int4", "awq_lite"), None, feed())


def test_the_models_own_errors_stay_what_they_are():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(IN, 32)

        def forward(self, x):
            raise ValueError("mine")

    with pytest.raises(ValueError, match="^mine$"):
        backend.calibrate(Broken().requires_grad_(False), ["first"], config_of("int4", "awq_lite"), None, feed())


def test_the_progress_bar_is_seen_and_the_library_is_not(capsys):
    calls = feed_of_batches([outliers(0)])
    shown = type(calls)(calls=calls.calls, num_samples=256, batch_size=256, on_call=lambda i, n: print(f"{i} of {n}"))
    backend.calibrate(make_model(), LAYERS, config_of("int4", "gptq"), "float32", shown)
    said = capsys.readouterr()
    assert said.out == "1 of 1\n1 of 1\n"
    assert said.err == ""


def test_only_the_named_layers():
    model, config = make_model(), config_of("int4", "svdquant")
    backend.calibrate(model, ["2"], config, "float32", feed())
    assert type(model[0]) is nn.Linear
    with pytest.raises(ConfigError, match=r"^algorithm=svdquant: 0 saw no calibration data"):
        backend.quantize(model, LAYERS, config, "float32")
    backend.quantize(model, ["2"], config, "float32")
    assert backend.read_back(model[2]).dtype == "int4"
    with pytest.raises(ConfigError, match="2 is already quantized"):
        backend.calibrate(model, ["2"], config, "float32", feed())


def test_calibrated_models_can_be_copied_until_they_are_packed():
    model = calibrated(config_of("int4", "awq_full"))
    twin = copy.deepcopy(model)
    for m in (model, twin):
        backend.quantize(m, LAYERS, config_of("int4", "awq_full"), "float32")
    assert torch.equal(model(outliers(99)), twin(outliers(99)))
