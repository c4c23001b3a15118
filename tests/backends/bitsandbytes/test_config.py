"""The bitsandbytes config as a value, in its two spellings."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.backends import bitsandbytes as backend
from quantlab.backends.bitsandbytes import BitsAndBytesConfig
from quantlab.backends.bitsandbytes.config import _BLOCKSIZES, _STORAGES
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.stores import ROOT
from tests.support.tables import CAPABILITIES

ROWS = CAPABILITIES["bitsandbytes"]


def axes(dtype, group_size="auto", **more):
    return QuantizationAxes(backend="bitsandbytes", dtype=dtype, group_size=group_size, **more)


def test_defaults_are_diffusers_defaults():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.BitsAndBytesConfig(load_in_4bit=True).to_dict()
    said = {"quant_method": "bitsandbytes", "exclusion_rule": "quantlab"}  # without it the model's library decides
    assert BitsAndBytesConfig(load_in_4bit=True).to_dict() == {**theirs, **said}


def configs():
    common = {
        "llm_int8_threshold": st.floats(0, 100),
        "llm_int8_enable_fp32_cpu_offload": st.booleans(),
        "llm_int8_skip_modules": st.none() | st.lists(st.text(min_size=1), max_size=3),
        "llm_int8_has_fp16_weight": st.booleans(),
        "bnb_4bit_use_double_quant": st.booleans(),
        "bnb_4bit_compute_dtype": st.sampled_from(["float32", "bfloat16", "float16"]),
        "bnb_4bit_quant_type": st.sampled_from(["nf4", "fp4"]),
        "bnb_4bit_quant_storage": st.sampled_from(_STORAGES),
    }
    four = st.fixed_dictionaries(
        {
            **common,
            "load_in_4bit": st.just(True),
            "bnb_4bit_blocksize": st.none() | st.sampled_from(_BLOCKSIZES),
        }
    )
    eight = st.fixed_dictionaries({**common, "load_in_8bit": st.just(True)})
    return (four | eight).map(lambda arguments: BitsAndBytesConfig(**arguments))


@settings(deadline=None, max_examples=60)
@given(configs())
def test_dictionaries_round_trip(config):
    assert BitsAndBytesConfig.from_dict(config.to_dict()) == config
    assert BitsAndBytesConfig.from_dict(config.to_diff_dict()) == config
    assert BitsAndBytesConfig.from_dict({k: v for k, v in config.to_dict().items() if k[0] != "_"}) == config
    assert hash(BitsAndBytesConfig.from_dict(config.to_dict())) == hash(config)


@settings(deadline=None, max_examples=30)
@given(configs().filter(lambda c: c.bnb_4bit_blocksize is None))
def test_round_trip_through_diffusers(config):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.BitsAndBytesConfig(**config.to_dict())
    again = BitsAndBytesConfig.from_dict(theirs.to_dict())
    assert again.exclusion_rule == "library"
    assert dataclasses.replace(again, exclusion_rule="quantlab") == config


@pytest.mark.parametrize("dtype", ROWS)
@pytest.mark.parametrize("compute", ["auto", "float32", "bfloat16"])
def test_axes_round_trip(dtype, compute):
    for group in ("auto", *ROWS[dtype].group_sizes):
        asked = axes(dtype, group, compute_dtype=compute, modules_to_not_convert={"own": ["a"], "b": ["c.*", "a"]})
        config = BitsAndBytesConfig.from_axes(asked)
        assert config.dtype == dtype
        assert config.modules_to_not_convert == ("a", "c.*")
        assert BitsAndBytesConfig.from_axes(config.axes()) == config
        assert backend.resolve(config, "cpu") == config


@pytest.mark.parametrize(
    ("given_value", "kept"),
    [
        ({"llm_int8_threshold": 6}, ("llm_int8_threshold", 6.0)),
        ({"modules_to_not_convert": ["a"]}, ("llm_int8_skip_modules", ("a",))),
        ({"llm_int8_skip_modules": ("a", "b")}, ("modules_to_not_convert", ("a", "b"))),
        ({"bnb_4bit_compute_dtype": torch.bfloat16}, ("bnb_4bit_compute_dtype", "bfloat16")),
        ({"bnb_4bit_compute_dtype": "torch.float16"}, ("bnb_4bit_compute_dtype", "float16")),
        ({"bnb_4bit_compute_dtype": None}, ("bnb_4bit_compute_dtype", "float32")),
        ({"bnb_4bit_quant_storage": torch.float16}, ("bnb_4bit_quant_storage", "float16")),
    ],
)
def test_coercions(given_value, kept):
    assert getattr(BitsAndBytesConfig(load_in_4bit=True, **given_value), kept[0]) == kept[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither is true; set exactly one"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "both true; set exactly one"),
        ({"load_in_4bit": 1}, "load_in_4bit=1: .* accepts true or false"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf5"}, "'nf5': .* accepts fp4, nf4; did you mean"),
        ({"load_in_4bit": True, "bnb_4bit_compute_dtype": "int8"}, "bnb_4bit_compute_dtype='int8'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_storage": "int32"}, "bnb_4bit_quant_storage='int32'"),
        ({"load_in_4bit": True, "bnb_4bit_blocksize": 16}, "bnb_4bit_blocksize=16: .* accepts 32, 64"),
        ({"load_in_8bit": True, "bnb_4bit_blocksize": 64}, "bnb_4bit_blocksize=64: int8 has one scale a row"),
        ({"load_in_8bit": True, "llm_int8_threshold": -1}, "llm_int8_threshold=-1"),
        ({"load_in_8bit": True, "llm_int8_threshold": math.nan}, "llm_int8_threshold=nan"),
        ({"load_in_8bit": True, "llm_int8_skip_modules": "proj"}, "llm_int8_skip_modules='proj'"),
        ({"load_in_8bit": True, "llm_int8_skip_module": ["a"]}, "did you mean llm_int8_skip_modules"),
        (
            {"load_in_8bit": True, "llm_int8_skip_modules": ["a"], "modules_to_not_convert": ["b"]},
            "they are one setting",
        ),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ConfigError, match=message):
        BitsAndBytesConfig(**arguments)


def test_dictionaries_that_contradict_themselves_are_refused():
    with pytest.raises(ConfigError, match="load_in_4bit=False: the same dictionary says _load_in_4bit=True"):
        BitsAndBytesConfig.from_dict({"_load_in_4bit": True, "load_in_4bit": False, "load_in_8bit": True})
    ours = {"_load_in_8bit": True, "exclusion_rule": "quantlab"}
    assert BitsAndBytesConfig.from_dict(ours) == BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ConfigError, match="bnb_4bit_blok"):
        BitsAndBytesConfig.from_dict({"load_in_4bit": True, "bnb_4bit_blok": 64})


@pytest.mark.parametrize(
    ("asked", "own", "message"),
    [
        (axes("int4"), {}, "dtype=int4: bitsandbytes offers"),
        (axes("nf4", 16), {}, "group_size=16"),
        (axes("int8", 64), {}, "group_size=64"),
        (axes("int8"), {"bnb_4bit_use_double_quant": True}, "double_quant=True: has no effect with dtype=int8"),
        (axes("nf4"), {"llm_int8_threshold": 5.0}, "llm_int8_threshold=5.0: has no effect with dtype=nf4"),
        (axes("nf4"), {"bnb_4bit_double_quant": True}, "did you mean bnb_4bit_use_double_quant"),
        (axes("nf4"), {"load_in_8bit": True}, "quantization.load_in_8bit: bitsandbytes has no such setting"),
    ],
)
def test_axes_that_cannot_be_met_are_refused(asked, own, message):
    with pytest.raises(ConfigError, match=message):
        BitsAndBytesConfig.from_axes(asked, own)


@pytest.mark.slow
def test_importing_the_backend_does_not_import_torch():
    code = (
        "import sys, quantlab.backends.bitsandbytes, quantlab.backends.gguf; "
        "sys.exit('torch' in sys.modules or 'bitsandbytes' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
