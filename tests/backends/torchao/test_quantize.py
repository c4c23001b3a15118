"""torchao: the config as a value, and every promise of the capability table that a CPU can keep."""

from __future__ import annotations

import copy
import itertools
import json
import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.backends import torchao as backend
from quantlab.backends.torchao import TorchAoConfig
from quantlab.backends.torchao.forms import make, per_group
from quantlab.backends.torchao.shorthands import _get_torchao_quant_type_to_method
from quantlab.errors import ConfigError, ModelError, NotQuantized
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

ROWS = CAPABILITIES["torchao"]
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


def cpu_cases():
    for dtype, row in ROWS.items():
        groups = ("auto", *row.group_sizes)
        algorithms = [a for a in row.algorithms if a in ("max", "hqq")]  # the others: test_calibrate.py
        for group, act, algorithm in itertools.product(groups, row.activation_dtypes, algorithms):
            is_cuda_only = act == "float8_e4m3"
            is_refused = dtype == act == "int8" and isinstance(group, int)
            if not is_cuda_only and not is_refused:
                yield dtype, group, act, algorithm


CASES = list(cpu_cases())


def axes(dtype="int8", group_size="auto", activation_dtype="auto", algorithm="auto", **more):
    return QuantizationAxes(
        backend="torchao",
        dtype=dtype,
        group_size=group_size,
        activation_dtype=activation_dtype,
        algorithm=algorithm,
        **more,
    )


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


# -- the config


TABLE = _get_torchao_quant_type_to_method()


def test_there_are_51_shorthands():
    assert len(TABLE) == 51
    assert sum(isinstance(form, dict) for form in TABLE.values()) == 17


@pytest.mark.parametrize("name", TABLE)
def test_shorthand(name):
    if isinstance(TABLE[name], dict):
        config = TorchAoConfig(name)
        assert config == TorchAoConfig(TABLE[name]) == TorchAoConfig({"default": config.quant_type})
    else:
        with pytest.raises(ConfigError, match=rf"quant_type='{name}'.*(dtype=|activation_dtype=)"):
            TorchAoConfig(name)


def test_float8wo_is_e5m2():
    assert TorchAoConfig("float8wo").axes().dtype == "float8_e5m2"
    assert TorchAoConfig("float8_weight_only").axes().dtype == "float8_e4m3"


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("int8wo",), {"grup_size": 32}, "grup_size: int8wo has no such keyword; did you mean group_size"),
        (("int8wo",), {"group_size": 0}, "group_size=0: int8wo wants a whole number above 0"),
        (("int4wo",), {"group_size": "64"}, "group_size='64': a whole number"),
        (("int9wo",), {}, r"quant_type='int9wo': no such shorthand; did you mean int[48]wo"),
        (("fp8wo_e4m3",), {}, "did you mean float8wo_e4m3"),
        ((make("Int8WeightOnlyConfig"),), {"group_size": 32}, "group_size: TorchAoConfig has no such setting"),
        (({"default": 3},), {}, "quant_type: a dictionary has the key default"),
        ((7,), {}, "quant_type=7: TorchAoConfig accepts a shorthand"),
        ((), {}, "quant_type: TorchAoConfig needs it"),
        (("int8wo", "proj_out"), {}, "modules_to_not_convert='proj_out'"),
        (("int8wo",), {"int4_packing_format": "tile_packed_to_4d"}, "it is for dtype=int4"),
        (("int8wo",), {"mapping_type": "SYMMETRIC"}, "mapping_type=SYMMETRIC: it is for int4"),
        (("int4wo",), {"mapping_type": "SYMMETRIC", "int4_packing_format": "tile_packed_to_4d"}, "is asymmetric"),
        (
            ({"_type": "Int8WeightOnlyConfig", "_version": 9, "_data": {}},),
            {},
            "version 9 was written by a newer torchao",
        ),
        (
            ({"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granulrity": 1}},),
            {},
            "did you mean granularity",
        ),
        (({"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": {"weight_dtype": "int9"}},), {}, "int9 is none of"),
    ],
)
def test_bad_configs(args, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        TorchAoConfig(*args, **kwargs)


def test_bad_axes():
    with pytest.raises(ConfigError, match="group_size=32: torchao int8 with activation_dtype=int8"):
        TorchAoConfig.from_axes(axes("int8", 32, "int8"))
    with pytest.raises(ConfigError, match="mapping_type=ASYMMETRIC: algorithm=hqq"):
        TorchAoConfig.from_axes(axes("int4", 32, "none", "hqq"), {"mapping_type": "ASYMMETRIC"})
    with pytest.raises(ConfigError, match="choose such a group_size"):
        TorchAoConfig.from_axes(axes("int4", 16), {"int4_packing_format": "tile_packed_to_4d"})
    with pytest.raises(ConfigError, match="quant_type=FqnToConfig: no axes"):
        TorchAoConfig({"_type": "FqnToConfig", "_version": 1, "_data": {}}).axes()


def test_one_value_from_string_dictionary_and_object():
    import torch
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig, PerGroup

    pairs = [
        (TorchAoConfig("int8wo", group_size=32), Int8WeightOnlyConfig(granularity=PerGroup(32))),
        (TorchAoConfig("float8wo"), Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2)),
        (TorchAoConfig("int4wo", group_size=64), Int4WeightOnlyConfig(64, int4_packing_format="tile_packed_to_4d")),
    ]
    for config, built in pairs:
        same = TorchAoConfig(built)
        assert config == same == TorchAoConfig({"default": config.quant_type})
        assert len({config, same}) == 1
    assert len({config for config, _ in pairs}) == 3
    assert TorchAoConfig("int8wo") != TorchAoConfig("int8dq")


def test_what_older_releases_wrote():
    old = {
        "quant_method": "torchao",
        "quant_type": "int8wo",
        "quant_type_kwargs": {"group_size": 32},
        "modules_to_not_convert": ["proj_out"],
    }
    assert TorchAoConfig.from_dict(old) == TorchAoConfig("int8wo", ["proj_out"], group_size=32)
    v1 = {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {"group_size": 64, "set_inductor_config": True}}
    assert TorchAoConfig({"default": v1}) == TorchAoConfig("int8wo", group_size=64)
    layout = {"_type": "TensorCoreTiledLayout", "_data": {"inner_k_tiles": 8}}
    v1 = {
        "_type": "Int4WeightOnlyConfig",
        "_version": 1,
        "_data": {"group_size": 64, "layout": layout, "use_hqq": False, "zero_point_domain": {}},
    }
    assert TorchAoConfig(v1) == TorchAoConfig("int4wo", group_size=64)
    gone = {"_type": "Int8DynamicActivationInt4WeightConfig", "_version": 1, "_data": {"group_size": 64}}
    assert TorchAoConfig(gone) == TorchAoConfig("int4dq", group_size=64)
    sparse = {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {"layout": {"_type": "SemiSparseLayout"}}}
    with pytest.raises(ConfigError, match="the layout SemiSparseLayout was removed"):
        TorchAoConfig(sparse)


@pytest.mark.parametrize("name", [n for n, form in TABLE.items() if isinstance(form, dict)])
def test_diffusers_reads_and_writes_the_same(name):
    import diffusers

    config = TorchAoConfig(name, modules_to_not_convert=["proj_out"])
    theirs = diffusers.TorchAoConfig.from_dict(config.to_dict())
    assert json.loads(json.dumps(theirs.to_dict()))["quant_type"] == config.to_dict()["quant_type"]
    assert TorchAoConfig.from_dict(theirs.to_dict()) == config


SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "int4_packing_format": st.sampled_from(["auto", "unpacked_to_int8", "tile_packed_to_4d"]),
        "mapping_type": st.sampled_from(["auto", "SYMMETRIC", "ASYMMETRIC"]),
    },
)


def is_possible(dtype, group, act, algorithm, int4_packing_format="auto", mapping_type="auto"):
    is_tiled, has_mapping = int4_packing_format == "tile_packed_to_4d", mapping_type != "auto"
    tiles = (dtype, act) == ("int4", "none") and group in ("auto", 32, 64, 128, 256)
    return (
        (int4_packing_format == "auto" or dtype == "int4")
        and (not is_tiled or (tiles and mapping_type != "SYMMETRIC"))
        and (not has_mapping or dtype in ("int4", "int3", "int2"))
        and not (mapping_type == "ASYMMETRIC" and algorithm == "hqq")
    )


@settings(max_examples=150, deadline=None)
@given(case=st.sampled_from(CASES), own=SETTINGS, names=st.lists(st.sampled_from(["a", "b.c", "re:x"]), unique=True))
def test_round_trips(case, own, names):
    exclusions = {"own": names} if names else {}
    if not is_possible(*case, **own):
        with pytest.raises(ConfigError, match="^(int4_packing_format|mapping_type)="):
            TorchAoConfig.from_axes(axes(*case), own)
        return
    config = TorchAoConfig.from_axes(axes(*case, modules_to_not_convert=exclusions), own)
    assert TorchAoConfig.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
    again = TorchAoConfig.from_dict(json.loads(config.to_json_string()))
    assert again == config
    assert hash(again) == hash(config)
    assert TorchAoConfig.from_axes(config.axes(), own) == config
    if case[0] != "nf4":
        assert TorchAoConfig(config.quant_type) == TorchAoConfig(json.loads(json.dumps(config.to_dict()["quant_type"])))


def test_update_is_checked_and_all_or_nothing():
    config = TorchAoConfig("int8wo")
    with pytest.raises(ConfigError, match="int4_packing_format"):
        config.update(modules_to_not_convert=["x"], int4_packing_format="tile_packed_to_4d")
    assert config == TorchAoConfig("int8wo")
    assert config.update(quant_type="int8dq", other=1) == {"other": 1}
    assert config == TorchAoConfig("int8dq")
    assert make("Int8WeightOnlyConfig", group_size=32)["_data"]["granularity"] == per_group(32)


def test_the_config_imports_neither_torch_nor_torchao():
    code = (
        "import sys\n"
        "from quantlab.backends.torchao import Config, TorchAoConfig, resolve\n"
        "from quantlab.vocabulary.axes import QuantizationAxes\n"
        "c = Config.from_axes(QuantizationAxes(backend='torchao', dtype='int4'))\n"
        "resolve(c, 'cpu'); TorchAoConfig('float8wo'); TorchAoConfig.from_dict(c.to_dict())\n"
        "print([m for m in ('torch', 'torchao', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr


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
