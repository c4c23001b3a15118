"""Configs of the libraries that no axes spell run as they are; what they store is read back from the tensors."""

import json

import pytest
import torch
from torch import nn

import quantlab
from quantlab.backends.scheme import scheme_of_config
from quantlab.errors import ConfigError, NotQuantized
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.published_blocks import torchao
from tests.support.shell import digits_words


def int8_of(granularity):
    return {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {"granularity": granularity}}


def intx(dtype, granularity=None):
    row = granularity or {"_type": "PerAxis", "_version": 1, "_data": {"axis": 0}}
    data = {"weight_dtype": {"_type": "torch.dtype", "_data": dtype}, "granularity": row}
    return {"_type": "IntxWeightOnlyConfig", "_version": 2, "_data": data}


def group(size):
    return {"_type": "PerGroup", "_version": 1, "_data": {"group_size": size}}


PER_TENSOR = {"_type": "PerTensor", "_version": 1, "_data": {}}
DYNAMIC_PER_TENSOR = {
    "_type": "Int8DynamicActivationInt8WeightConfig",
    "_version": 2,
    "_data": {"granularity": PER_TENSOR},
}


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16))


def layers_of(report):
    return {row.name: row for row in report.layers if row.status == "quantized"}


CUSTOM = {
    "int8, one scale": (int8_of(PER_TENSOR), ("int8", None, "none"), 0.02),
    "int5 rows": (intx("int5"), ("int5", None, "none"), 0.08),
    "int6 rows": (intx("int6"), ("int6", None, "none"), 0.04),
    "int6 groups": (intx("int6", group(16)), ("int6", 16, "none"), 0.04),
    "int7 rows": (intx("int7"), ("int7", None, "none"), 0.02),
}


@pytest.mark.parametrize("name", CUSTOM)
def test_what_no_axes_spell_is_read_back(name):
    form, (dtype, size, activation), bound = CUSTOM[name]
    config = quantlab.TorchAoConfig(form)
    assert (config.axes().dtype, config.axes().activation_dtype) == ("custom", "custom")
    module, report = quantlab.quantize(net(), config)
    rows = layers_of(report)
    assert {(r.dtype, r.group_size, r.activation_dtype) for r in rows.values()} == {(dtype, size, activation)}
    assert all(0 < row.weight_rel_error < bound for row in rows.values())


def test_one_bit_without_a_zero_point_is_all_zeros_and_refused():
    with pytest.raises(NotQuantized, match="torchao loses weights"):
        quantlab.quantize(net(), quantlab.TorchAoConfig(intx("int1")))


def test_one_bit_with_a_zero_point_runs():
    form = intx("int1")
    form["_data"]["mapping_type"] = {"_type": "MappingType", "_data": "ASYMMETRIC"}
    _, report = quantlab.quantize(net(), quantlab.TorchAoConfig(form))
    assert {row.dtype for row in layers_of(report).values()} == {"int1"}


def test_activations_with_one_scale_a_call_are_known_to_look_at_their_neighbours():
    config = quantlab.TorchAoConfig(DYNAMIC_PER_TENSOR)
    assert config.activation_granularity == "per-tensor"
    assert config.depends_on_neighbours


# -- a config a module

PER_MODULE = {
    "_type": "FqnToConfig",
    "_version": 1,
    "_data": {
        "fqn_to_config": {
            "0": intx("int4", group(32)),
            r"re:[2-3]": intx("int6"),
            "4": None,
            "_default": int8_of({"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}),
        }
    },
}


@pytest.mark.parametrize("kind", ["FqnToConfig", "ModuleFqnToConfig", "AOPerModuleConfig"])
def test_each_module_gets_what_it_is_called_for(kind):
    inside = PER_MODULE["_data"]["fqn_to_config"]
    key = "fqn_to_config" if kind == "FqnToConfig" else "module_fqn_to_config"
    config = quantlab.TorchAoConfig({"_type": kind, "_version": 1, "_data": {key: inside}})
    module, report = quantlab.quantize(net(), config)
    assert {n: (r.dtype, r.group_size) for n, r in layers_of(report).items()} == {
        "0": ("int4", 32),
        "2": ("int6", None),
    }
    left = next(row for row in report.layers if row.name == "4")
    assert (left.status, left.dtype) == ("excluded", "float32")
    assert "FqnToConfig" in left.reason


def test_names_go_before_patterns_and_patterns_before_the_default():
    inside = {"_default": intx("int6"), "re:.*": intx("int5"), "2.weight": intx("int7")}
    config = quantlab.TorchAoConfig({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": inside}})
    _, report = quantlab.quantize(net(), config)
    assert {n: r.dtype for n, r in layers_of(report).items()} == {"0": "int5", "2": "int7", "4": "int5"}


def test_the_order_of_patterns_is_part_of_the_config():
    pairs = [("re:0.*", intx("int6")), ("re:.*", intx("int5"))]
    one, other = (
        quantlab.TorchAoConfig({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": dict(p)}})
        for p in (pairs, pairs[::-1])
    )
    assert one != other
    assert scheme_of_config(one).spelled_out() != scheme_of_config(other).spelled_out()


def test_a_config_inside_that_cannot_be_is_refused_at_once():
    inside = {"_default": {"_type": "AWQConfig", "_version": 1, "_data": {}}}
    with pytest.raises(ConfigError, match="write algorithm=awq"):
        quantlab.TorchAoConfig({"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": inside}})
    with pytest.raises(ConfigError, match="it names no module"):
        quantlab.TorchAoConfig({"_type": "FqnToConfig", "_version": 1, "_data": {}})


def test_torchaos_own_objects_are_taken():
    from collections import OrderedDict

    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis

    inside = OrderedDict([("0", IntxWeightOnlyConfig(torch.int5, PerAxis(0))), ("_default", Int8WeightOnlyConfig())])
    _, report = quantlab.quantize(net(), quantlab.TorchAoConfig(FqnToConfig(fqn_to_config=inside)))
    assert {n: r.dtype for n, r in layers_of(report).items()} == {"0": "int5", "2": "int8", "4": "int8"}


def test_a_scheme_that_the_library_cannot_do_is_refused_by_name():
    form = {"_type": "Float8DynamicActivationInt4WeightConfig", "_version": 1, "_data": {}}
    with pytest.raises(quantlab.errors.QuantlabError, match="^quant_type=Float8DynamicActivationInt4WeightConfig"):
        quantlab.quantize(net(), quantlab.TorchAoConfig(form))
    with pytest.raises(ConfigError, match="^quant_type=NoSuchConfig: torchao cannot build it"):
        quantlab.quantize(net(), quantlab.TorchAoConfig({"_type": "NoSuchConfig", "_version": 1, "_data": {}}))


# -- ModelOpt


@pytest.mark.parametrize("quant_type", ["INT8", "FP8"])
def test_modelopt_as_diffusers_takes_it(quant_type):
    module, report = quantlab.quantize(net(), quantlab.NVIDIAModelOptConfig(quant_type))
    rows = layers_of(report)
    assert {row.group_size for row in rows.values()} == {None}
    assert {row.dtype for row in rows.values()} == {"int8" if quant_type == "INT8" else "float8_e4m3"}
    assert all(0 < row.weight_rel_error < 0.05 for row in rows.values())
    assert torch.isfinite(module(torch.randn(2, 64))).all()


# -- through a whole run


def test_custom_is_not_a_word_to_choose():
    with pytest.raises(ConfigError, match="^dtype=custom"):
        quantlab.compose(["dtype=custom"])
    with pytest.raises(ConfigError, match="^dtype=custom"):
        quantlab.TorchAoConfig.from_axes(QuantizationAxes(backend="torchao", dtype="custom"))


@pytest.mark.slow
def test_a_per_module_scheme_runs_from_the_command_line_and_again_from_its_recipe(shell, tmp_path):
    inside = {"re:.*mlp.*": intx("int5"), "_default": int8_of({"_type": "PerRow", "_version": 1, "_data": {"dim": -1}})}
    block = torchao(
        {"_type": "FqnToConfig", "_version": 1, "_data": {"fqn_to_config": inside}}, modules_to_not_convert=[]
    )
    words = [f"quantization.quantization_config={json.dumps(block)}", *digits_words()]
    rows = shell.rows(*words)
    row = rows["torchao custom"]
    assert row["status"] == "FINISHED"
    axes = row["params"]["quantization"]
    assert (axes["dtype"], axes["activation_dtype"], axes["algorithm"]) == ("custom",) * 3
    job = quantlab.compose(words).jobs[0]
    (tmp_path / "again.yaml").write_text(job.recipe_yaml)
    again = quantlab.compose(recipe=str(tmp_path / "again.yaml")).jobs[0]
    assert again.schemes[""].native == job.schemes[""].native
    assert again.schemes[""].spelled_out() == job.schemes[""].spelled_out()
