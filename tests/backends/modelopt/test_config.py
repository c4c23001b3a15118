"""The ModelOpt config as a value: the list of quantizers that it tells the library, what is refused, and back."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlab.backends.modelopt import NVIDIAModelOptConfig, build_quant_cfg
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

ROWS = CAPABILITIES["modelopt"]
ALL_CASES = [(d, g) for d, row in ROWS.items() for g in ("auto", *row.group_sizes)]


def axes(dtype="int8", group_size="auto", **more):
    return QuantizationAxes(backend="modelopt", dtype=dtype, group_size=group_size, **more)


def test_the_quantizer_list_denies_all_and_names_layers():
    config = NVIDIAModelOptConfig.from_axes(axes("int4"))
    made = build_quant_cfg(config, {"blocks[0].proj_out": (64, 256), "head": (64, 40)})
    assert made["algorithm"] == "max"
    assert made["quant_cfg"] == [
        {"quantizer_name": "*", "enable": False},
        {
            "quantizer_name": "blocks[[]0].proj_out.weight_quantizer",
            "enable": True,
            "cfg": {"num_bits": 4, "block_sizes": {-1: 128}},
        },
        {"quantizer_name": "head.weight_quantizer", "enable": True, "cfg": {"num_bits": 4, "block_sizes": {-1: 40}}},
    ]
    block = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
    made = build_quant_cfg(NVIDIAModelOptConfig("NVFP4_NVFP4", weight_only=False), {"a": (16, 32)})
    assert [e["cfg"] for e in made["quant_cfg"][1:]] == [block, block]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"quant_type": "fp8"}, r"quant_type='fp8': W or W_A is wanted.*did you mean FP8"),
        ({"quant_type": "FP9"}, "quant_type='FP9': W or W_A"),
        ({"quant_type": "FP8_INT8_X"}, "quant_type='FP8_INT8_X': W or W_A"),
        ({"quant_type": "FP8_"}, "quant_type='FP8_': W or W_A"),
        ({"quant_type": "NF4"}, "NF4 is not offered.*bitsandbytes and torchao"),
        ({"quant_type": 8}, "quant_type=8: NVIDIAModelOptConfig accepts a word"),
        ({}, "quant_type: NVIDIAModelOptConfig needs it"),
        ({"quant_type": "FP8_INT8"}, "weight_only=true: the activation half of quant_type=FP8_INT8 would be ignored"),
        ({"quant_type": "FP8", "weight_only": False}, "weight_only=false: quant_type=FP8 names no activations"),
        ({"quant_type": "INT4", "block_quantize": 64}, "block_quantize=64: it needs channel_quantize=-1"),
        (
            {"quant_type": "INT4", "block_quantize": 64, "channel_quantize": 0},
            "blocks of 1 or more run along in_features",
        ),
        ({"quant_type": "INT4", "block_quantize": "x", "channel_quantize": -1}, "block_quantize='x'"),
        ({"quant_type": "INT8", "channel_quantize": -1}, "channel_quantize=-1: without block_quantize it is 0"),
        ({"quant_type": "NVFP4", "block_quantize": 32, "channel_quantize": -1}, "NVFP4 has blocks of 16"),
        (
            {"quant_type": "NVFP4", "scale_channel_quantize": -1, "scale_block_quantize": 16},
            "scale_channel_quantize=-1",
        ),
        ({"quant_type": "INT8", "algorithm": "awq"}, "algorithm='awq': NVIDIAModelOptConfig accepts max, mse"),
        ({"quant_type": "INT8", "fit_group_size": True}, "fit_group_size=true"),
        ({"quant_type": "INT8", "forward_loop": print}, "forward_loop: a config holds data, not code"),
        ({"quant_type": "INT8", "chanel_quantize": 0}, "chanel_quantize: .*did you mean channel_quantize"),
        ({"quant_type": "INT8", "modelopt_config": {}}, "modelopt_config: it has a quant_cfg"),
        (
            {
                "quant_type": "INT8",
                "modelopt_config": {"quant_cfg": [{"quantizer_name": "*proj*", "cfg": {"num_bits": 4}}]},
            },
            "quantizer '[*]proj[*]' is set for some layers only",
        ),
        ({"quant_type": "INT8", "modelopt_config": {"quant_cfg": []}}, "sets no [*]weight_quantizer"),
    ],
)
def test_bad_configs(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        NVIDIAModelOptConfig(**kwargs)


def test_what_diffusers_wrote():
    entries = {
        "*weight_quantizer": {"fake_quant": False, "num_bits": 4, "block_sizes": {"-1": 32}},
        "*input_quantizer": {"enable": False},
    }
    theirs = {
        "quant_method": "modelopt",
        "quant_type": "INT4",
        "modules_to_not_convert": ["proj_out"],
        "weight_only": True,
        "channel_quantize": None,
        "block_quantize": None,
        "calib_cfg": {"method": "mse"},
        "forward_loop": None,
        "scale_channel_quantize": None,
        "scale_block_quantize": None,
        "modelopt_config": {"quant_cfg": entries, "algorithm": {"method": "mse"}},
        "disable_conv_quantization": False,
    }
    config = NVIDIAModelOptConfig.from_dict(theirs)
    assert (config.quant_type, config.algorithm, config.modules_to_not_convert) == ("INT4", "mse", ("proj_out",))
    assert build_quant_cfg(config, {"a": (4, 64)})["quant_cfg"][1]["cfg"] == {"num_bits": 4, "block_sizes": {-1: 32}}
    assert (config.axes().dtype, config.axes().group_size, config.axes().activation_dtype) == ("int4", 32, "none")


@settings(max_examples=150, deadline=None)
@given(
    case=st.sampled_from(ALL_CASES),
    compress=st.booleans(),
    names=st.lists(st.sampled_from(["a", "b.c", "re:x"]), unique=True),
)
def test_round_trips(case, compress, names):
    exclusions = {"own": names} if names else {}
    config = NVIDIAModelOptConfig.from_axes(axes(*case, modules_to_not_convert=exclusions), {"compress": compress})
    for use_diff in (True, False):
        again = NVIDIAModelOptConfig.from_dict(json.loads(config.to_json_string(use_diff=use_diff)))
        assert again == config
        assert hash(again) == hash(config)
    assert NVIDIAModelOptConfig.from_axes(config.axes(), {"compress": compress}) == config
    is_same = case == ("int8", 16) and compress and not names
    assert (config == NVIDIAModelOptConfig.from_axes(axes("int8", 16))) == is_same


def test_the_axes_of_an_integer_tensor_with_one_scale_read_custom():
    assert NVIDIAModelOptConfig("INT8").axes().dtype == "custom"


@pytest.mark.slow
def test_the_config_imports_neither_torch_nor_modelopt():
    code = (
        "import sys\n"
        "from quantlab.backends.modelopt import Config, build_quant_cfg, resolve\n"
        "from quantlab.vocabulary.axes import QuantizationAxes\n"
        "c = Config.from_axes(QuantizationAxes(backend='modelopt', dtype='int4'))\n"
        "build_quant_cfg(resolve(c, 'cpu'), {'a': (4, 8)}); Config.from_dict(c.to_dict())\n"
        "print([m for m in ('torch', 'modelopt', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
