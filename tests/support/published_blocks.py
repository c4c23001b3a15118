"""Blocks as they stand in published models' config.json and hf_quant_config.json, and what becomes of each."""

from __future__ import annotations

from typing import Any

Axes = tuple[str, str, int | str, str, str]
"""backend, dtype, group_size, activation_dtype, algorithm."""

_BNB = {
    "_load_in_4bit": True,
    "_load_in_8bit": False,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False,
    "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": None,
    "llm_int8_threshold": 6.0,
    "load_in_4bit": True,
    "load_in_8bit": False,
    "quant_method": "bitsandbytes",
}
_BNB_8 = {**_BNB, "_load_in_4bit": False, "_load_in_8bit": True, "load_in_4bit": False, "load_in_8bit": True}


def _ao(kind: str, version: int, **data: Any) -> dict[str, Any]:
    return {"_type": kind, "_version": version, "_data": data}


def _enum(kind: str, name: str) -> dict[str, Any]:
    return {"_type": kind, "_data": name}


def _dtype(name: str) -> dict[str, Any]:
    return _enum("torch.dtype", name)


def torchao(quant_type: Any, **more: Any) -> dict[str, Any]:
    """As transformers writes it."""
    wrapped = quant_type if isinstance(quant_type, str) else {"default": quant_type}
    return {
        "include_input_output_embeddings": False,
        "modules_to_not_convert": None,
        "quant_method": "torchao",
        "quant_type": wrapped,
        "quant_type_kwargs": {},
        "untie_embedding_weights": False,
        **more,
    }


_PLAIN = _ao("PlainLayout", 1)
_TILED = _ao("TensorCoreTiledLayout", 1, inner_k_tiles=8)
_FLOAT8_DYNAMIC = {
    "activation_dtype": _dtype("float8_e4m3fn"),
    "activation_value_lb": None,
    "activation_value_ub": None,
    "granularity": [_ao("PerRow", 1), _ao("PerRow", 1)],
    "kernel_preference": _enum("KernelPreference", "AUTO"),
    "mm_config": _ao("Float8MMConfig", 1, emulate=False, pad_inner_dim=False, use_fast_accum=True),
    "set_inductor_config": True,
    "weight_dtype": _dtype("float8_e4m3fn"),
}
_INT4_OLD = {
    "group_size": 128,
    "layout": _TILED,
    "preserve_zero": None,
    "set_inductor_config": True,
    "use_hqq": True,
    "zero_point_domain": _enum("ZeroPointDomain", "NONE"),
}
_8DA4W = _ao(
    "Int8DynamicActivationIntxWeightConfig",
    1,
    act_mapping_type=_enum("MappingType", "ASYMMETRIC"),
    layout=_ao("QDQLayout", 1),
    packing_format=_enum("PackingFormat", "UNPACKED_TO_INT8"),
    weight_dtype=_dtype("int4"),
    weight_granularity=_ao("PerGroup", 1, group_size=32),
    weight_mapping_type=_enum("MappingType", "SYMMETRIC"),
    weight_scale_dtype=_dtype("bfloat16"),
)
_INT8_EMBEDDING = _ao(
    "IntxWeightOnlyConfig",
    1,
    granularity=_ao("PerAxis", 1, axis=0),
    layout=_ao("QDQLayout", 1),
    mapping_type=_enum("MappingType", "SYMMETRIC"),
    scale_dtype=None,
    weight_dtype=_dtype("int8"),
)


def _nvidia(algo: str | None, **more: Any) -> dict[str, Any]:
    """hf_quant_config.json as ModelOpt's exporter writes it."""
    details = {"quant_algo": algo, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], **more}
    return {"producer": {"name": "modelopt", "version": "0.33.0"}, "quantization": details}


def _groups(weights: dict[str, Any], inputs: dict[str, Any] | None) -> dict[str, Any]:
    group = {"weights": {"dynamic": False, **weights}, "targets": ["Linear"]}
    return {"group_0": {**group, "input_activations": {"dynamic": False, **inputs}} if inputs else group}


_FP8_SIDE, _FP4_SIDE = {"num_bits": 8, "type": "float"}, {"num_bits": 4, "type": "float", "group_size": 16}

PUBLISHED: dict[str, tuple[dict[str, Any], Axes | str]] = {
    # -- bitsandbytes
    "bnb nf4 of a language model": (_BNB, ("bitsandbytes", "nf4", "auto", "none", "max")),
    "bnb nf4 that skips layers": (
        {**_BNB, "llm_int8_skip_modules": ["lm_head", "multi_modal_projector", "model.layers.1.mlp"]},
        ("bitsandbytes", "nf4", "auto", "none", "max"),
    ),
    "bnb nf4 of a pipeline": (
        {**_BNB, "bnb_4bit_use_double_quant": False},
        ("bitsandbytes", "nf4", "auto", "none", "max"),
    ),
    "bnb fp4 before quant_method": (
        {k: v for k, v in _BNB.items() if k != "quant_method" and k[0] != "_"} | {"bnb_4bit_quant_type": "fp4"},
        ("bitsandbytes", "fp4", "auto", "none", "max"),
    ),
    "bnb int8": (_BNB_8, ("bitsandbytes", "int8", "auto", "int8", "max")),
    "bnb int8 before quant_method": (
        {"load_in_8bit": True, "llm_int8_threshold": 6.0, "llm_int8_skip_modules": None},
        ("bitsandbytes", "int8", "auto", "int8", "max"),
    ),
    # -- torchao
    "torchao shorthand of diffusers": (
        {"modules_to_not_convert": None, "quant_method": "torchao", "quant_type": "int8wo", "quant_type_kwargs": {}},
        ("torchao", "int8", "none", "none", "max"),
    ),
    "torchao shorthand with a group": (
        torchao("int4_weight_only", quant_type_kwargs={"group_size": 64}),
        ("torchao", "int4", 64, "none", "max"),
    ),
    "torchao shorthand with a list as layout": (
        torchao(
            "int4_weight_only",
            quant_type_kwargs={"group_size": 128, "layout": ["TensorCoreTiledLayout", {"inner_k_tiles": 8}]},
        ),
        ("torchao", "int4", 128, "none", "max"),
    ),
    "torchao shorthand with a layout for a CPU": (
        torchao("int4_weight_only", quant_type_kwargs={"group_size": 64, "layout": ["Int4CPULayout", {}]}),
        ("torchao", "int4", 64, "none", "max"),
    ),
    "torchao shorthand with a plain layout": (
        torchao("int8_dynamic_activation_int8_weight", quant_type_kwargs={"layout": ["PlainLayout", {}]}),
        ("torchao", "int8", "none", "int8", "max"),
    ),
    "torchao shorthand that prunes": (
        torchao("int4_weight_only", quant_type_kwargs={"group_size": 128, "layout": ["MarlinSparseLayout", {}]}),
        "MarlinSparseLayout keeps two of four weights",
    ),
    "torchao int8, version 1": (
        torchao(_ao("Int8WeightOnlyConfig", 1, group_size=None, set_inductor_config=True)),
        ("torchao", "int8", "none", "none", "max"),
    ),
    "torchao int8 with int8, version 1": (
        torchao(
            _ao(
                "Int8DynamicActivationInt8WeightConfig",
                1,
                act_mapping_type=_enum("MappingType", "SYMMETRIC"),
                layout=_PLAIN,
                set_inductor_config=True,
                weight_only_decode=False,
            )
        ),
        ("torchao", "int8", "none", "int8", "max"),
    ),
    "torchao int4, version 1": (
        torchao(_ao("Int4WeightOnlyConfig", 1, **_INT4_OLD)),
        ("torchao", "int4", 128, "none", "hqq"),
    ),
    "torchao int4, version 2 with fields of version 1": (
        torchao(
            _ao(
                "Int4WeightOnlyConfig",
                2,
                **_INT4_OLD,
                int4_packing_format=_enum("Int4PackingFormat", "TILE_PACKED_TO_4D"),
                int4_choose_qparams_algorithm=_enum("Int4ChooseQParamsAlgorithm", "HQQ"),
            )
        ),
        ("torchao", "int4", 128, "none", "hqq"),
    ),
    "torchao 8da4w, removed class": (
        torchao(
            _ao(
                "Int8DynamicActivationInt4WeightConfig",
                1,
                act_mapping_type=_enum("MappingType", "ASYMMETRIC"),
                group_size=32,
                layout=_PLAIN,
                mapping_type=_enum("MappingType", "SYMMETRIC"),
                set_inductor_config=True,
            )
        ),
        ("torchao", "int4", 32, "int8", "max"),
    ),
    "torchao 8da4w": (torchao(_8DA4W), ("torchao", "int4", 32, "int8", "max")),
    "torchao float8 of rows": (
        torchao(_ao("Float8DynamicActivationFloat8WeightConfig", 2, **_FLOAT8_DYNAMIC)),
        ("torchao", "float8_e4m3", "none", "float8_e4m3", "max"),
    ),
    "torchao float8 of rows, version 1": (
        torchao(
            _ao(
                "Float8DynamicActivationFloat8WeightConfig",
                1,
                **{k: v for k, v in _FLOAT8_DYNAMIC.items() if k != "kernel_preference"},
            )
        ),
        ("torchao", "float8_e4m3", "none", "float8_e4m3", "max"),
    ),
    "torchao per module, of Linear layers": (
        torchao(_ao("ModuleFqnToConfig", 1, module_fqn_to_config={"_default": _8DA4W, "lm_head": None})),
        ("torchao", "custom", "auto", "custom", "custom"),
    ),
    "torchao per module, with embeddings": (
        torchao(
            _ao("ModuleFqnToConfig", 1, module_fqn_to_config={"_default": _8DA4W, "model.embed": _INT8_EMBEDDING}),
            include_input_output_embeddings=True,
            untie_embedding_weights=True,
        ),
        "include_input_output_embeddings=true: quantlab quantizes Linear layers only",
    ),
    "torchao awq": (
        torchao(
            _ao(
                "AWQConfig",
                1,
                base_config=_ao("Int4WeightOnlyConfig", 2, group_size=128),
                scale_search_space_size=20,
                step="prepare_for_loading",
            )
        ),
        "one step of a calibration; write algorithm=awq",
    ),
    "torchao unsigned": (
        torchao("uintx_weight_only", quant_type_kwargs={"dtype": "uint4", "group_size": 64}),
        "nearest is IntxWeightOnlyConfig",
    ),
    # -- quanto, gguf
    "quanto of transformers": (
        {"activations": None, "modules_to_not_convert": None, "quant_method": "quanto", "weights": "int8"},
        ("quanto", "int8", "auto", "none", "max"),
    ),
    "quanto of diffusers": (
        {"modules_to_not_convert": ["proj_out"], "quant_method": "quanto", "weights_dtype": "float8"},
        ("quanto", "float8_e4m3", "auto", "none", "max"),
    ),
    "gguf of a pipeline": (
        {"compute_dtype": "bfloat16", "modules_to_not_convert": None, "pre_quantized": True, "quant_method": "gguf"},
        "add gguf_type, the format to write",
    ),
    # -- ModelOpt
    "modelopt FP8": (_nvidia("FP8"), ("modelopt", "float8_e4m3", "auto", "float8_e4m3", "max")),
    "modelopt FP8 in config.json": (
        {
            "config_groups": _groups(_FP8_SIDE, _FP8_SIDE),
            "ignore": ["lm_head", "model.layers.0.self_attn*"],
            "kv_cache_scheme": {"dynamic": False, **_FP8_SIDE},
            "producer": {"name": "modelopt", "version": "0.35.0"},
            "quant_algo": "FP8",
            "quant_method": "modelopt",
        },
        ("modelopt", "float8_e4m3", "auto", "float8_e4m3", "max"),
    ),
    "modelopt NVFP4": (_nvidia("NVFP4", group_size=16), "add weight_only: true"),
    "modelopt NVFP4 in config.json": (
        {
            "config_groups": _groups(_FP4_SIDE, _FP4_SIDE),
            "ignore": ["lm_head"],
            "quant_algo": "NVFP4",
            "quant_method": "modelopt",
        },
        "add weight_only: true",
    ),
    "modelopt NVFP4, weights alone": (
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 16, "weight_only": True},
        ("modelopt", "nvfp4", 16, "none", "max"),
    ),
    "modelopt W4A16 NVFP4": (
        _nvidia("W4A16_NVFP4", group_size=16, kv_cache_quant_algo=None),
        ("modelopt", "nvfp4", 16, "none", "max"),
    ),
    "modelopt W4A16 AWQ": (
        _nvidia("W4A16_AWQ", group_size=128, has_zero_point=False, pre_quant_scale=True),
        ("modelopt", "int4", 128, "none", "awq_lite"),
    ),
    "modelopt W4A8 AWQ": (
        _nvidia("W4A8_AWQ", group_size=128, has_zero_point=False, pre_quant_scale=True),
        ("modelopt", "int4", 128, "float8_e4m3", "awq_lite"),
    ),
    "modelopt SmoothQuant": (_nvidia("W8A8_SQ_PER_CHANNEL"), ("modelopt", "int8", "none", "int8", "smoothquant")),
    "modelopt W8A16": (_nvidia("W8A16"), ("modelopt", "int8", "none", "none", "max")),
    "modelopt FP8 of rows and tokens": (_nvidia("FP8_PER_CHANNEL_PER_TOKEN"), "activations with one scale a token"),
    "modelopt FP8 of square blocks": (_nvidia("FP8_PB_WO"), "blocks of 128 x 128 weights"),
    "modelopt mixed": (
        _nvidia("MIXED_PRECISION", quantized_layers={"model.layers.0.mlp.up_proj": {"quant_algo": "FP8"}}),
        "layers have formats of their own",
    ),
    # -- libraries that quantlab has not
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
        "quant_method=gptq: there are .*algorithm=gptq",
    ),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
        "quant_method=awq: there are .*algorithm=awq",
    ),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": _groups({**_FP8_SIDE, "strategy": "channel"}, {**_FP8_SIDE, "dynamic": True}),
        },
        "quant_method=compressed-tensors: there are .*dtype=",
    ),
    "fp8 in square blocks": (
        {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
        "quant_method=fp8: there are .*float8_e4m3",
    ),
    "mxfp4": ({"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}, "quant_method=mxfp4: .*dtype=mxfp4"),
}
"""What it is -> the block, and the axes that it has or why it is refused."""

RUN = {name: block for name, (block, outcome) in PUBLISHED.items() if not isinstance(outcome, str)}
REFUSED = {name: (block, outcome) for name, (block, outcome) in PUBLISHED.items() if isinstance(outcome, str)}
