"""What a config accepts and what it refuses, field by field, with the message."""

import dataclasses

import pytest
import torch
from omegaconf import OmegaConf

from quantlab import (
    BitsAndBytesConfig,
    ConfigError,
    GGUFQuantizationConfig,
    NVIDIAModelOptConfig,
    QuantoConfig,
    TorchAoConfig,
)
from tests.support.configs import ONE_OF_EACH

EVERY_BOOL = [
    (BitsAndBytesConfig, {"load_in_4bit": True}, name)
    for name in (
        "load_in_8bit",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
        "bnb_4bit_use_double_quant",
    )
]
EVERY_BOOL += [
    (NVIDIAModelOptConfig, {"quant_type": "FP8"}, n)
    for n in ("weight_only", "disable_conv_quantization", "compress", "fit_group_size")
]
EVERY_BOOL += [(TorchAoConfig, {"quant_type": "int8wo"}, "fit_group_size")]


@pytest.mark.parametrize(("kind", "rest", "name"), EVERY_BOOL)
@pytest.mark.parametrize("value", ["true", 1, None, [True]])
def test_what_is_no_truth_value(kind, rest, name, value):
    with pytest.raises(ConfigError, match=rf"^{name}=.*: {kind.__name__} accepts true or false"):
        kind(**rest, **{name: value})


@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: c.quant_method.value)
@pytest.mark.parametrize("value", ["proj_out", 3, [1], [None], [""], [["a"]], b"a"])
def test_what_is_no_list_of_names(config, value):
    with pytest.raises(
        ConfigError, match=r"(modules_to_not_convert|llm_int8_skip_modules)=.* accepts a list of non-empty"
    ):
        type(config).from_dict({**config.to_dict(), type(config)._exclusions_field: value})


@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: c.quant_method.value)
@pytest.mark.parametrize("value", [["a"], ("a",), {"a"}, OmegaConf.create(["a"]), {"a": 1}.keys()])
def test_lists_of_any_kind(config, value):
    if not isinstance(value, (list, tuple, set)) and type(value).__name__ == "dict_keys":
        value = tuple(value)
    made = dataclasses.replace(config, **{type(config)._exclusions_field: value})
    assert made.exclusions == ("a",)


@pytest.mark.parametrize("config", ONE_OF_EACH, ids=lambda c: c.quant_method.value)
def test_unknown_keys_name_the_nearest_field(config):
    for name in (f.name for f in dataclasses.fields(config)):
        typo = name[:-1] + "z"
        with pytest.raises(
            ConfigError,
            match=rf"^{typo}: {type(config).__name__} has no such setting; did you mean |"
            rf"^{typo}: int8wo has no such keyword",
        ):
            type(config)(
                **{
                    **(
                        {"quant_type": "int8wo"}
                        if isinstance(config, TorchAoConfig)
                        else {"quant_type": "FP8"}
                        if isinstance(config, NVIDIAModelOptConfig)
                        else {}
                    ),
                    typo: 1,
                }
            )


PASTED = {"algorithm": "max", "quant_cfg": {"*weight_quantizer": {"num_bits": 8, "block_sizes": {"-1": 32}}}}
B4, B8 = {"load_in_4bit": True}, {"load_in_8bit": True}
WRONG = [
    (BitsAndBytesConfig, {}, "neither is true; set exactly one"),
    (BitsAndBytesConfig, {**B4, **B8}, "both true; set exactly one"),
    (BitsAndBytesConfig, {**B8, "llm_int8_threshold": "6"}, "^llm_int8_threshold='6': .* accepts a number"),
    (BitsAndBytesConfig, {**B8, "llm_int8_threshold": True}, "^llm_int8_threshold=True"),
    (BitsAndBytesConfig, {**B8, "llm_int8_threshold": -1}, "^llm_int8_threshold=-1.0: give a number from 0"),
    (BitsAndBytesConfig, {**B8, "llm_int8_threshold": float("nan")}, "^llm_int8_threshold=nan"),
    (
        BitsAndBytesConfig,
        {**B4, "bnb_4bit_compute_dtype": "bfloat"},
        "^bnb_4bit_compute_dtype='bfloat': .*float32, bfloat16",
    ),
    (
        BitsAndBytesConfig,
        {**B4, "bnb_4bit_compute_dtype": "int8"},
        "^bnb_4bit_compute_dtype='int8': .* accepts float32",
    ),
    (BitsAndBytesConfig, {**B4, "bnb_4bit_compute_dtype": "nn"}, "^bnb_4bit_compute_dtype='nn'"),
    (BitsAndBytesConfig, {**B4, "bnb_4bit_compute_dtype": 16}, "^bnb_4bit_compute_dtype=16"),
    (
        BitsAndBytesConfig,
        {**B4, "bnb_4bit_quant_type": "nf5"},
        "^bnb_4bit_quant_type='nf5': .*fp4, nf4; did you mean nf4",
    ),
    (BitsAndBytesConfig, {**B4, "bnb_4bit_quant_type": None}, "^bnb_4bit_quant_type=None"),
    (BitsAndBytesConfig, {**B4, "bnb_4bit_quant_storage": "add"}, "^bnb_4bit_quant_storage='add'"),
    (BitsAndBytesConfig, {**B4, "bnb_4bit_quant_storage": torch.int32}, "^bnb_4bit_quant_storage='?torch.int32|int32"),
    (BitsAndBytesConfig, {**B4, "bnb_4bit_blocksize": 48}, "^bnb_4bit_blocksize=48: .*32, 64, 128"),
    (BitsAndBytesConfig, {**B8, "bnb_4bit_blocksize": 64}, "^bnb_4bit_blocksize=64: int8 has one scale a row"),
    (
        BitsAndBytesConfig,
        {**B8, "modules_to_not_convert": ["a"], "llm_int8_skip_modules": ["b"]},
        "they are one setting",
    ),
    (TorchAoConfig, {}, "^quant_type: TorchAoConfig needs it"),
    (TorchAoConfig, {"quant_type": 8}, "^quant_type=8: TorchAoConfig accepts a shorthand"),
    (TorchAoConfig, {"quant_type": "int8ow"}, "^quant_type='int8ow': no such shorthand; did you mean int8wo"),
    (
        TorchAoConfig,
        {"quant_type": "fp8wo_e4m3"},
        "^quant_type='fp8wo_e4m3': no such shorthand; did you mean float8wo_e4m3",
    ),
    (
        TorchAoConfig,
        {"quant_type": "int8wo", "group_sise": 32},
        "^group_sise: int8wo has no such keyword; did you mean group",
    ),
    (
        TorchAoConfig,
        {"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {"x": 1}}}},
        "has no setting x",
    ),
    (TorchAoConfig, {"quant_type": {"a": 1}}, "^quant_type: a dictionary has the key default"),
    (TorchAoConfig, {"quant_type": "int8wo", "int4_packing_format": "plain"}, "^int4_packing_format='plain'"),
    (QuantoConfig, {"weights_dtype": "int3"}, "^weights_dtype='int3': QuantoConfig accepts float8, int8, int4, int2"),
    (QuantoConfig, {"weights_dtype": torch.int8}, "^weights_dtype=torch.int8"),
    (QuantoConfig, {"weights_dtype": None}, "^weights_dtype=None"),
    (QuantoConfig, {"activations": "int4"}, "^activations='int4': QuantoConfig accepts int8, float8"),
    (QuantoConfig, {"optimizer": "hqq"}, "^optimizer='hqq': quanto has it for weights_dtype int4 and int2"),
    (GGUFQuantizationConfig, {"compute_dtype": "bf16"}, "^compute_dtype='bf16': .* accepts float32, bfloat16, float16"),
    (GGUFQuantizationConfig, {"compute_dtype": 5}, "^compute_dtype=5"),
    (GGUFQuantizationConfig, {"gguf_type": "q4_km"}, "^gguf_type='q4_km': .*did you mean q4_k"),
    (GGUFQuantizationConfig, {"tensor_types": {"a": "q9"}}, "^tensor_types=a: 'q9' is none of q8_0"),
    (GGUFQuantizationConfig, {"tensor_types": ["a"]}, r"^tensor_types=\['a'\]: .* accepts a mapping"),
    (NVIDIAModelOptConfig, {}, "^quant_type: NVIDIAModelOptConfig needs it"),
    (NVIDIAModelOptConfig, {"quant_type": "fp8"}, "^quant_type='fp8': .*did you mean FP8"),
    (NVIDIAModelOptConfig, {"quant_type": "FP9"}, "^quant_type='FP9': W or W_A is wanted"),
    (NVIDIAModelOptConfig, {"quant_type": "FP8_INT3"}, "^quant_type='FP8_INT3'"),
    (NVIDIAModelOptConfig, {"quant_type": "FP8_INT8_INT4"}, "^quant_type='FP8_INT8_INT4'"),
    (NVIDIAModelOptConfig, {"quant_type": 8}, "^quant_type=8: NVIDIAModelOptConfig accepts a word"),
    (NVIDIAModelOptConfig, {"quant_type": "NF4"}, "plain INT4.*nf4 is offered by bitsandbytes and torchao"),
    (NVIDIAModelOptConfig, {"quant_type": "FP8_FP8"}, "^weight_only=true: the activation half"),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "FP8", "weight_only": False},
        "^weight_only=false: quant_type=FP8 names no act",
    ),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "INT4", "block_quantize": 16},
        "^block_quantize=16: it needs channel_quantize=-1",
    ),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "INT4", "block_quantize": "x"},
        "^block_quantize='x': .* accepts a whole number",
    ),
    (NVIDIAModelOptConfig, {"quant_type": "INT8", "channel_quantize": 3}, "^channel_quantize=3"),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "NVFP4", "scale_block_quantize": 16},
        "scale_block_quantize=16: they come together",
    ),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "INT8", "channel_quantize": 0, "modelopt_config": PASTED},
        "^channel_quantize=0: mod",
    ),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "INT8", "channel_quantize": -1, "block_quantize": 64, "modelopt_config": PASTED},
        "^block_quantize=64: modelopt_config says 32",
    ),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "INT8", "algorithm": "mse", "modelopt_config": PASTED},
        "^algorithm=mse: modelopt",
    ),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "FP8", "modelopt_config": PASTED},
        "^quant_type=FP8: modelopt_config says INT8",
    ),
    (NVIDIAModelOptConfig, {"quant_type": "FP8", "modelopt_config": {}}, "it has a quant_cfg"),
    (NVIDIAModelOptConfig, {"quant_type": "FP8", "algorithm": "best"}, "^algorithm='best': "),
    (
        NVIDIAModelOptConfig,
        {"quant_type": "FP8", "forward_loop": print},
        "^forward_loop: a config holds data, not code",
    ),
    *[
        (
            type(c),
            {**c.to_diff_dict(), "quant_method": None, "exclusion_rule": "mine"},
            "^exclusion_rule='mine': .* accepts",
        )
        for c in ONE_OF_EACH
    ],
]


@pytest.mark.parametrize(("kind", "values", "message"), WRONG)
def test_wrong_values_are_refused_at_construction(kind, values, message):
    with pytest.raises(ConfigError, match=message):
        kind(**{k: v for k, v in values.items() if k != "quant_method"})


@pytest.mark.parametrize(
    ("kind", "values", "name", "kept"),
    [
        (BitsAndBytesConfig, {**B8, "llm_int8_threshold": 6}, "llm_int8_threshold", 6.0),
        (BitsAndBytesConfig, {**B4, "bnb_4bit_compute_dtype": "torch.bfloat16"}, "bnb_4bit_compute_dtype", "bfloat16"),
        (BitsAndBytesConfig, {**B4, "bnb_4bit_quant_storage": torch.float16}, "bnb_4bit_quant_storage", "float16"),
        (GGUFQuantizationConfig, {"compute_dtype": torch.bfloat16}, "compute_dtype", "bfloat16"),
        (
            GGUFQuantizationConfig,
            {"gguf_type": "Q6_K", "tensor_types": OmegaConf.create({"a": "Q4_0"})},
            "tensor_types",
            {"a": "q4_0"},
        ),
        (
            NVIDIAModelOptConfig,
            {"quant_type": "FP8", "modules_to_not_convert": OmegaConf.create(["a"])},
            "modules_to_not_convert",
            ("a",),
        ),
    ],
)
def test_what_yaml_json_and_torch_produce_is_accepted(kind, values, name, kept):
    assert getattr(kind(**values), name) == kept
