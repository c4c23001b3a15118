"""Calibration as every backend has it: what it says of bad data, which batches it takes, and the bytes that it adds."""

from __future__ import annotations

import pytest
import torch

import quantlab
from quantlab.backends import gguf
from quantlab.errors import ConfigError
from quantlab.modules.feed import feed_of_batches
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import native_config

# -- bad data that only shows on the way


class Branched(torch.nn.Module):
    """Two layers run one after the other, the third never."""

    def __init__(self, between=None):
        super().__init__()
        self.first, self.second, self.idle = (torch.nn.Linear(64, 64) for _ in range(3))
        self.between = between or torch.nn.Identity()

    def forward(self, x):
        return self.second(self.between(self.first(x)))


class Logarithm(torch.nn.Module):
    def forward(self, x):
        return torch.log(-x.abs())


NEED_DATA = [
    ("gguf", "q4_0", {"algorithm": "imatrix"}, {}),
    ("quanto", "int8", {"activation_dtype": "int8"}, {}),
    ("torchao", "int8", {"activation_dtype": "int8", "algorithm": "awq"}, {}),
    ("torchao", "int8", {"activation_dtype": "int8", "algorithm": "smoothquant"}, {}),
    ("torchao", "int8", {"activation_dtype": "int8"}, {"activation_scales": "static"}),
    *(("modelopt", "int4", {"algorithm": a}, {}) for a in ("awq_lite", "awq_clip", "svdquant", "gptq")),
    *(
        ("modelopt", "int8", {"activation_dtype": "int8", "algorithm": a}, {"activation_scales": "static"})
        for a in ("max", "smoothquant", "awq_lite", "local_hessian")
    ),
]


def config_of(backend, dtype, axes, settings, **more):
    return native_config(QuantizationAxes(backend=backend, dtype=dtype, **axes, **more), settings)


@pytest.mark.parametrize(("backend", "dtype", "axes", "settings"), NEED_DATA)
def test_every_backend_names_a_layer_that_never_ran_and_one_that_gets_nan(backend, dtype, axes, settings):
    config = config_of(backend, dtype, axes, settings)
    batches = [torch.randn(8, 64), torch.randn(8, 64)]
    with pytest.raises(ConfigError, match=r"^calibration: idle never ran on the calibration data; exclude it with mod"):
        quantlab.quantize(Branched(), config, calibration=batches)
    exclusion = {"modules_to_not_convert": {"mine": ["idle"]}}
    config = config_of(backend, dtype, axes, settings, **exclusion)
    quantlab.quantize(Branched(), config, calibration=batches)
    with pytest.raises(ConfigError, match=r"^calibration: second got NaN"):
        quantlab.quantize(Branched(Logarithm()), config, calibration=batches)


@pytest.mark.parametrize(("backend", "dtype", "axes", "settings"), NEED_DATA)
def test_batches_of_unequal_size_are_taken(backend, dtype, axes, settings):
    """No backend keeps inputs in a way that wants equal batches; the cut of the data changes no layer's dtype."""
    config = config_of(backend, dtype, axes, settings, modules_to_not_convert={"mine": ["idle"]})
    _, report = quantlab.quantize(Branched(), config, calibration=[torch.randn(8, 64), torch.randn(3, 64)])
    assert [r.status for r in report.layers] == ["quantized", "quantized", "excluded"]


@pytest.mark.parametrize(("backend", "dtype", "axes", "settings"), NEED_DATA)
def test_inputs_of_several_numbers_of_dimensions_are_taken(backend, dtype, axes, settings):
    """A layer that is given rows, and batches of rows, as those of a time embedding and of a sequence."""
    config = config_of(backend, dtype, axes, settings, modules_to_not_convert={"mine": ["idle"]})
    torch.manual_seed(0)
    module, rows = Branched(), torch.randn(12, 64)
    found = [
        quantlab.quantize(module, config, calibration=[rows[:4], shaped])[0](rows)
        for shaped in (rows[4:], rows[4:].reshape(2, 4, 64), rows[4:].reshape(2, 2, 2, 64))
    ]
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


# -- bits


@pytest.mark.parametrize(
    ("backend", "dtype", "axes", "settings", "plain"),
    [
        ("modelopt", "int4", {"algorithm": "awq_lite"}, {}, {}),
        ("modelopt", "int4", {"algorithm": "svdquant"}, {}, {"algorithm": "awq_lite"}),
        (
            "modelopt",
            "int8",
            {"algorithm": "smoothquant", "activation_dtype": "int8"},
            {},
            {"activation_dtype": "int8"},
        ),
        (
            "modelopt",
            "int8",
            {"activation_dtype": "int8"},
            {"activation_scales": "static"},
            {"activation_dtype": "int8"},
        ),
        ("torchao", "int8", {"algorithm": "smoothquant", "activation_dtype": "int8"}, {}, {"activation_dtype": "int8"}),
        ("torchao", "int8", {"algorithm": "awq", "activation_dtype": "int8"}, {}, {"activation_dtype": "int8"}),
        (
            "torchao",
            "int8",
            {"activation_dtype": "int8"},
            {"activation_scales": "static"},
            {"activation_dtype": "int8"},
        ),
    ],
)
def test_bits_per_weight_count_what_the_algorithm_adds(backend, dtype, axes, settings, plain):
    net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 256))
    batches = [torch.randn(16, 256)]
    bits = []
    for chosen, own in ((plain, {}), (axes, settings)):
        config = config_of(backend, dtype, chosen, own)
        _, report = quantlab.quantize(net, config, calibration=batches if config.needs_data else None)
        bits.append([r.bits_per_weight for r in report.layers])
    added = [(after - before) * 256 * 256 / 8 for before, after in zip(*bits, strict=True)]
    wanted = {"awq_lite": 256 * 2, "smoothquant": 256 * 2, "awq": 256 * 2, "svdquant": 32 * (256 + 256) * 2}
    least = wanted.get(axes.get("algorithm"), 1)
    assert all(least <= bytes_added <= 2 * least + 64 for bytes_added in added), added


# -- layers that fall back


def test_a_recorded_importance_matrix_serves_what_falls_back(tmp_path):
    """From the file as from the data, byte for byte; a type that takes none falls back without."""
    net = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
    batch = torch.randn(200, 256) * torch.linspace(0.1, 5, 256)
    config = gguf.Config(gguf_type="q4_k", algorithm="imatrix")
    found, report = quantlab.quantize(net, config, calibration=[batch], on_mismatch="q5_0")
    assert [(r.status, r.dtype) for r in report.layers] == [("quantized", "q4_k"), ("fallback", "q5_0")]
    plain, _ = quantlab.quantize(net, gguf.Config(gguf_type="q4_k"), on_mismatch="q5_0")
    assert not torch.equal(found[2].qweight, plain[2].qweight)
    statistics = gguf.calibrate(net, ["0", "2"], config, "float32", feed_of_batches([batch]))
    file = gguf.write_calibration(statistics, tmp_path, feed_of_batches([batch]))
    from_file, _ = quantlab.quantize(
        net, gguf.Config(gguf_type="q4_k", algorithm="imatrix", imatrix_file=str(file)), on_mismatch="q5_0"
    )
    other, _ = quantlab.quantize(net, config, calibration=[batch], on_mismatch="q8_0")
    for i in (0, 2):
        assert torch.equal(from_file[i].qweight, found[i].qweight)
    assert torch.equal(other[0].qweight, found[0].qweight)
