"""Dictionaries that other libraries stored: in checkpoints, in recipes, on the command line."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

import quantlab
from quantlab.backends import exclusions
from quantlab.errors import ConfigError
from quantlab.modules.layers import linear_layers
from tests.support.exclusion_rules import tiny_flux
from tests.support.shell import digits_words


@pytest.fixture(scope="module")
def flux():
    return tiny_flux()


# -- checkpoints


@pytest.mark.parametrize(
    "config",
    [
        quantlab.TorchAoConfig("int8wo", modules_to_not_convert=["norm_out"]),
        quantlab.TorchAoConfig("float8wo"),
        quantlab.QuantoConfig("int4", modules_to_not_convert=["proj_out", "single_transformer_blocks.0.proj_out"]),
    ],
    ids=["torchao int8", "torchao e5m2", "quanto int4"],
)
def test_a_checkpoint_that_diffusers_wrote_is_read(config, flux, tmp_path):
    import diffusers

    flux.save_pretrained(tmp_path / "plain")
    kinds = {"torch_dtype": torch.bfloat16, "quantization_config": config.to_diffusers(flux)}
    model = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "plain", **kinds)
    model.save_pretrained(tmp_path / "quantized")
    read = quantlab.from_pretrained_config(tmp_path / "quantized")
    assert read == quantlab.from_pretrained_config(tmp_path / "quantized" / "config.json")
    assert type(read) is type(config)
    assert read.exclusion_rule == ("diffusers" if config.exclusions else "quantlab")
    assert exclusions.excluded_layers(read, flux) == exclusions.excluded_layers(config, flux)
    assert (read.axes().dtype, read.axes().group_size) == (config.axes().dtype, config.axes().group_size)
    done = {
        n
        for n, layer in model.named_modules()
        if type(layer).__name__ == "QLinear"
        or (isinstance(layer, nn.Linear) and type(layer.weight).__name__ in ("Int8Tensor", "Float8Tensor"))
    }
    assert done == set(linear_layers(flux)) - exclusions.excluded_layers(config, flux)


AO = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        ({"load_in_4bit": True}, quantlab.BitsAndBytesConfig(load_in_4bit=True, exclusion_rule="library")),
        (
            {"quant_method": "bitsandbytes", "_load_in_8bit": True, "_load_in_4bit": False},
            quantlab.BitsAndBytesConfig(load_in_8bit=True, exclusion_rule="library"),
        ),
        (
            {"quant_method": "torchao", "quant_type": {"default": AO}, "exclusion_rule": "diffusers"},
            quantlab.TorchAoConfig("int8wo"),
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": "int4wo",
                "quant_type_kwargs": {"group_size": 64},
                "exclusion_rule": "diffusers",
                "modules_to_not_convert": ["a"],
            },
            quantlab.TorchAoConfig("int4wo", ["a"], group_size=64, exclusion_rule="diffusers"),
        ),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": AO},
                "include_input_output_embeddings": False,
                "untie_embedding_weights": False,
            },
            quantlab.TorchAoConfig("int8wo", exclusion_rule="transformers"),
        ),
        (
            {"quant_method": "quanto", "weights": "int4", "activations": "int8", "modules_to_not_convert": ["lm_head"]},
            quantlab.QuantoConfig("int4", ["lm_head"], activations="int8", exclusion_rule="transformers"),
        ),
        ({"quant_method": "quanto", "weights_dtype": "float8"}, quantlab.QuantoConfig("float8")),
        (
            {"quant_method": "gguf", "compute_dtype": "torch.bfloat16", "pre_quantized": True},
            quantlab.GGUFQuantizationConfig("bfloat16"),
        ),
    ],
)
def test_stored_dictionaries(stored, wanted):
    before = copy.deepcopy(stored)
    assert quantlab.config_from_dict(stored) == wanted
    assert stored == before


@pytest.mark.parametrize(
    ("writer", "rule"), [("_diffusers_version", "diffusers"), ("transformers_version", "transformers")]
)
def test_a_models_config_says_who_wrote_it(writer, rule):
    whole = {writer: "1.0", "quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": ["a"]}}
    assert quantlab.from_pretrained_config(whole).exclusion_rule == rule


MODELOPT_LIST = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {"-1": 32}}},
    ],
    "algorithm": "max",
}
MODELOPT_DICT = {
    "quant_cfg": {
        "*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 32}, "fake_quant": False},
        "*input_quantizer": {"enable": False},
        "nn.Embedding": {"*": {"enable": False}},
        "default": {"enable": False},
    },
    "algorithm": {"method": "max"},
}


@pytest.mark.parametrize("shape", [MODELOPT_LIST, MODELOPT_DICT], ids=["list", "mapping"])
def test_modelopts_two_shapes_with_string_keys(shape):
    config = quantlab.config_from_dict({"quant_method": "modelopt", "quant_type": "INT4", "modelopt_config": shape})
    axes = config.axes()
    assert (axes.dtype, axes.group_size, axes.activation_dtype) == ("int4", 32, "none")
    module, report = quantlab.quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)), config)
    assert {(r.dtype, r.group_size) for r in report.layers} <= {("int4", 32), ("int4", None)}
    assert {r.status for r in report.layers} == {"quantized"}


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, "^quant_method: the dictionary has none"),
        ({"quant_method": "bitsandbyte"}, "^quant_method=bitsandbyte: .*did you mean bitsandbytes"),
        ({"quant_method": "sdnq"}, "^quant_method=sdnq: there are bitsandbytes, torchao"),
        (
            {"quant_method": "quanto", "weights_dtype": "int8", "load_in_8bit": True},
            "^load_in_8bit: QuantoConfig has no such",
        ),
        (
            {"quant_method": "quanto", "exclusion_rule": "diffuser"},
            "^exclusion_rule=diffuser: .*did you mean diffusers",
        ),
        ({"quant_method": "torchao", "quant_type": "fp6"}, "^quant_type='fp6': torchao removed"),
        (
            {"quant_method": "torchao", "quant_type": "int8wo", "include_embedding": True},
            "^include_embedding=true: quantlab",
        ),
        ({"quant_method": "bitsandbytes"}, "neither is true"),
        (
            {"quant_method": "modelopt", "quant_type": "FP8", "modelopt_config": MODELOPT_LIST},
            "modelopt_config says INT4",
        ),
        ({"quant_method": "modelopt", "quant_type": "INT4", "modelopt_config": {"quant_cfg": 3}}, "it has a quant_cfg"),
    ],
)
def test_stored_dictionaries_that_are_refused(stored, message):
    with pytest.raises(ConfigError, match=message):
        quantlab.config_from_dict(stored)


def test_models_that_are_not_quantized_or_not_readable(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="it has no quantization_config, so the model is not quantized"):
        quantlab.from_pretrained_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ConfigError, match="a mapping is wanted, not list"):
        quantlab.from_pretrained_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not a readable JSON file"):
        quantlab.from_pretrained_config(str(tmp_path / "config.json"))
    with pytest.raises(ConfigError, match="there is no such file"):
        quantlab.from_pretrained_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="its quantization_config is a str; a mapping is wanted"):
        quantlab.from_pretrained_config({"quantization_config": "int8"})


# -- in a recipe, on the command line


def test_a_dictionary_on_the_command_line_shows_its_axes():
    text = "{quant_method: torchao, quant_type: int4dq, modules_to_not_convert: [proj_out]}"
    job = quantlab.compose([f"quantization_config={text}"]).jobs[0]
    assert job.schemes[""].native == quantlab.TorchAoConfig("int4dq", ["proj_out"], exclusion_rule="library")
    shown = job.resolved["quantization"]
    assert {k: shown[k] for k in ("backend", "dtype", "group_size", "activation_dtype", "algorithm")} == {
        "backend": "torchao",
        "dtype": "int4",
        "group_size": 32,
        "activation_dtype": "int8",
        "algorithm": "max",
    }
    assert shown["quantization_config"]["modules_to_not_convert"] == ["proj_out"]


def test_a_recipe_holds_a_dictionary_and_a_run_can_be_repeated(tmp_path):
    recipe = tmp_path / "pasted.yaml"
    recipe.write_text(
        "# @package _global_\nquantization:\n  quantization_config:\n    quant_method: bitsandbytes\n"
        "    load_in_4bit: true\n    bnb_4bit_quant_type: nf4\n    bnb_4bit_use_double_quant: true\n"
        "    bnb_4bit_compute_dtype: bfloat16\n    llm_int8_skip_modules: [proj_out]\n"
    )
    job = quantlab.compose(recipe=str(recipe)).jobs[0]
    assert (job.config.quantization.backend, job.config.quantization.dtype) == ("bitsandbytes", "nf4")
    assert job.config.quantization.bnb_4bit_use_double_quant is True
    again = tmp_path / "again.yaml"
    again.write_text(job.recipe_yaml)
    repeated = quantlab.compose(recipe=str(again)).jobs[0]
    assert repeated.schemes[""].native == job.schemes[""].native
    assert repeated.resolved["quantization"] == job.resolved["quantization"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["dtype=nf4"], "^dtype=nf4: the quantization.quantization_config says fp4; leave dtype out"),
        (["backend=quanto"], "^backend=quanto: the quantization.quantization_config says bitsandbytes"),
        (["backend=torchao"], "^backend=torchao: the quantization.quantization_config says bitsandbytes"),
        (["group_size=64"], "^group_size=64: the quantization.quantization_config says auto"),
        (
            ["backend=bitsandbytes", "bnb_4bit_use_double_quant=true"],
            "^quantization.bnb_4bit_use_double_quant=True: the quant",
        ),
    ],
)
def test_a_dictionary_and_an_axis_that_disagree_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        quantlab.compose(["quantization_config={load_in_4bit: true}", *words])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{quant_method: quanto, weights_dtype: int5}",
            "^quantization.quantization_config: weights_dtype='int5': QuantoConfig",
        ),
        ("{quant_method: gguf}", "add gguf_type, the format to write"),
        (
            "{quant_method: torchao, quant_type: {_type: FqnToConfig, _data: {}}}",
            "it names no module; give fqn_to_config",
        ),
    ],
)
def test_a_dictionary_that_cannot_be_run_is_refused_at_composition(text, message):
    with pytest.raises(ConfigError, match=message):
        quantlab.compose([f"quantization_config={text}"])


def test_reading_dictionaries_imports_no_torch():
    code = (
        "import sys, quantlab\n"
        "quantlab.config_from_dict({'quant_method': 'torchao', 'quant_type': 'int4wo'}).axes()\n"
        "quantlab.compose(['quantization_config={load_in_4bit: true}'])\n"
        "assert not {'torch', 'torchao', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# -- through a whole run


@pytest.mark.slow
def test_a_pasted_dictionary_is_the_request_by_axes(shell, tmp_path):
    """Same columns, same numbers (in one sweep they are measured once); its exclusions by its own rule, in the artifact."""
    recipe = tmp_path / "pasted.yaml"
    recipe.write_text(
        "# @package _global_\n"
        "sweep:\n"
        "  floors: false\n"
        "  candidates:\n"
        "    - {quantization_config: {quant_method: quanto, weights_dtype: int4}, name: pasted}\n"
        "    - {quantization_config: {load_in_8bit: true, llm_int8_skip_modules: [blocks.0, nowhere]}, name: skipping}\n"
    )
    rows = shell.rows(f"recipe={recipe}", *digits_words())
    again = shell.rows("backend=quanto", "dtype=int4", "sweep.floors=false", "sweep.force=true", *digits_words())
    by_axes, pasted, skipping = again["quanto int4"], rows["pasted"], rows["skipping"]
    for row in (pasted, skipping):
        assert row["status"] == "FINISHED"
    same = {k: v for k, v in by_axes["metrics"].items() if k.startswith("quality/")}
    assert {k: pasted["metrics"][k] for k in same} == same
    columns = {k: v for k, v in pasted["params"]["quantization"].items() if k != "quantization_config"}
    asked = by_axes["params"]["quantization"]
    assert (columns["backend"], columns["dtype"]) == (asked["backend"], asked["dtype"]) == ("quanto", "int4")
    tracked = shell.tracked()["skipping"]
    assert tracked["params"]["quantization.dtype"] == "int8"
    assert tracked["params"]["resolved.exclusions_without_effect"] == "nowhere"
    assert skipping["metrics"]["quantization/num_excluded"] > 0
