"""ModelOpt: every promise of the capability table that a CPU can keep."""

from __future__ import annotations

import copy
import json

import pytest

from quantlab.backends import modelopt as backend
from quantlab.backends.modelopt import NVIDIAModelOptConfig
from quantlab.errors import ConfigError, ModelError, NotQuantized
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

ROWS = CAPABILITIES["modelopt"]
OUT, IN = 64, 512
BOUNDS = {"int8": 0.01, "int4": 0.18, "int3": 0.4, "int2": 0.9, "float8_e4m3": 0.03}
"""dtype -> upper bound of ||W - Wq|| / ||W|| for normal weights."""
CPU_CASES = [(d, g) for d, row in ROWS.items() if "cpu" in row.devices for g in ("auto", *row.group_sizes)]


def axes(dtype="int8", group_size="auto", **more):
    return QuantizationAxes(backend="modelopt", dtype=dtype, group_size=group_size, **more)


def make_model(dtype="float32", shape=(OUT, IN), bias=True):
    import torch

    torch.manual_seed(0)
    inner, last = torch.nn.Linear(shape[1], shape[0], bias=bias), torch.nn.Linear(shape[0], 8)
    torch.nn.init.normal_(inner.weight)
    return torch.nn.Sequential(torch.nn.Sequential(inner), last).to(getattr(torch, dtype)).eval()


def inputs(dtype="float32", num=IN):
    import torch

    return torch.randn(3, num, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))


def quantized(config, dtype="float32", **kwargs):
    model = make_model(dtype, **kwargs)
    backend.quantize(model, ["0.0"], backend.resolve(config, "cpu"), dtype)
    return model


def stored_bytes(layer):
    """Codes and everything that the weight's quantizer holds, found through attributes and not through a state dict."""
    import torch

    held = [layer.weight, *vars(layer.weight_quantizer)["_buffers"].values()]
    held += [v for v in vars(layer.weight_quantizer._calibrator).values() if isinstance(v, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held if t is not None)


# -- the promises of the table


@pytest.mark.parametrize(("dtype", "group"), CPU_CASES)
@pytest.mark.parametrize("compress", [True, False])
def test_promise(dtype, group, compress, tmp_path):
    import torch

    config = NVIDIAModelOptConfig.from_axes(axes(dtype, group), {"compress": compress})
    model = quantized(config)
    layer, reference = model[0][0], make_model()[0][0].weight.detach()
    stored = backend.read_back(layer)
    is_simulated = not compress or "cpu" in ROWS[dtype].is_simulated_on
    assert (stored.dtype, stored.activation_dtype, stored.is_simulated) == (dtype, "none", is_simulated)
    wanted = (
        {"int4": 128, "int3": 128, "int2": 32}.get(dtype)
        if group == "auto"
        else None
        if group in ("none", IN)
        else group
    )
    assert stored.group_size == wanted
    assert 0 < float((stored.dense - reference).norm() / reference.norm()) < BOUNDS[dtype]
    num_scales = 1 if (dtype, group) == ("float8_e4m3", "auto") else OUT * IN // (wanted or IN)
    codes = OUT * IN // (2 if dtype == "int4" else 1)
    assert stored_bytes(layer) == (codes + 8 * num_scales if compress else 4 * OUT * IN + 4 * num_scales)
    with torch.no_grad():
        y = model(inputs())
        assert y.isfinite().all()
        by_hand = torch.nn.functional.linear(inputs(), stored.dense, layer.bias)
        assert torch.allclose(model[0](inputs()), by_hand, atol=1e-4)
        model.state_dict()
        assert torch.equal(model(inputs()), y)
        backend.save(model, tmp_path)
        fresh = make_model()
        fresh[0][0].weight.mul_(0.5)
        fresh[0][0].bias.zero_()
        backend.load(fresh, ["0.0"], config, tmp_path)
        assert torch.equal(fresh(inputs()), y)


@pytest.mark.parametrize("dtype", [d for d, row in ROWS.items() if "cpu" in row.devices])
def test_packing_changes_no_weight(dtype):
    import torch

    config = NVIDIAModelOptConfig.from_axes(axes(dtype))
    packed, loose = (
        backend.read_back(quantized(c)[0][0]).dense
        for c in (config, NVIDIAModelOptConfig.from_axes(axes(dtype), {"compress": False}))
    )
    assert torch.allclose(packed, loose, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "compute"), [(d, c) for d, row in ROWS.items() if "cpu" in row.devices for c in row.compute_dtypes]
)
def test_compute_dtypes(dtype, compute, tmp_path):
    import torch

    config = NVIDIAModelOptConfig.from_axes(axes(dtype))
    with torch.no_grad():
        model = quantized(config, compute)
        assert model(inputs(compute)).dtype == getattr(torch, compute)
        inside = make_model("float32", bias=False)
        backend.quantize(inside, ["0.0"], config, compute)
        y = inside(inputs())
        assert y.dtype == torch.float32
        backend.save(inside, tmp_path)
        fresh = make_model("float32", bias=False)
        backend.load(fresh, ["0.0"], config, tmp_path)
        assert torch.equal(fresh(inputs()), y)


@pytest.mark.parametrize(
    ("dtype", "group"),
    [
        ("int8", "auto"),
        ("int8", "none"),
        ("int4", "auto"),
        ("int4", "none"),
        ("float8_e4m3", "auto"),
        ("float8_e4m3", "none"),
    ],
)
@pytest.mark.parametrize("num", [10, 9])
def test_odd_shapes(dtype, group, num, tmp_path):
    import torch

    config = NVIDIAModelOptConfig.from_axes(axes(dtype, group))
    with torch.no_grad():
        model = quantized(config, shape=(33, num))
        stored = backend.read_back(model[0][0])
        assert stored.group_size is None
        assert stored.is_simulated == (dtype == "int4" and num == 9)  # two codes share a byte
        y = model(inputs(num=num))
        backend.save(model, tmp_path)
        fresh = make_model(shape=(33, num))
        backend.load(fresh, ["0.0"], config, tmp_path)
        assert torch.equal(fresh(inputs(num=num)), y)


@pytest.mark.parametrize(("num", "group"), [(256, 128), (192, 64), (96, 32), (48, 16), (40, None)])
def test_auto_block_is_lowered_until_it_divides(num, group):
    stored = backend.read_back(quantized(NVIDIAModelOptConfig.from_axes(axes("int4")), shape=(OUT, num))[0][0])
    assert (stored.group_size, stored.is_simulated) == (group, False)


@pytest.mark.parametrize("dtype", BOUNDS)
def test_zero_rows_stay_zero(dtype):
    import torch

    for group in ("auto", "none"):
        model = make_model()
        with torch.no_grad():
            model[0][0].weight[3] = 0
        backend.quantize(model, ["0.0"], NVIDIAModelOptConfig.from_axes(axes(dtype, group)))
        dense = backend.read_back(model[0][0]).dense
        assert dense.isfinite().all()
        assert (dense[3] == 0).all()
        assert model(inputs()).isfinite().all()


def test_only_the_named_layers_and_not_twice(capsys):
    import torch

    model = torch.nn.ModuleDict({"proj_out": make_model(), "lm_head": make_model()})
    config = NVIDIAModelOptConfig("INT8", channel_quantize=0)
    backend.quantize(model, ["proj_out.0.0", "lm_head.1"], config)
    for name, module in model.named_modules():
        if name.endswith(("0.0", ".1")):
            is_wanted = name in ("proj_out.0.0", "lm_head.1")
            assert hasattr(module, "weight_quantizer") == is_wanted, name
            assert (type(module) is torch.nn.Linear) != is_wanted
    with pytest.raises(NotQuantized, match="backend=modelopt: Linear"):
        backend.read_back(model["proj_out"][1])
    with pytest.raises(ConfigError, match=r"lm_head\.1 is already quantized"):
        backend.quantize(model, ["lm_head.1"], config)
    assert capsys.readouterr().out == ""


def test_impossible_layers_are_refused_and_nothing_changes():
    import torch

    model = make_model(shape=(OUT, 96))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=r"group_size=64: 0\.0 \[64, 96\]: in_features 96 does not divide by 64"):
        backend.quantize(model, ["1", "0.0"], NVIDIAModelOptConfig.from_axes(axes("int8", 64)))
    for kind in ("NVFP4", "MXFP8", "MXFP4"):
        with pytest.raises(ConfigError, match=f"{kind}: ModelOpt computes it on CUDA only and 0.0 is on cpu"):
            backend.quantize(model, ["0.0"], NVIDIAModelOptConfig(kind))
    config = NVIDIAModelOptConfig("INT8", channel_quantize=0, algorithm="awq_lite")
    with pytest.raises(ConfigError, match=r"^algorithm=awq_lite: 0\.0 saw no calibration data.*algorithm=max$"):
        backend.quantize(model, ["0.0"], config)
    assert type(model[1]) is torch.nn.Linear
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_activations_are_rounded_where_the_config_says_so():
    import torch

    config = NVIDIAModelOptConfig("INT8_FP8", channel_quantize=0, weight_only=False)
    model = quantized(config)
    stored = backend.read_back(model[0][0])
    assert (stored.dtype, stored.activation_dtype) == ("int8", "float8_e4m3")
    with torch.no_grad():
        exact = torch.nn.functional.linear(inputs(), stored.dense, model[0][0].bias)
        assert 0.01 < float((model[0](inputs()) - exact).norm() / exact.norm()) < 0.06


def test_a_pasted_config():
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*lm_head*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "block_sizes": {"-1": 64}}},
    ]
    config = NVIDIAModelOptConfig("INT8", modelopt_config={"quant_cfg": entries, "algorithm": "max"})
    assert backend.read_back(quantized(config)[0][0]).group_size == 64
    assert NVIDIAModelOptConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    mapping = {"quant_cfg": {"*weight_quantizer": {"num_bits": [4, 3], "axis": 0}, "default": {"enable": False}}}
    config = NVIDIAModelOptConfig("FP8", modelopt_config=mapping)
    assert backend.read_back(quantized(config)[0][0]).dtype == "float8_e4m3"
    with pytest.raises(ConfigError, match=r"modelopt_config: 0\.0 \[64, 100\]"):
        quantized(NVIDIAModelOptConfig("INT8", modelopt_config={"quant_cfg": entries}), shape=(OUT, 100))


def test_files_of_something_else_are_refused(tmp_path):
    config = NVIDIAModelOptConfig.from_axes(axes("int8"))
    with pytest.raises(ModelError, match="no readable ModelOpt weights"):
        backend.load(make_model(), ["0.0"], config, tmp_path)
    backend.save(quantized(config), tmp_path)
    with pytest.raises(ModelError, match="other layers than were asked for"):
        backend.load(make_model(), ["0.0", "1"], config, tmp_path)
    with pytest.raises(ModelError, match="was saved in another format"):
        backend.load(make_model(), ["0.0"], NVIDIAModelOptConfig.from_axes(axes("int8", 64)), tmp_path)
    with pytest.raises(ModelError, match="was saved with shape"):
        backend.load(make_model(shape=(32, IN)), ["0.0"], config, tmp_path)


# -- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [d for d, row in ROWS.items() if "cpu" not in row.devices])
def test_block_floats(dtype, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config, model = NVIDIAModelOptConfig.from_axes(axes(dtype)), make_model("bfloat16").cuda()
    backend.quantize(model, ["0.0"], config, "bfloat16")
    stored = backend.read_back(model[0][0])
    assert (stored.dtype, stored.group_size) == (dtype, ROWS[dtype].group_sizes[0])
    reference = make_model("bfloat16")[0][0].weight.detach().float().cuda()
    assert 0 < float((stored.dense - reference).norm() / reference.norm()) < 0.14
    with torch.no_grad():
        x = inputs("bfloat16").cuda()
        backend.save(model, tmp_path)
        fresh = make_model("bfloat16").cuda()
        backend.load(fresh, ["0.0"], config, tmp_path)
        assert torch.equal(fresh(x), model(x))
