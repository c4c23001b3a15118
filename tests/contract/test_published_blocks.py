"""What stands on model cards and in model folders is pasted as it is: as JSON, as a file, as the folder it lies in."""

import json

import pytest
import torch
from torch import nn

import quantlab
from quantlab.backends.scheme import pasted_scheme
from quantlab.errors import ConfigError
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.published_blocks import PUBLISHED, REFUSED, RUN

KEY = "quantization.quantization_config"


def composed(text):
    return quantlab.compose([f"{KEY}={text}"]).jobs[0]


def pasted(block):
    return pasted_scheme(QuantizationAxes(backend="torchao", quantization_config=json.dumps(block, indent=2)), {})


def seen(scheme_or_job):
    axes = scheme_or_job.axes
    return axes.backend, axes.dtype, axes.group_size, axes.activation_dtype, axes.algorithm


@pytest.mark.parametrize("name", RUN)
def test_a_published_block_is_pasted_as_json(name):
    block, axes = PUBLISHED[name]
    assert seen(pasted(block)) == axes


@pytest.mark.parametrize("name", REFUSED)
def test_a_published_block_is_refused_with_the_reason_and_the_way_out(name):
    block, message = PUBLISHED[name]
    with pytest.raises(ConfigError, match=message) as refused:
        pasted(block)
    assert str(refused.value).startswith(f"{KEY}: ")


@pytest.mark.parametrize("name", ["bnb nf4 that skips layers", "torchao 8da4w", "modelopt FP8 in config.json"])
def test_json_is_typed_as_it_stands(name):
    block, axes = PUBLISHED[name]
    for key in (KEY, "quantization_config"):
        for indent in (2, None):
            job = quantlab.compose([f"{key}={json.dumps(block, indent=indent)}"]).jobs[0]
            assert seen(job) == axes
            assert job.resolved["quantization"]["quantization_config"] == block


ON_A_CPU = [
    name
    for name, (_, axes) in PUBLISHED.items()
    if name in RUN and axes[1] != "nvfp4" and not (axes[0] == "torchao" and axes[3] == "float8_e4m3")
]


@pytest.mark.parametrize("name", ON_A_CPU)
def test_a_published_block_quantizes_what_it_says(name):
    block, (_, dtype, _, activation, _) = PUBLISHED[name]
    config = quantlab.config_from_dict({**block, **_no_exclusions(block)})
    net = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64 if dtype == "custom" else 128))
    if config.axes().group_size == 128:
        net = nn.Sequential(nn.Linear(128, 64))
    data = [torch.randn(4, 128)] if config.needs_data else None
    module, report = quantlab.quantize(net, config, calibration=data)
    layers = [row for row in report.layers if row.status == "quantized"]
    assert len(layers) == len([layer for layer in net if isinstance(layer, nn.Linear)])
    if dtype != "custom":
        assert {(row.dtype, row.activation_dtype) for row in layers} == {(dtype, activation)}
    assert torch.isfinite(module(torch.randn(3, 128))).all()


def _no_exclusions(block):
    own = {key: None for key in ("modules_to_not_convert", "llm_int8_skip_modules") if key in block}
    return {**own, "exclusion_rule": "quantlab"} if "producer" not in block and "quant_algo" not in block else {}


# -- files


@pytest.mark.parametrize("wrapped", [True, False], ids=["config.json", "the block alone"])
def test_a_file_is_read(tmp_path, wrapped):
    block = PUBLISHED["bnb nf4 that skips layers"][0]
    content = {"transformers_version": "4.50", "quantization_config": block} if wrapped else block
    (tmp_path / "config.json").write_text(json.dumps(content))
    job = composed(tmp_path / "config.json")
    assert seen(job) == PUBLISHED["bnb nf4 that skips layers"][1]
    assert job.schemes[""].native.exclusion_rule == ("transformers" if wrapped else "library")
    assert job.resolved["quantization"]["quantization_config"]["llm_int8_skip_modules"][0] == "lm_head"


def test_a_block_of_a_part_of_a_multimodal_model_is_found(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"text_config": {"quantization_config": PUBLISHED["bnb int8"][0]}, "vision_config": {}})
    )
    assert composed(tmp_path).axes.dtype == "int8"


def test_a_folder_with_modelopts_own_file_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(PUBLISHED["modelopt FP8"][0]))
    assert seen(composed(tmp_path)) == PUBLISHED["modelopt FP8"][1]
    assert quantlab.from_pretrained_config(tmp_path).axes().dtype == "float8_e4m3"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "it has no quantization_config, so the model is not quantized"),
        ("[1]", "a mapping is wanted"),
        ("{", "not a readable JSON file"),
        ('{"quantization_config": 3}', "a mapping is wanted"),
    ],
)
def test_a_file_that_says_nothing_is_refused(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=f"^{KEY}: .*{message}"):
        composed(tmp_path / "config.json")


@pytest.mark.parametrize("text", ["nowhere/config.json", "nowhere", "'{\"quant_method\": '", "[1]", "3"])
def test_what_is_neither_json_nor_a_file_is_refused(text):
    with pytest.raises(ConfigError, match=f"^{KEY}"):
        composed(text)


def test_several_blocks_are_a_sweep(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(PUBLISHED["bnb int8"][0]))
    texts = ",".join([json.dumps(PUBLISHED["quanto of transformers"][0]), str(tmp_path / "a.json")])
    jobs = quantlab.compose([f"{KEY}={texts}"]).jobs
    assert [job.axes.backend for job in jobs] == ["quanto", "bitsandbytes"]


def test_what_was_read_from_a_file_is_handed_on_without_it(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": PUBLISHED["torchao 8da4w"][0]}))
    job = composed(tmp_path / "config.json")
    (tmp_path / "again.yaml").write_text(job.recipe_yaml)
    (tmp_path / "config.json").unlink()
    assert str(tmp_path) not in job.recipe_yaml
    assert quantlab.compose(recipe=str(tmp_path / "again.yaml")).jobs[0].schemes[""].native == job.schemes[""].native


RECIPE = "# @package _global_\nquantization:\n  quantization_config: {}\n"
CANDIDATES = "# @package _global_\nsweep:\n  candidates:\n    - {{quantization_config: {}}}\n"


@pytest.mark.parametrize("recipe", [RECIPE, CANDIDATES], ids=["node", "candidate"])
def test_a_file_that_a_recipe_names_is_asked_for(tmp_path, recipe):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["bnb int8"][0]))
    (tmp_path / "mine.yaml").write_text(recipe.format(tmp_path / "config.json"))
    plan = quantlab.compose(recipe=str(tmp_path / "mine.yaml"))
    assert plan.asked_for == {KEY: str(tmp_path / "config.json")}
    with pytest.raises(ConfigError, match=f"{KEY} = "):
        quantlab.run(recipe=str(tmp_path / "mine.yaml"))


def test_a_block_in_a_recipe_is_not_asked_for(tmp_path):
    (tmp_path / "mine.yaml").write_text(RECIPE.format(json.dumps(PUBLISHED["bnb int8"][0])))
    assert quantlab.compose(recipe=str(tmp_path / "mine.yaml")).asked_for == {}


def test_a_key_that_the_user_types_is_not_asked_for(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["bnb int8"][0]))
    (tmp_path / "mine.yaml").write_text("# @package _global_\nevaluation: {num_samples: 50}\n")
    plan = quantlab.compose([f"{KEY}={tmp_path / 'config.json'}"], recipe=str(tmp_path / "mine.yaml"))
    assert plan.asked_for == {}
