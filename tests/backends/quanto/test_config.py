"""The quanto config as a value."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantlab.backends import quanto
from quantlab.backends.quanto import QuantoConfig
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES

WEIGHTS = ("int8", "int4", "int2", "float8", "float8_e5m2")
NAMES = st.one_of(st.none(), st.lists(st.text(min_size=1, max_size=8), max_size=3))


@st.composite
def configs(draw: st.DrawFn) -> QuantoConfig:
    weights = draw(st.sampled_from(list(WEIGHTS)))
    optimizer = draw(st.sampled_from(["max", "hqq"])) if weights in ("int4", "int2") else "max"
    activations = draw(st.sampled_from([None, "int8", "float8", "float8_e5m2"]))
    return QuantoConfig(
        weights_dtype=weights, modules_to_not_convert=draw(NAMES), optimizer=optimizer, activations=activations
    )


@given(config=configs())
def test_round_trips(config):
    for data in (config.to_dict(), config.to_diff_dict(), json.loads(config.to_json_string())):
        again = QuantoConfig.from_dict(json.loads(json.dumps(data)))
        assert again == config
        assert hash(again) == hash(config)


def test_keywords_override_and_unused_ones_come_back():
    config, unused = QuantoConfig.from_dict({"weights_dtype": "int2"}, True, weights_dtype="int8", revision="main")
    assert config == QuantoConfig()
    assert unused == {"revision": "main"}


@given(config=configs())
def test_axes_are_the_inverse_of_from_axes(config):
    assert QuantoConfig.from_axes(config.axes()) == config


@pytest.mark.parametrize("dtype", CAPABILITIES["quanto"])
def test_every_row_of_the_table(dtype):
    row = CAPABILITIES["quanto"][dtype]
    for algorithm, activations in itertools.product(row.algorithms, row.activation_dtypes):
        config = QuantoConfig.from_axes(
            QuantizationAxes(backend="quanto", dtype=dtype, algorithm=algorithm, activation_dtype=activations)
        )
        axes = config.axes()
        assert (axes.dtype, axes.algorithm, axes.activation_dtype) == (dtype, algorithm, activations)
        assert config.needs_data == (activations != "none")
        assert config.without_data() is None
        assert quanto.resolve(config, "cpu") == config


def test_diffusers_and_transformers_read_and_written():
    stored = {"quant_method": "quanto", "weights_dtype": "float8", "modules_to_not_convert": ["proj_out"]}
    config = QuantoConfig.from_dict(stored)
    assert (config.exclusion_rule, config.to_dict()) == ("diffusers", stored)
    theirs = {
        "quant_method": "quanto",
        "weights": "float8",
        "activations": None,
        "modules_to_not_convert": ["proj_out"],
    }
    assert QuantoConfig.from_dict(theirs) == dataclasses.replace(config, exclusion_rule="transformers")


def test_the_users_list_is_copied_and_an_empty_one_is_none():
    names = ["a"]
    config = QuantoConfig(modules_to_not_convert=names)
    names.append("b")
    assert config.modules_to_not_convert == ("a",)
    assert QuantoConfig(modules_to_not_convert=[]) == QuantoConfig()
    assert QuantoConfig(modules_to_not_convert=["a", "a"]) == QuantoConfig(modules_to_not_convert=["a"])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"weights_dtype": "int3"}, "weights_dtype='int3': QuantoConfig accepts float8, int8"),
        ({"weights_dtype": None}, "weights_dtype=None: QuantoConfig accepts"),
        ({"weights": "int4", "activations": "int4"}, "activations='int4': QuantoConfig accepts int8, float8"),
        ({"weights": "int4", "weights_dtype": "int8"}, "weights='int4': weights_dtype='int8' is given too"),
        ({"activations_dtype": "int8"}, "activations_dtype: QuantoConfig has no such setting"),
        ({"group_size": 64}, "group_size: QuantoConfig has no such setting"),
        ({"modules_to_not_convert": "proj_out"}, "modules_to_not_convert='proj_out'"),
        ({"optimizer": "hqq"}, "optimizer='hqq': quanto has it for weights_dtype int4 and int2, not int8"),
        ({"quant_method": "torchao"}, "quant_method='torchao'"),
    ],
)
def test_refuses(data, message):
    with pytest.raises(ConfigError) as error:
        QuantoConfig.from_dict(data)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("axes", "settings", "message"),
    [
        ({"dtype": "nf4"}, {}, "dtype=nf4: quanto offers int8, int4, int2"),
        ({"dtype": "int4", "group_size": 64}, {}, "group_size=64: quanto chooses its own group size"),
        ({"dtype": "int8", "algorithm": "hqq"}, {}, "algorithm=hqq: quanto int8 offers auto, max"),
        (
            {"dtype": "int8", "activation_dtype": "int4"},
            {},
            "activation_dtype=int4: quanto int8 offers auto, none, ",
        ),
        ({"dtype": "int4"}, {"weights_dtype": "int8"}, "quantization.weights_dtype: quanto has no settings"),
    ],
)
def test_refuses_axes(axes, settings, message):
    with pytest.raises(ConfigError) as error:
        QuantoConfig.from_axes(QuantizationAxes(backend="quanto", **axes), settings)
    assert str(error.value).startswith(message)


def test_update_is_validated():
    config = QuantoConfig()
    with pytest.raises(ConfigError, match="weights_dtype='int99'"):
        config.update(weights_dtype="int99")
    assert config == QuantoConfig()


@pytest.mark.slow
def test_importing_and_building_a_config_imports_no_torch():
    code = (
        "import sys; from quantlab.backends import quanto; from quantlab.vocabulary.axes import QuantizationAxes as A; "
        "quanto.Config.from_axes(A(backend='quanto', dtype='int4')).to_dict(); "
        "sys.exit(bool({'torch', 'optimum.quanto'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
