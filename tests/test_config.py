"""A config is a value: equality by content, JSON and back, refusals that name field, value and what is accepted."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

import quantlab
from quantlab import (
    BitsAndBytesConfig,
    GGUFQuantizationConfig,
    NVIDIAModelOptConfig,
    QuantizationConfigMixin,
    QuantizationMethod,
    QuantoConfig,
    TorchAoConfig,
)
from quantlab.axes import QuantizationAxes
from quantlab.backends.table import BACKENDS, own_settings
from quantlab.backends.torchao.shorthands import _get_torchao_quant_type_to_method
from quantlab.capabilities import CAPABILITIES
from quantlab.config import EXCLUSION_RULES
from quantlab.errors import ConfigError

CLASSES = [b.Config for b in BACKENDS.values()]
ONE_OF_EACH = [
    BitsAndBytesConfig(load_in_4bit=True),
    TorchAoConfig("int8wo"),
    QuantoConfig(),
    GGUFQuantizationConfig(),
    NVIDIAModelOptConfig("INT8", channel_quantize=0),
]
SHORTHANDS = [name for name, form in _get_torchao_quant_type_to_method().items() if isinstance(form, dict)]
FORMATS = tuple(CAPABILITIES["gguf"])


# -- strategies over every field

NAMES = st.none() | st.lists(st.sampled_from(["a", "b.c", "*.d", "re:e.*", "proj_out"]), max_size=3)
RULES = st.sampled_from(EXCLUSION_RULES)


def bitsandbytes_configs():
    common = {
        "llm_int8_threshold": st.floats(0, 1e6) | st.integers(0, 100),
        "llm_int8_skip_modules": NAMES,
        "llm_int8_enable_fp32_cpu_offload": st.booleans(),
        "llm_int8_has_fp16_weight": st.booleans(),
        "bnb_4bit_compute_dtype": st.sampled_from([None, "float32", "torch.bfloat16", torch.float16]),
        "bnb_4bit_quant_type": st.sampled_from(["nf4", "fp4"]),
        "bnb_4bit_use_double_quant": st.booleans(),
        "bnb_4bit_quant_storage": st.sampled_from([None, "uint8", "torch.float16", torch.bfloat16, "float64", "int8"]),
        "exclusion_rule": RULES,
    }
    eight = st.fixed_dictionaries({**common, "load_in_8bit": st.just(True)})
    four = st.fixed_dictionaries(
        {
            **common,
            "load_in_4bit": st.just(True),
            "bnb_4bit_blocksize": st.sampled_from([None, 32, 64, 128, 256, 512, 1024, 2048, 4096]),
        }
    )
    return (eight | four).map(lambda made: BitsAndBytesConfig(**made))


INTX = st.builds(
    lambda kind, dtype, size, hqq: {
        "_type": kind,
        "_version": 2,
        "_data": {
            "weight_dtype": dtype,
            "granularity" if kind[0] == "I" and kind[3] == "x" else "weight_granularity": {
                "_type": "PerGroup",
                "_data": {"group_size": size},
            },
            **({"intx_choose_qparams_algorithm": "HQQ_SCALE_ONLY"} if hqq else {}),
        },
    },
    st.sampled_from(["IntxWeightOnlyConfig", "Int8DynamicActivationIntxWeightConfig"]),
    st.sampled_from(["int4", "int3", "int2"]),
    st.sampled_from([16, 32, 64, 128, 256]),
    st.booleans(),
)


@st.composite
def torchao_configs(draw):
    given_type = draw(st.sampled_from(SHORTHANDS) | INTX)
    is_int4 = given_type in ("int4wo", "int4_weight_only")
    is_intx = isinstance(given_type, dict)
    own = {"modules_to_not_convert": draw(NAMES), "exclusion_rule": draw(RULES)}
    if is_int4:
        own["group_size"] = draw(st.sampled_from([32, 64, 128, 256]))
        own["int4_packing_format"] = draw(st.sampled_from(["auto", "unpacked_to_int8", "tile_packed_to_4d"]))
    if is_int4 or is_intx:
        own["fit_group_size"] = draw(st.booleans())
        is_hqq = is_intx and "intx_choose_qparams_algorithm" in given_type["_data"]
        choices = ["auto", "SYMMETRIC", "ASYMMETRIC"]
        if is_hqq or own.get("int4_packing_format") == "tile_packed_to_4d":
            choices = ["auto"]
        own["mapping_type"] = draw(st.sampled_from(choices))
    return TorchAoConfig(given_type, **own)


def quanto_configs():
    weights = st.sampled_from(["float8", "int8", "int4", "int2", "float8_e5m2"])
    common = {
        "modules_to_not_convert": NAMES,
        "activations": st.sampled_from([None, "int8", "float8"]),
        "exclusion_rule": RULES,
    }
    plain = st.fixed_dictionaries({**common, "weights_dtype": weights})
    hqq = st.fixed_dictionaries(
        {**common, "weights_dtype": st.sampled_from(["int4", "int2"]), "optimizer": st.just("hqq")}
    )
    return (plain | hqq).map(lambda made: QuantoConfig(**made))


def gguf_configs():
    return st.fixed_dictionaries(
        {
            "compute_dtype": st.sampled_from([None, "float32", "torch.bfloat16", torch.float16]),
            "modules_to_not_convert": NAMES,
            "gguf_type": st.none() | st.sampled_from([*FORMATS, *map(str.upper, FORMATS)]),
            "tensor_types": st.none()
            | st.dictionaries(st.sampled_from(["a.*", "re:b", "c.d"]), st.sampled_from(FORMATS)),
            "exclusion_rule": RULES,
        }
    ).map(lambda made: GGUFQuantizationConfig(**made))


@st.composite
def modelopt_configs(draw):
    weight = draw(st.sampled_from(list(MODELOPT_ALGORITHMS)))
    activation = draw(st.sampled_from(["", "INT8", "FP8"]))
    own = {
        "quant_type": f"{weight}_{activation}" if activation else weight,
        "weight_only": not activation,
        "modules_to_not_convert": draw(NAMES),
        "exclusion_rule": draw(RULES),
MODELOPT_ALGORITHMS = {
    "FP8": ["max", "awq_lite"], "INT8": ["max", "awq_lite", "gptq"], "INT4": ["max", "mse", "awq_lite"],
    "INT3": ["max", "mse", "local_hessian"], "NVFP4": ["max", "awq_lite"], "MXFP8": ["max"], "MXFP4": ["max"],
}


        "compress": draw(st.booleans()),
        "algorithm": draw(st.sampled_from(MODELOPT_ALGORITHMS[weight])),
        "disable_conv_quantization": draw(st.booleans()),
    }
    if own["algorithm"] == "awq_lite":
        own["algorithm_settings"] = {"alpha_step": draw(st.sampled_from([0.1, 0.2]))}
    if activation:
        own["activation_scales"] = draw(st.sampled_from(["dynamic", "static"]))
    if weight in ("FP8", "INT8", "INT4", "INT3"):
        own |= draw(
            st.sampled_from(
                [
                    {"channel_quantize": 0},
                    {"channel_quantize": -1, "block_quantize": 64},
                    {"channel_quantize": -1, "block_quantize": 128, "fit_group_size": True},
                ]
            )
        )
    if weight == "NVFP4":
        own |= {"channel_quantize": -1, "block_quantize": 16, "scale_channel_quantize": -1, "scale_block_quantize": 16}
    bits = {"FP8": [4, 3], "INT8": 8, "INT4": 4, "INT3": 3}.get(weight)
    if bits and draw(st.booleans()):
        own = {k: v for k, v in own.items()
               if k not in ("channel_quantize", "block_quantize", "fit_group_size", "activation_scales")}
        own["modelopt_config"] = {
            "algorithm": {"method": own["algorithm"]},
            "quant_cfg": draw(
                st.sampled_from(
                    [
                        {
                            "*weight_quantizer": {"num_bits": bits, "block_sizes": {-1: 32}},
                            "*input_quantizer": {"enable": False},
                        },
                        [{"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": 0}}],
                    ]
                )
            ),
        }
    return NVIDIAModelOptConfig(**own)


CONFIGS = {
    "bitsandbytes": bitsandbytes_configs(),
    "torchao": torchao_configs(),
    "quanto": quanto_configs(),
    "gguf": gguf_configs(),
    "modelopt": modelopt_configs(),
}
ANY = st.one_of(*CONFIGS.values())


@pytest.mark.parametrize("backend", CONFIGS)
def test_the_strategies_reach_every_field(backend):
    """Each field takes at least two values within some hundred examples: none is left out of the round trips."""
    seen = {}

    @settings(max_examples=200, database=None, derandomize=True, deadline=None)
    @given(CONFIGS[backend])
    def collect(config):
        for f in dataclasses.fields(config):
            seen.setdefault(f.name, set()).add(repr(getattr(config, f.name)))

    collect()
    assert set(seen) == {f.name for f in dataclasses.fields(BACKENDS[backend].Config)}
    assert not [name for name, values in seen.items() if len(values) < 2]


# -- round trips


@pytest.mark.parametrize("backend", CONFIGS)
def test_json_and_back(backend, tmp_path):
    @settings(max_examples=120, deadline=None)
    @given(CONFIGS[backend])
    def check(config):
        kind = type(config)
        for data in (config.to_dict(), config.to_diff_dict()):
            text = json.dumps(data, sort_keys=True, allow_nan=False)
            again = kind.from_dict(json.loads(text))
            assert again == config
            assert hash(again) == hash(config)
            assert again.to_dict() == config.to_dict()
        assert kind.from_dict(json.loads(config.to_json_string())) == config
        assert kind.from_dict(json.loads(config.to_json_string(use_diff=False))) == config
        config.to_json_file(tmp_path / "c.json", use_diff=True)
        assert kind.from_json_file(tmp_path / "c.json") == config
        assert copy.deepcopy(config) == config == pickle.loads(pickle.dumps(config)) == dataclasses.replace(config)
        assert kind.from_dict(OmegaConf.create(config.to_dict())) == config

    check()


@settings(max_examples=150, deadline=None)
@given(ANY)
def test_through_the_librarys_class_and_back(config):
    """Wherever Diffusers' (transformers') class can hold the config, it comes back equal."""
    for library in ("diffusers", "transformers"):
        try:
            theirs = getattr(config, f"to_{library}")()
        except ConfigError:
            continue
        stored = json.loads(json.dumps(theirs.to_dict(), default=str))
        kept = {k: v for k, v in config.extra_settings().items() if k != "bnb_4bit_blocksize"}  # 64 is the library's
        again = type(config).from_dict(stored, **kept)
        wanted = (
            dataclasses.replace(config, bnb_4bit_blocksize=None)
            if "bnb_4bit_blocksize" in own_fields(config)
            else config
        )
        if config.exclusion_rule == "library" and config.exclusions is None:
            assert again.exclusions is None
        else:
            assert again.exclusions in (wanted.exclusions, () if wanted.exclusions is None else None)
        drop = {f: None for f in ("modules_to_not_convert", "llm_int8_skip_modules") if f in own_fields(config)}
        same = {"exclusion_rule": "quantlab", **drop}
        if isinstance(config, NVIDIAModelOptConfig) and config.modelopt_config is not None:
            assert again.axes() == wanted.axes() or config.exclusions
            continue
        if isinstance(config, TorchAoConfig) and (
            config.int4_packing_format == "unpacked_to_int8" or config.mapping_type != "auto"
        ):
            continue  # written as the torchao config that the two settings resolve to
        assert dataclasses.replace(again, **same) == dataclasses.replace(wanted, **same)


def own_fields(config):
    return {f.name for f in dataclasses.fields(config)}


@settings(max_examples=150, deadline=None)
@given(ANY, ANY)
def test_equality_is_that_of_the_settings(one, other):
    same = type(one) is type(other) and one.to_dict() == other.to_dict()
    assert (one == other) is same
    assert len({one, other}) == 1 + (not same)
    assert one != one.to_dict()


@settings(max_examples=100, deadline=None)
@given(ANY)
def test_repr_shows_the_settings(config):
    text = repr(config)
    assert text.startswith(f"{type(config).__name__}(")
    for f in dataclasses.fields(config):
        assert f"{f.name}={getattr(config, f.name)!r}" in text
    assert eval(text, {type(config).__name__: type(config)}) == config


@settings(max_examples=100, deadline=None)
@given(ANY)
def test_all_values_are_torch_free_and_sequences_are_tuples(config):
    def check(value):
        assert value is None or isinstance(value, (bool, int, float, str, tuple, dict)), value
        for inner in value if isinstance(value, tuple) else value.values() if isinstance(value, dict) else ():
            check(inner)

    for f in dataclasses.fields(config):
        check(getattr(config, f.name))


AXES = [
    QuantizationAxes(backend=b, dtype=d, group_size=g, activation_dtype=a, algorithm=m)
    for b, rows in CAPABILITIES.items()
    if b != "none"
    for d, row in rows.items()
    for g in ("auto", *row.group_sizes)
    for a in row.activation_dtypes
    for m in row.algorithms
    if not (b == "torchao" and a == "int8" and d == "int8" and g not in ("auto", "none"))
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_and_back_for_every_row(backend):
    """Every (dtype, group_size, activation dtype, algorithm) of the table: native config -> axes -> the same config."""
    rows = [a for a in AXES if a.backend == backend]
    assert rows
    for asked in rows:
    and not (b == "modelopt" and m == "smoothquant" and a != "int8")
    and not (b == "torchao" and d == "int4" and m in ("awq", "smoothquant") and (
        a == "int8" or g not in ("auto", 32, 64, 128)))
        asked = dataclasses.replace(asked, modules_to_not_convert={"own": ["a", "*.b"]})
        config = BACKENDS[backend].Config.from_axes(asked)
        shown = config.axes()
        own = {name: getattr(config, name) for name in own_settings(backend)}
        assert type(config).from_axes(shown, own) == config
        assert (shown.backend, shown.dtype, shown.algorithm) == (backend, asked.dtype, asked.algorithm)
        assert shown.activation_dtype == asked.activation_dtype or asked.activation_dtype == "auto"
        assert shown.exclusions() == ("a", "*.b")


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_config_shows_axes_or_says_why_not(backend):
    @settings(max_examples=100, deadline=None)
    @given(CONFIGS[backend])
    def check(config):
        try:
            shown = config.axes()
        except ConfigError as error:
            message = str(error)
        else:
            message = ""
        if message:
            assert "axes" in message or "offers" in message
            return
        assert shown.backend == backend
        assert shown.dtype in CAPABILITIES[backend]

    check()


# -- a value cannot be changed behind one's back


@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: c.quant_method.value)
def test_assignment_is_refused(config):
    name = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, name, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.something_new = 1
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        config.quant_method = "other"
    with pytest.raises(dataclasses.FrozenInstanceError):
        del config.exclusion_rule
    assert isinstance(config, QuantizationConfigMixin)
    assert isinstance(config.quant_method, QuantizationMethod)


@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: c.quant_method.value)
def test_the_callers_lists_stay_the_callers(config):
    names = ["a", "b"]
    stored = {**config.to_dict(), "modules_to_not_convert": names}
    before = copy.deepcopy(stored)
    made = type(config).from_dict(stored)
    names.append("c")
    assert made.exclusions == ("a", "b")
    before["modules_to_not_convert"].append("c")
    assert stored == before
    first = made.to_dict()
    next(v for v in first.values() if isinstance(v, list)).append("d")
    assert made.exclusions == ("a", "b")


@pytest.mark.parametrize(
    ("config", "good", "bad"),
    [
        (BitsAndBytesConfig(load_in_4bit=True), {"bnb_4bit_quant_type": "nf4"}, {"bnb_4bit_compute_dtype": "int8"}),
        (TorchAoConfig("int8wo"), {"modules_to_not_convert": ["a"]}, {"int4_packing_format": "tile_packed_to_4d"}),
        (QuantoConfig("int4"), {"optimizer": "hqq"}, {"weights_dtype": "int99"}),
        (GGUFQuantizationConfig(), {"gguf_type": "Q4_K"}, {"compute_dtype": "int8"}),
        (NVIDIAModelOptConfig("INT8", channel_quantize=0), {"compress": False}, {"quant_type": "FP9"}),
    ],
    ids=lambda v: v.quant_method.value if hasattr(v, "quant_method") else "",
)
def test_update_is_checked_and_all_or_nothing(config, good, bad):
    config, before = copy.deepcopy(config), copy.deepcopy(config)
    with pytest.raises(ConfigError):
        config.update(**good, **bad)
    assert config == before
    assert config.update(**good, to_dict=5, quant_method="x", nonsense=1) == {
        "to_dict": 5,
        "quant_method": "x",
        "nonsense": 1,
    }
    assert config != before
    assert callable(config.to_dict)
    assert config.quant_method == before.quant_method
    assert type(config).from_dict(config.to_dict()) == config


def test_from_dict_takes_overrides_and_gives_back_what_it_does_not_know():
    for config in ONE_OF_EACH:
        made, unused = type(config).from_dict(
            config.to_dict(),
            return_unused_kwargs=True,
            torch_dtype="x",
            modules_to_not_convert=["z"] if not isinstance(config, BitsAndBytesConfig) else None,
        )
        assert unused.pop("torch_dtype") == "x"
        assert set(unused) <= {"modules_to_not_convert"}
        assert type(made) is type(config)
        with pytest.raises(ConfigError, match="torch_dtype: .* has no such setting"):
            type(config).from_dict(config.to_dict(), torch_dtype="x")


# -- no torch, no environment, no network, no device

PROBE = """
import os, socket, subprocess, sys
import quantlab
from quantlab.axes import QuantizationAxes
from quantlab.backends.table import BACKENDS
from quantlab.capabilities import CAPABILITIES

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchao", "bitsandbytes", "optimum", "modelopt", "gguf", "diffusers",
                                  "transformers", "libgguf", "numpy"}:
            raise AssertionError(f"{name} was imported")

def refuse(*args, **kwargs):
    raise AssertionError(f"a config reached outside: {args}")

class NoEnvironment(dict):
    __getitem__ = get = __contains__ = __iter__ = keys = items = refuse

sys.meta_path.insert(0, Blocked())
os.environ = NoEnvironment()
os.getenv = socket.socket = socket.create_connection = subprocess.Popen = refuse
sys.addaudithook(lambda event, args: refuse(event) if event in ("socket.connect", "subprocess.Popen") else None)
for backend, rows in CAPABILITIES.items():
    for dtype, row in rows.items() if backend != "none" else ():
        for group_size in ("auto", *row.group_sizes):
            config = BACKENDS[backend].Config.from_axes(QuantizationAxes(backend=backend, dtype=dtype,
                                                                         group_size=group_size))
            assert type(config).from_dict(config.to_dict()) == config and config.axes() and repr(config)
            assert quantlab.config_from_dict(config.to_dict()) is not None
assert "torch" not in sys.modules
print("done")
"""


def test_configs_are_built_without_torch_environment_network_or_device():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_importing_all_five_classes_imports_no_torch():
    code = (
        f"import sys\nfrom quantlab import {', '.join(c.__name__ for c in CLASSES)}\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(quantlab, c.__name__) is c for c in CLASSES)
