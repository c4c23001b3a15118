"""torchao: every promise of the capability table that a CPU can keep."""

from __future__ import annotations

import copy
import math

import pytest

from quantlab.backends import torchao as backend
from quantlab.backends.torchao import TorchAoConfig
from quantlab.errors import ConfigError, ModelError, NotQuantized
from tests.support.torchao_cases import CASES, ROWS, axes

OUT, IN = 64, 512
BOUNDS = {
    "int8": 0.01,
    "float8_e4m3": 0.03,
    "float8_e5m2": 0.06,
    "int4": 0.16,
    "int3": 0.35,
    "int2": 0.9,
    "nf4": 0.1,
    "nvfp4": 0.11,
    "mxfp8": 0.03,
    "mxfp4": 0.13,
}
"""dtype -> upper bound of ||W - Wq|| / ||W|| for normal weights."""


def make_model(dtype="float32", shape=(OUT, IN), seed=0):
    import torch

    torch.manual_seed(seed)
    inner, last = torch.nn.Linear(shape[1], shape[0]), torch.nn.Linear(shape[0], 8)
    torch.nn.init.normal_(inner.weight)
    return torch.nn.Sequential(torch.nn.Sequential(inner), last).to(getattr(torch, dtype)).eval()


def inputs(dtype="float32", num=IN):
    import torch

    return torch.randn(3, num, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))


def num_bytes(tensor):
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def expected_bytes(dtype, num_groups, scale_bytes):
    """The library's layouts, for an (OUT, IN) weight: codes, scales, zero points, tables."""
    n = OUT * IN
    swizzled = math.ceil(OUT / 128) * 128 * math.ceil(IN / {"nvfp4": 16}.get(dtype, 32) / 4) * 4
    return {
        "int8": n + num_groups * (4 + 1),
        "float8_e4m3": n + num_groups * 4,
        "float8_e5m2": n + num_groups * 4,
        "nf4": n // 2 + n // 64 + scale_bytes * (n // 64 // 256 + 1 + 16),
        "nvfp4": n // 2 + swizzled + 4,
        "mxfp8": n + swizzled,
        "mxfp4": n // 2 + swizzled,
    }.get(dtype, n + num_groups * (scale_bytes + 1))


def quantized(config, dtype="float32", **kwargs):
    model = make_model(dtype, **kwargs)
    backend.quantize(model, ["0.0"], backend.resolve(config, "cpu"), dtype)
    return model


# -- the promises of the table


@pytest.mark.parametrize(("dtype", "group", "act", "algorithm"), CASES)
def test_promise(dtype, group, act, algorithm, tmp_path):
    import torch

    config = TorchAoConfig.from_axes(axes(dtype, group, act, algorithm))
    compute = ROWS[dtype].compute_dtypes[0]
    model = quantized(config, compute)
    layer, reference = model[0][0], make_model(compute)[0][0].weight.detach().float()
    stored = backend.read_back(layer)
    assert (stored.dtype, stored.activation_dtype) == (dtype, act)
    assert stored.is_simulated == (dtype in ("int4", "int3", "int2"))
    default = {
        "int8": None,
        "float8_e4m3": None,
        "float8_e5m2": None,
        "nf4": 64,
        "nvfp4": 16,
        "mxfp8": 32,
        "mxfp4": 32,
        "int4": 32 if act == "int8" else 128,
    }.get(dtype, 128)
    wanted = default if group == "auto" else None if group in ("none", IN) else group
    assert stored.group_size == wanted
    error = float((stored.dense - reference).norm() / reference.norm())
    assert 0 < error < BOUNDS[dtype]
    num_groups = OUT if stored.group_size is None else OUT * IN // stored.group_size
    assert num_bytes(layer.weight) == expected_bytes(dtype, num_groups, 2 if compute == "bfloat16" else 4)
    with torch.no_grad():
        x = inputs(compute)
        y = model(x)
        assert y.isfinite().all()
        model.state_dict()
        assert torch.equal(model(x), y)
        backend.save(model, tmp_path)
        fresh = make_model(compute)
        with torch.no_grad():
            fresh[0][0].weight.mul_(0.5)
        backend.load(fresh, ["0.0"], config, tmp_path)
        assert torch.equal(fresh(x), y)
    assert TorchAoConfig.from_axes(config.axes()) == config


@pytest.mark.parametrize(
    ("dtype", "compute"),
    [(d, c) for d, row in ROWS.items() for c in row.compute_dtypes if (d, c) != ("nvfp4", "float16")],
)
def test_compute_dtypes(dtype, compute):
    import torch

    with torch.no_grad():
        model = quantized(TorchAoConfig.from_axes(axes(dtype)), compute)
        assert model(inputs(compute)).dtype == getattr(torch, compute)
        assert backend.read_back(model[0][0]).dtype == dtype


def test_another_compute_dtype_than_the_model_casts_around_the_layer(tmp_path):
    import torch

    config, model = TorchAoConfig.from_axes(axes("mxfp8")), make_model("float32")
    backend.quantize(model, ["0.0"], config, "bfloat16")
    with torch.no_grad():
        y = model(inputs())
        assert y.dtype == torch.float32
        backend.save(model, tmp_path)
        fresh = make_model("float32")
        backend.load(fresh, ["0.0"], config, tmp_path)
        assert torch.equal(fresh(inputs()), y)


@pytest.mark.parametrize(
    ("dtype", "act"),
    [("int8", "none"), ("int8", "int8"), ("float8_e4m3", "none"), ("int4", "none"), ("int4", "int8"), ("int2", "none")],
)
def test_odd_shapes(dtype, act):
    import torch

    with torch.no_grad():
        model = quantized(TorchAoConfig.from_axes(axes(dtype, "auto", act)), shape=(33, 10))
        assert model(inputs(num=10)).isfinite().all()
        assert backend.read_back(model[0][0]).group_size is None


@pytest.mark.parametrize(("num", "group"), [(256, 128), (192, 64), (96, 32), (48, 16), (40, None)])
def test_auto_group_is_lowered_until_it_divides(num, group):
    model = quantized(TorchAoConfig.from_axes(axes("int3")), shape=(OUT, num))
    assert backend.read_back(model[0][0]).group_size == group


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("rows", [slice(3, 4), slice(None)])
def test_zero_rows_stay_zero(dtype, rows):
    import torch

    compute = ROWS[dtype].compute_dtypes[0]
    model = make_model(compute)
    with torch.no_grad():
        model[0][0].weight[rows] = 0
    backend.quantize(model, ["0.0"], backend.resolve(TorchAoConfig.from_axes(axes(dtype)), "cpu"), compute)
    dense = backend.read_back(model[0][0]).dense
    assert dense.isfinite().all()
    assert (dense[rows] == 0).all()
    with torch.no_grad():
        assert model(inputs(compute)).isfinite().all()


@pytest.mark.parametrize(
    ("dtype", "group", "shape", "compute", "message"),
    [
        ("int8", 64, (OUT, 100), "float32", r"group_size=64: in_features 100 .*layer 0\.0, \[64, 100\]"),
        ("int4", 128, (OUT, 96), "float32", r"group_size=128: in_features 96 does not divide"),
        ("int2", 16, (OUT, 40), "float32", r"group_size=16: in_features 40"),
        ("nf4", "auto", (OUT, 100), "float32", r"dtype=nf4: 6400 weights do not divide by 16384"),
        ("nvfp4", "auto", (33, 64), "float32", r"dtype=nvfp4: both sides"),
        ("nvfp4", "auto", (OUT, IN), "float16", r"compute_dtype=float16: torchao nvfp4"),
        ("mxfp8", "auto", (OUT, 40), "bfloat16", r"in_features 40 does not divide by 32"),
        ("mxfp4", "auto", (OUT, IN), "float32", r"compute_dtype=float32: .*set compute_dtype=bfloat16"),
    ],
)
def test_impossible_layers_are_refused_and_nothing_changes(dtype, group, shape, compute, message):
    import torch

    model = make_model(compute, shape=shape)
    before = copy.deepcopy(model.state_dict())
    config = backend.resolve(TorchAoConfig.from_axes(axes(dtype, group)), "cpu")
    with pytest.raises(ConfigError, match=message):
        backend.quantize(model, ["0.0"], config, compute)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_cuda_only_schemes_are_refused_on_a_cpu():
    with pytest.raises(ConfigError, match="activation_dtype=float8_e4m3: torchao needs CUDA"):
        quantized(TorchAoConfig.from_axes(axes("float8_e4m3", "auto", "float8_e4m3")))
    tiles = TorchAoConfig.from_axes(axes("int4", 64), {"int4_packing_format": "tile_packed_to_4d"})
    with pytest.raises(ConfigError, match="tile_packed_to_4d: it needs CUDA and bfloat16"):
        quantized(tiles)


def test_only_the_named_layers_and_not_twice():
    model = quantized(TorchAoConfig("int8wo"))
    assert type(model[1].weight.data).__name__ == "Tensor"
    with pytest.raises(NotQuantized, match="backend=torchao: Linear"):
        backend.read_back(model[1])
    with pytest.raises(ConfigError, match=r"0\.0 is already quantized"):
        backend.quantize(model, ["0.0"], TorchAoConfig("int8wo"))


def test_asymmetric_grids_are_nearer():
    import torch

    reference = make_model()[0][0].weight.detach()
    errors = {}
    for mapping in ("SYMMETRIC", "ASYMMETRIC"):
        config = TorchAoConfig.from_axes(axes("int4", 32), {"mapping_type": mapping})
        dense = backend.read_back(quantized(config)[0][0]).dense
        errors[mapping] = float(torch.linalg.vector_norm(dense - reference) / torch.linalg.vector_norm(reference))
    assert errors["ASYMMETRIC"] < 0.9 * errors["SYMMETRIC"]


def test_files_of_something_else_are_refused(tmp_path):
    with pytest.raises(ModelError, match="no readable torchao weights"):
        backend.load(make_model(), ["0.0"], TorchAoConfig("int8wo"), tmp_path)
    backend.save(quantized(TorchAoConfig("int8wo")), tmp_path)
    with pytest.raises(ModelError, match="other layers than were asked for"):
        backend.load(make_model(), ["0.0", "1"], TorchAoConfig("int8wo"), tmp_path)
    with pytest.raises(ModelError, match="stored as int8, not float8_e4m3"):
        backend.load(make_model(), ["0.0"], TorchAoConfig("float8_weight_only"), tmp_path)
    with pytest.raises(ModelError, match="was saved with shape"):
        backend.load(make_model(shape=(32, 512)), ["0.0"], TorchAoConfig("int8wo"), tmp_path)
    (tmp_path / "quantized.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match="save the quantized model again"):
        backend.load(make_model(), ["0.0"], TorchAoConfig("int8wo"), tmp_path)


def test_resolve_on_a_cpu():
    config = TorchAoConfig.from_axes(axes("int4"))
    assert backend.resolve(config, "cpu").int4_packing_format == "unpacked_to_int8"
    assert backend.resolve(config, "cuda") == config  # the dtype decides, and it is not known yet
    int8 = TorchAoConfig("int8wo")
    assert backend.resolve(int8, "cpu") is int8


def test_built_configs_leave_the_compiler_alone():
    built = backend.build_ao_config(TorchAoConfig("int8wo", group_size=32))
    assert type(built).__name__ == "Int8WeightOnlyConfig"
    assert built.granularity.group_size == 32
    assert built.set_inductor_config is False
    with pytest.raises(ConfigError, match="quant_type=NoSuchConfig: torchao cannot build it"):
        backend.build_ao_config(TorchAoConfig({"_type": "NoSuchConfig", "_version": 1, "_data": {}}))


# -- CUDA


@pytest.mark.gpu
@pytest.mark.parametrize("algorithm", ["max", "hqq"])
@pytest.mark.parametrize("group", ["auto", 32, 64, 256])
def test_tile_packed_int4(group, algorithm, tmp_path):
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = backend.resolve(TorchAoConfig.from_axes(axes("int4", group, "none", algorithm)), "cuda", "bfloat16")
    assert config.int4_packing_format == "tile_packed_to_4d"
    model = make_model("bfloat16").cuda()
    backend.quantize(model, ["0.0"], config, "bfloat16")
    stored = backend.read_back(model[0][0])
    assert (stored.dtype, stored.group_size, stored.is_simulated) == ("int4", 128 if group == "auto" else group, False)
    reference = make_model("bfloat16")[0][0].weight.detach().float().cuda()
    assert 0 < float((stored.dense - reference).norm() / reference.norm()) < 0.13
    with torch.no_grad():
        x = inputs("bfloat16").cuda()
        backend.save(model, tmp_path)
        fresh = make_model("bfloat16").cuda()
        backend.load(fresh, ["0.0"], config, tmp_path)
        assert torch.equal(fresh(x), model(x))


@pytest.mark.gpu
@pytest.mark.parametrize("group", ["auto", "none"])
def test_dynamic_float8(group):
    import torch

    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no CUDA device of compute capability 8.9")
    model = make_model("bfloat16").cuda()
    backend.quantize(model, ["0.0"], TorchAoConfig.from_axes(axes("float8_e4m3", group, "float8_e4m3")), "bfloat16")
    stored = backend.read_back(model[0][0])
    assert (stored.dtype, stored.activation_dtype) == ("float8_e4m3", "float8_e4m3")
    with torch.no_grad():
        assert model[0](inputs("bfloat16").cuda()).isfinite().all()
