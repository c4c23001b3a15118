"""ModelOpt's settings of calibration: what is refused and with which words, what the library is told, and back."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from quantlab.backends import modelopt as backend
from quantlab.backends.modelopt import NVIDIAModelOptConfig, build_quant_cfg
from quantlab.backends.modelopt.algorithms import ALGORITHMS, PARAMETERS
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from tests.support.modelopt_net import (
    LAYERS,
    config_of,
    feed,
    make_model,
    outliers,
    quantized,
    relative,
)

# -- what is refused


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"quant_type": "INT4", "algorithm": "smoothquant"},
            r"^algorithm=smoothquant: .*in silence; set dtype=int8 and ",
        ),
        ({"quant_type": "INT8", "algorithm": "smoothquant"}, r"^algorithm=smoothquant: it smooths INT8 activations"),
        (
            {"quant_type": "FP8", "algorithm": "awq_clip"},
            r"^algorithm=awq_clip: .*do max in silence; set algorithm=max$",
        ),
        ({"quant_type": "FP8", "algorithm": "awq_full"}, r"^algorithm=awq_full: .*set algorithm=awq_lite$"),
        ({"quant_type": "INT8", "algorithm": "mse"}, r"^algorithm=mse: with 8 bits .*max in silence"),
        ({"quant_type": "FP8", "algorithm": "mse"}, r"^algorithm=mse: with 8 bits"),
        (
            {"quant_type": "MXFP4", "algorithm": "awq_lite"},
            r"^algorithm=awq_lite: the scales of MXFP4 are powers of two",
        ),
        (
            {"quant_type": "INT2", "algorithm": "gptq"},
            r"^algorithm=gptq: .*outgrow weights of 2 bits; set algorithm=awq_fu",
        ),
        ({"quant_type": "NVFP4", "algorithm": "gptq"}, r"^algorithm=gptq: .*static blocks only"),
        (
            {"quant_type": "INT8", "activation_scales": "static"},
            r"^activation_scales=static: .*set activation_dtype=int8",
        ),
        ({"quant_type": "INT8_MXFP8", "weight_only": False, "activation_scales": "static"}, r"each block at run time"),
        ({"quant_type": "INT8", "activation_scales": "both"}, r"activation_scales='both': .*accepts dynamic, static"),
        (
            {"quant_type": "INT4", "algorithm": "svdquant", "algorithm_settings": {"rank": 8}},
            r"^algorithm_settings\.rank: svdquant has no such setting \(it has lowrank\); did you mean lowrank\?",
        ),
        (
            {"quant_type": "INT4", "algorithm_settings": {"alpha": 1}},
            r"\.alpha: max has no such setting \(it has none\)",
        ),
        (
            {"quant_type": "INT4", "algorithm": "svdquant", "algorithm_settings": {"lowrank": 1.5}},
            r"^algorithm_settings\.lowrank=1\.5: svdquant takes a whole number from 1 to",
        ),
        (
            {"quant_type": "INT4", "algorithm": "awq_lite", "algorithm_settings": {"alpha_step": 2}},
            r"alpha_step=2: .* to 1;",
        ),
        (
            {
                "quant_type": "INT4",
                "algorithm": "mse",
                "algorithm_settings": {"start_multiplier": 1.0, "stop_multiplier": 0.5},
            },
            r"start_multiplier=1\.0: it lies above stop_multiplier=0\.5",
        ),
        (
            {
                "quant_type": "INT8_INT8",
                "weight_only": False,
                "algorithm": "awq_lite",
                "modelopt_config": {
                    "quant_cfg": [
                        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
                        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "axis": 0, "type": "dynamic"}},
                    ]
                },
            },
            r"^algorithm=awq_lite: it takes activations with one scale for the tensor",
        ),
        (
            {
                "quant_type": "INT8_INT8",
                "weight_only": False,
                "activation_scales": "static",
                "modelopt_config": {
                    "quant_cfg": [
                        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
                        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8, "type": "dynamic"}},
                    ]
                },
            },
            r"^activation_scales=static: modelopt_config says type: dynamic",
        ),
        (
            {
                "quant_type": "INT4",
                "algorithm": "svdquant",
                "algorithm_settings": {"lowrank": 8},
                "modelopt_config": {
                    "quant_cfg": [
                        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 32}}}
                    ],
                    "algorithm": {"method": "svdquant", "lowrank": 4},
                },
            },
            r"^algorithm_settings=.*modelopt_config says .*agree",
        ),
    ],
)
def test_refused_configs(kwargs, message):
    with pytest.raises(ConfigError, match=message):
        NVIDIAModelOptConfig(**kwargs)


@pytest.mark.parametrize(
    ("dtype", "algorithm"),
    [
        ("int4", "smoothquant"),
        ("int8", "mse"),
        ("float8_e4m3", "awq_clip"),
        ("mxfp8", "awq_lite"),
        ("nvfp4", "local_hessian"),
    ],
)
def test_the_table_refuses_the_same(dtype, algorithm):
    with pytest.raises(ConfigError, match=rf"^algorithm={algorithm}: modelopt {dtype} offers auto, max"):
        resolve_axes(QuantizationAxes(backend="modelopt", dtype=dtype, algorithm=algorithm))


@pytest.mark.parametrize(
    ("algorithm", "settings", "message"),
    [
        ("svdquant", {"lowrank": 64}, r"^algorithm_settings\.lowrank=64: 2 \[64, 128\] has no higher rank"),
        (
            "local_hessian",
            {"block_size": 96},
            r"^algorithm_settings\.block_size=96: in_features 256 of 0 does not divide",
        ),
    ],
)
def test_settings_that_a_layer_cannot_take(algorithm, settings, message):
    model = make_model()
    config = config_of("int4", algorithm, algorithm_settings=settings)
    with pytest.raises(ConfigError, match=message):
        backend.calibrate(model, LAYERS, config, "float32", feed())
    assert type(model[0]) is nn.Linear


def test_static_scales_without_data_are_refused():
    config = config_of("int8", "max", "int8", "static")
    with pytest.raises(ConfigError, match=r"^activation_scales=static: 0, 2 saw no calibration data.*=dynamic$"):
        backend.quantize(make_model(), LAYERS, config, "float32")


# -- the config


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_data_and_its_absence(algorithm):
    dtype = "int8" if algorithm == "smoothquant" else "int4"
    config = config_of(dtype, algorithm)
    assert config.needs_data == (algorithm not in ("max", "mse"))
    plain = config.without_data()
    if algorithm == "max":
        assert plain is None
        static = config_of("int8", "max", "int8", "static")
        assert static.needs_data
        assert static.without_data() == config_of("int8", "max", "int8")
        return
    assert (plain.algorithm, plain.algorithm_settings, plain.needs_data) == ("max", None, False)
    assert (plain.quant_type, plain.block_quantize) == (config.quant_type, config.block_quantize)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_settings_reach_the_library(algorithm):
    """Every setting is one of the library's, and all are spelled out: its own defaults have no say."""
    from modelopt.torch.quantization.mode import CalibrateModeRegistry

    known = CalibrateModeRegistry[f"{algorithm}_calibrate"].config_class.model_fields
    assert set(PARAMETERS[algorithm]) <= set(known)
    told = build_quant_cfg(config_of("int8" if algorithm == "smoothquant" else "int4", algorithm), {"a": (8, 256)})
    if algorithm != "max":
        assert {"method", *PARAMETERS[algorithm]} <= set(told["algorithm"])
        assert all(value is not None for value in told["algorithm"].values())


def test_a_setting_changes_the_result():
    x = outliers(99)
    for algorithm, setting in (
        ("svdquant", {"lowrank": 4}),
        ("awq_clip", {"min_clip_ratio": 0.9}),
        ("local_hessian", {"block_size": 64}),
        ("gptq", {"perc_damp": 0.5}),
    ):
        config = config_of("int4", algorithm, algorithm_settings=setting)
        assert not torch.equal(quantized(config)(x), quantized(config_of("int4", algorithm))(x)), algorithm
    smooth = {alpha: config_of("int8", "smoothquant", algorithm_settings={"alpha": alpha}) for alpha in (0.5, 1.0)}
    assert smooth[0.5].algorithm_settings is None
    exact = make_model()(x)
    assert relative(quantized(smooth[0.5])(x), exact) < relative(quantized(smooth[1.0])(x), exact)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("scales", ["static", "dynamic"])
def test_through_diffusers_and_back(algorithm, scales):
    config = config_of("int8" if algorithm == "smoothquant" else "int4", algorithm, "int8", scales, group=32)
    refused = {"local_hessian": "^algorithm=local_hessian: Diffusers has one block_size"}.get(algorithm)
    if refused is None and scales == "dynamic" and algorithm in ("smoothquant", "awq_lite", "awq_full", "svdquant"):
        refused = f"^activation_scales=dynamic: with algorithm={algorithm} ModelOpt alone"
    if refused:
        with pytest.raises(ConfigError, match=refused):
            config.to_diffusers()
        return
    stored = json.loads(json.dumps(config.to_diffusers().to_dict(), sort_keys=True))
    assert NVIDIAModelOptConfig.from_dict(stored) == config


def test_json_and_back():
    for config in (
        config_of("int4", "svdquant"),
        config_of("int8", "smoothquant", scales="static"),
        config_of("int2", "awq_full"),
        config_of("int3", "mse"),
    ):
        for use_diff in (True, False):
            assert NVIDIAModelOptConfig.from_dict(json.loads(config.to_json_string(use_diff=use_diff))) == config
        own = {"algorithm_settings": config.algorithm_settings, "activation_scales": config.activation_scales}
        assert NVIDIAModelOptConfig.from_axes(config.axes(), own) == config


def test_a_pasted_config_with_static_activations_needs_data():
    sides = [
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": 8}},
    ]
    config = NVIDIAModelOptConfig(
        "INT8_INT8",
        weight_only=False,
        algorithm="smoothquant",
        modelopt_config={"quant_cfg": sides, "algorithm": {"method": "smoothquant", "alpha": 0.6}},
    )
    assert (config.activation_scales, config.algorithm_settings, config.needs_data) == ("static", {"alpha": 0.6}, True)
    assert config.without_data().needs_data is False
    x, exact = outliers(99), make_model()(outliers(99))
    assert relative(quantized(config)(x), exact) < 0.5 * relative(quantized(config.without_data())(x), exact)


def test_diffusers_refuses_fewer_bits_by_name():
    with pytest.raises(ConfigError, match="^quant_type=INT3: Diffusers cannot load INT3"):
        config_of("int3", "max").to_diffusers(make_model())
