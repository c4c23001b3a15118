"""The torchao config as a value: shorthands, dictionaries and objects, what is refused, and back from JSON."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.backends.torchao import TorchAoConfig
from quantlab.backends.torchao.forms import make, per_group
from quantlab.backends.torchao.shorthands import _get_torchao_quant_type_to_method
from quantlab.errors import ConfigError
from tests.support.torchao_cases import CASES, axes

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
    with pytest.raises(ConfigError, match="quant_type=FqnToConfig: it names no module"):
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
    made = TorchAoConfig("int8wo", ["proj_out"], group_size=32, exclusion_rule="library")
    assert TorchAoConfig.from_dict(old) == made
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
    with pytest.raises(ConfigError, match="SemiSparseLayout keeps two of four weights"):
        TorchAoConfig(sparse)


@pytest.mark.parametrize("name", [n for n, form in TABLE.items() if isinstance(form, dict)])
def test_diffusers_reads_and_writes_the_same(name):
    import diffusers

    config = TorchAoConfig(name, modules_to_not_convert=["proj_out"])
    theirs = diffusers.TorchAoConfig.from_dict(config.to_dict())
    assert json.loads(json.dumps(theirs.to_dict()))["quant_type"] == config.to_dict()["quant_type"]
    again = TorchAoConfig.from_dict(theirs.to_dict())
    assert again == dataclasses.replace(config, exclusion_rule="library"), "the entry is Diffusers' own from then on"


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


@pytest.mark.slow
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
