"""torchao's settings of calibration: what is refused and with which words, and the config as a value."""

from __future__ import annotations

import copy

import pytest
import torch

from quantlab.backends import torchao as backend
from quantlab.backends.torchao import TorchAoConfig
from quantlab.backends.torchao.build import quiet_library
from quantlab.backends.torchao.forms import make
from quantlab.errors import ConfigError
from quantlab.modules.feed import feed_of_batches
from tests.support.torchao_net import NAMES, SCHEMES, batches, config_of, net

REFUSED = [
    ({"dtype": "int3", "algorithm": "awq"}, "^algorithm=awq: torchao int3 offers auto, max, hqq; awq is offered by "),
    ({"dtype": "nf4", "algorithm": "smoothquant"}, "^algorithm=smoothquant: torchao nf4 offers auto, max; "),
    ({"dtype": "float8_e4m3", "algorithm": "awq"}, "^algorithm=awq: torchao float8_e4m3 offers auto, max; "),
    (
        {"algorithm": "gptq", "group_size": 64},
        "^algorithm=gptq: torchao has it for Int8WeightOnlyConfig with one scale",
    ),
    ({"algorithm": "gptq", "activation_dtype": "int8"}, "^algorithm=gptq: torchao has it for Int8WeightOnlyConfig"),
    (
        {"dtype": "int4", "algorithm": "awq", "activation_dtype": "int8"},
        "^algorithm=awq: torchao int4 has it with activation_dtype=none and group_size=32, 64, 128 or auto, not "
        "activation_dtype=int8 group_size=auto",
    ),
    ({"dtype": "int4", "algorithm": "awq", "group_size": 256}, "^algorithm=awq: .* take algorithm=max$"),
    ({"dtype": "int4", "algorithm": "awq", "int4_packing_format": "unpacked_to_int8"}, "^algorithm=awq: .*packed int4"),
    ({"dtype": "int4", "algorithm": "awq", "mapping_type": "SYMMETRIC"}, "^algorithm=awq: .*mapping_type at auto"),
    (
        {"dtype": "int4", "group_size": 256, "int4_packing_format": "opaque"},
        r"^quantization\.int4_packing_format=opaque: .*32, 64",
    ),
    (
        {"dtype": "int4", "mapping_type": "SYMMETRIC", "int4_packing_format": "opaque"},
        r"^quantization\.mapping_type=SYMMETRIC: opaq",
    ),
    (
        {"activation_scales": "static"},
        r"^quantization\.activation_scales=static: .*this is Int8WeightOnlyConfig; set dtype and ",
    ),
    (
        {"dtype": "int4", "activation_dtype": "int8", "activation_scales": "static"},
        r"^quantization\.activation_scales=static: ",
    ),
    (
        {"activation_dtype": "int8", "algorithm": "awq", "activation_scales": "static"},
        r"^quantization\.activation_scales=static: torchao's AWQ .*set algorithm=smoothquant",
    ),
    (
        {
            "dtype": "float8_e4m3",
            "activation_dtype": "float8_e4m3",
            "group_size": "none",
            "activation_scales": "static",
        },
        "^group_size=none: .*leave group_size=auto",
    ),
    (
        {"smoothquant_alpha": 0.7},
        r"^quantization\.smoothquant_alpha=0.7: it is for algorithm=smoothquant; leave it out",
    ),
    (
        {"algorithm": "smoothquant", "smoothquant_alpha": 1.5},
        r"^quantization\.smoothquant_alpha=1.5: a number from 0 to 1",
    ),
    (
        {"algorithm": "awq", "calibration_layers_at_once": -1},
        r"^quantization\.calibration_layers_at_once=-1: .*0 takes all",
    ),
    (
        {"activation_scales": "sometimes"},
        r"^quantization\.activation_scales='sometimes': TorchAoConfig accepts dynamic, static",
    ),
]


@pytest.mark.parametrize(("asked", "message"), REFUSED)
def test_refused(asked, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**asked)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("int8 awq", "^algorithm=awq: it needs scales .*give calibration data, or set algorithm=max$"),
        ("int4 64 smoothquant", "^algorithm=smoothquant: it needs .*or set algorithm=max$"),
        ("int8 int8 static", "^activation_scales=static: it needs .*or set activation_scales=dynamic$"),
    ],
)
def test_quantize_without_calibration(scheme, message):
    model, config = net(), config_of(**SCHEMES[scheme])
    before = copy.deepcopy(model.state_dict())
    for found in (None, {}):
        with pytest.raises(ConfigError, match=message):
            backend.quantize(model, ["first"], config, None, found)
    some = backend.calibrate(model, ["first"], config, None, feed_of_batches(batches()))
    with pytest.raises(ConfigError, match="there are none for second;"):
        backend.quantize(model, NAMES[:2], config, None, some)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_config_is_a_value(scheme):
    config = config_of(**SCHEMES[scheme])
    assert config.needs_data
    assert TorchAoConfig.from_dict(config.to_dict()) == config
    own = {k: v for k, v in config.extra_settings().items() if k not in ("algorithm", "fit_group_size")}
    assert TorchAoConfig.from_axes(config.axes(), own) == config
    plain = config.without_data()
    assert (plain is None) == (scheme == "float8 static")
    if plain is not None:
        assert not plain.needs_data
        assert plain.without_data() is None
        assert plain.quant_type == config.quant_type
        assert plain.int4_packing_format == config.int4_packing_format


@pytest.mark.parametrize("scheme", ["int8 awq", "int8 int8 smoothquant", "int8 int8 static", "int4 64 awq"])
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_other_libraries_cannot_hold_it(scheme, library):
    with pytest.raises(ConfigError, match=f"(algorithm|activation_scales)='.*of {library} has no such setting"):
        getattr(config_of(**SCHEMES[scheme]), f"to_{library}")()


def test_opaque_is_not_of_other_libraries():
    with pytest.raises(ConfigError, match="^int4_packing_format=opaque: diffusers does not offer this prototype"):
        config_of("int4", group_size=64, int4_packing_format="opaque").to_diffusers()


def test_the_library_s_steps_as_configs_are_refused_with_what_to_write():
    with quiet_library():
        from torchao.prototype.awq import AWQConfig
        from torchao.quantization import Int8WeightOnlyConfig

    with pytest.raises(ConfigError, match="^quant_type=AWQConfig: .*write algorithm=awq"):
        TorchAoConfig(AWQConfig(Int8WeightOnlyConfig(), step="prepare"))
    with pytest.raises(ConfigError, match="^quant_type=GPTQConfig: .*write algorithm=gptq .*CUDA only"):
        TorchAoConfig({"_type": "GPTQConfig", "_version": 1, "_data": {}})
    hqq = make("Int4WeightOnlyConfig", group_size=64, int4_choose_qparams_algorithm="hqq")
    with pytest.raises(ConfigError, match="^algorithm=awq: int4 has it in groups of .* without hqq"):
        TorchAoConfig(hqq, algorithm="awq")
    asymmetric = make("Int8DynamicActivationInt8WeightConfig", act_mapping_type="asymmetric")
    with pytest.raises(ConfigError, match="^activation_scales=static: it is measured for symmetric activations"):
        TorchAoConfig(asymmetric, activation_scales="static")
