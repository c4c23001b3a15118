"""Hypothesis strategies over every field of the native configs."""

import torch
from hypothesis import strategies as st

from quantlab import (
    BitsAndBytesConfig,
    GGUFQuantizationConfig,
    NVIDIAModelOptConfig,
    QuantoConfig,
    TorchAoConfig,
)
from quantlab.backends.gguf.mixes import BASES
from quantlab.backends.torchao.shorthands import _get_torchao_quant_type_to_method
from quantlab.vocabulary.native import EXCLUSION_RULES
from tests.support.tables import CAPABILITIES

SHORTHANDS = [name for name, form in _get_torchao_quant_type_to_method().items() if isinstance(form, dict)]
DYNAMIC = ("int8dq", "int8_dynamic_activation_int8_weight", "float8dq", "float8dq_e4m3", "float8dq_e4m3_tensor")
FORMATS = tuple(CAPABILITIES["gguf"])

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
    if given_type in ("int8wo", "int8_weight_only", "int8dq") or (
        is_int4 and own["int4_packing_format"] == own["mapping_type"] == "auto" and own["group_size"] != 256
    ):
        own["algorithm"] = draw(st.sampled_from(["auto", "awq", "smoothquant"]))
        own["calibration_layers_at_once"] = draw(st.integers(0, 9))
    if own.get("algorithm") == "smoothquant":
        own["smoothquant_alpha"] = draw(st.floats(0, 1))
    if given_type in DYNAMIC and own.get("algorithm") != "awq":
        own["activation_scales"] = draw(st.sampled_from(["dynamic", "static"]))
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
    with_data = [f for f in FORMATS if f != "q8_0"]  # which takes no importance matrix
    algorithms = st.just({}) | st.fixed_dictionaries(
        {
            "algorithm": st.just("imatrix"),
            "gguf_type": st.sampled_from(with_data),
            "imatrix_file": st.none() | st.just("found.gguf"),
        }
    )
    plain = st.tuples(_gguf_settings(), algorithms).map(lambda made: GGUFQuantizationConfig(**{**made[0], **made[1]}))
    mixes = st.sampled_from(sorted(BASES)).flatmap(
        lambda kind: st.builds(
            GGUFQuantizationConfig,
            gguf_type=st.just(BASES[kind]),
            file_type=st.just(kind),
            file_type_measures=st.none() | st.just({"num_layers": 8, "heads_per_kv_head": 4}),
        )
    )
    return plain | mixes


def _gguf_settings():
    return st.fixed_dictionaries(
        {
            "compute_dtype": st.sampled_from([None, "float32", "torch.bfloat16", torch.float16]),
            "modules_to_not_convert": NAMES,
            "gguf_type": st.none() | st.sampled_from([*FORMATS, *map(str.upper, FORMATS)]),
            "tensor_types": st.none()
            | st.dictionaries(st.sampled_from(["a.*", "re:b", "c.d"]), st.sampled_from(FORMATS)),
            "exclusion_rule": RULES,
        }
    )


MODELOPT_ALGORITHMS = {
    "FP8": ["max", "awq_lite"],
    "INT8": ["max", "awq_lite", "gptq"],
    "INT4": ["max", "mse", "awq_lite"],
    "INT3": ["max", "mse", "local_hessian"],
    "NVFP4": ["max", "awq_lite"],
    "MXFP8": ["max"],
    "MXFP4": ["max"],
}


@st.composite
def modelopt_configs(draw):
    weight = draw(st.sampled_from(list(MODELOPT_ALGORITHMS)))
    activation = draw(st.sampled_from(["", "INT8", "FP8"]))
    own = {
        "quant_type": f"{weight}_{activation}" if activation else weight,
        "weight_only": not activation,
        "modules_to_not_convert": draw(NAMES),
        "exclusion_rule": draw(RULES),
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
        own = {
            k: v
            for k, v in own.items()
            if k not in ("channel_quantize", "block_quantize", "fit_group_size", "activation_scales")
        }
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
