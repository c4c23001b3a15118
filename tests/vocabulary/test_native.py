"""A config is a value: equality by content, JSON and back, refusals that name field, value and what is accepted."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
from hypothesis import given, settings
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
from quantlab.backends.table import own_settings
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.config_strategies import ANY, CONFIGS
from tests.support.configs import ONE_OF_EACH
from tests.support.tables import BACKENDS, CAPABILITIES
from tests.support.tiers import few_or_many

CLASSES = [b.Config for b in BACKENDS.values()]


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


@pytest.mark.parametrize(("backend", "num"), few_or_many(CONFIGS, 30, 120))
def test_json_and_back(backend, num, tmp_path):
    @settings(max_examples=num, deadline=None)
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
    and not (b == "modelopt" and m == "smoothquant" and a != "int8")
    and not (
        b == "torchao"
        and d == "int4"
        and m in ("awq", "smoothquant")
        and (a == "int8" or g not in ("auto", 32, 64, 128))
    )
    and not (b == "torchao" and m == "gptq" and (a == "int8" or g not in ("auto", "none")))
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_and_back_for_every_row(backend):
    """Every (dtype, group_size, activation dtype, algorithm) of the table: native config -> axes -> the same config."""
    rows = [a for a in AXES if a.backend == backend]
    assert rows
    for asked in rows:
        asked = dataclasses.replace(asked, modules_to_not_convert={"own": ["a", "*.b"]})
        config = BACKENDS[backend].Config.from_axes(asked)
        shown = config.axes()
        own = {name: getattr(config, name) for name in own_settings(backend)}
        assert type(config).from_axes(shown, own) == config
        assert (shown.backend, shown.dtype, shown.algorithm) == (backend, asked.dtype, asked.algorithm)
        assert shown.activation_dtype == asked.activation_dtype or asked.activation_dtype == "auto"
        assert shown.exclusions() == ("a", "*.b")


@pytest.mark.parametrize(("backend", "num"), few_or_many(BACKENDS, 50, 200))
def test_any_config_shows_axes_or_says_why_not(backend, num):
    @settings(max_examples=num, deadline=None)
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
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.backends.table import backends, offers
from tests.support.tiers import few_or_many

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
for backend, offer in offers().items():
    for dtype, row in offer.rows.items() if backend != "none" else ():
        for group_size in ("auto", *row.group_sizes):
            axes = QuantizationAxes(backend=backend, dtype=dtype, group_size=group_size)
            config = backends()[backend].module.Config.from_axes(axes)
            assert type(config).from_dict(config.to_dict()) == config and config.axes() and repr(config)
            assert quantlab.config_from_dict(config.to_dict()) is not None
assert "torch" not in sys.modules
print("done")
"""


def test_configs_are_built_without_torch_environment_network_or_device():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


@pytest.mark.slow
def test_importing_all_five_classes_imports_no_torch():
    code = (
        f"import sys\nfrom quantlab import {', '.join(c.__name__ for c in CLASSES)}\nassert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert all(getattr(quantlab, c.__name__) is c for c in CLASSES)
