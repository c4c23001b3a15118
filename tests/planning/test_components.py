"""One scheme for each component: what the words mean, and what is refused before anything is loaded."""

from __future__ import annotations

import json

import pytest
import yaml

import quantlab
from quantlab.errors import ConfigError
from quantlab.planning.components import NO_SCHEME
from quantlab.planning.plan import plan

SD3 = "model=sd3_medium"
NF4 = "components.transformer={backend: bitsandbytes, dtype: nf4}"
T5 = "components.text_encoder_3={backend: quanto, dtype: int8}"
BOTH = [SD3, NF4, T5]
BLOCKS = {
    "transformer": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "text_encoder_3": {"quant_method": "quanto", "weights_dtype": "int8"},
}


def written(tmp_path, text):
    file = tmp_path / "mine.yaml"
    file.write_text(f"# @package _global_\ndefaults:\n  - override /model: sd3_medium\n{text}", encoding="utf-8")
    return str(file)


def said(job):
    return {name: f"{scheme.axes.backend} {scheme.axes.dtype}" for name, scheme in job.schemes.items()}


def test_each_component_has_its_own_scheme():
    (job,) = quantlab.compose(BOTH).jobs
    assert said(job) == {"transformer": "bitsandbytes nf4", "text_encoder_3": "quanto int8"}
    assert job.name == "transformer: bitsandbytes nf4 + text_encoder_3: quanto int8"
    assert list(job.components(["transformer"])) == ["transformer", "text_encoder_3"]
    assert job.resolved["components"]["transformer"]["algorithm"] == "max"
    assert job.resolved["quantization"]["backend"] == "none"


def test_the_whole_requests_scheme_is_of_the_others():
    (job,) = quantlab.compose([SD3, T5, "backend=torchao", "dtype=int8"]).jobs
    assert said(job) == {"": "torchao int8", "text_encoder_3": "quanto int8"}
    found = job.components(["transformer"])
    assert {name: scheme and scheme.axes.backend for name, scheme in found.items()} == {
        "transformer": "torchao",
        "text_encoder_3": "quanto",
    }
    (alone,) = quantlab.compose([SD3, "backend=torchao", "dtype=int8"]).jobs
    assert list(alone.components(["transformer"])) == ["transformer"]


def test_axes_of_a_component_are_swept_and_settings_are_its_librarys():
    words = [*BOTH, "components.transformer.bnb_4bit_use_double_quant=true,false"]
    jobs = quantlab.compose(words).jobs
    assert [job.schemes["transformer"].native.bnb_4bit_use_double_quant for job in jobs] == [True, False]
    assert jobs[0].name.startswith("transformer: bitsandbytes nf4 bnb_4bit_use_double_quant + ")
    dtypes = [SD3, T5, "components.transformer={backend: bitsandbytes}", "components.transformer.dtype=nf4,fp4"]
    assert [job.schemes["transformer"].axes.dtype for job in quantlab.compose(dtypes).jobs] == ["nf4", "fp4"]
    whole = [SD3, "components.transformer={backend: gguf, dtype: q4_k},{backend: quanto, dtype: int4}"]
    assert [job.name for job in quantlab.compose(whole).jobs] == ["transformer: gguf q4_k", "transformer: quanto int4"]


@pytest.mark.parametrize(
    "sweep",
    [
        "sweep: {grid: {components.transformer.dtype: [nf4, fp4]}}\n"
        "components: {transformer: {backend: bitsandbytes}, text_encoder_3: {backend: quanto, dtype: int8}}",
        "sweep: {candidates: [{components.transformer.dtype: nf4}, {components.transformer: {backend: bitsandbytes, "
        "dtype: fp4}}]}\ncomponents: {transformer: {backend: bitsandbytes}, text_encoder_3: {backend: quanto, "
        "dtype: int8}}",
        "sweep: {candidates: [{components: {transformer: {backend: bitsandbytes, dtype: nf4}}}, {components: "
        "{transformer: {backend: bitsandbytes, dtype: fp4}}}]}\ncomponents: {text_encoder_3: {backend: quanto}}",
    ],
)
def test_recipes_have_them_in_grids_and_candidates(tmp_path, sweep):
    jobs = quantlab.compose(recipe=written(tmp_path, sweep)).jobs
    assert [job.schemes["transformer"].axes.dtype for job in jobs] == ["nf4", "fp4"]
    assert all(said(job)["text_encoder_3"] == "quanto int8" for job in jobs)


def test_the_command_line_gives_a_component_of_a_recipe_another_scheme(tmp_path):
    recipe = written(
        tmp_path, "components: {transformer: {backend: bitsandbytes, dtype: nf4, bnb_4bit_use_double_quant: true}}"
    )
    (job,) = quantlab.compose(["components.transformer={backend: quanto, dtype: int4}"], recipe=recipe).jobs
    assert job.name == "transformer: quanto int4"
    (job,) = quantlab.compose(["components.transformer.dtype=fp4"], recipe=recipe).jobs
    assert job.name == "transformer: bitsandbytes fp4 bnb_4bit_use_double_quant"


def test_rows_of_a_sweep_count_the_same_components(tmp_path):
    """Bytes and bits of one row beside another's are of the same parts, and a run of one row alone is the same run."""
    recipe = written(
        tmp_path,
        "sweep:\n  candidates:\n    - {components.transformer: {backend: quanto, dtype: int8}}\n"
        "    - {components.text_encoder_3: {backend: quanto, dtype: int8}}\n    - {backend: quanto, dtype: int8}\n",
    )
    jobs = quantlab.compose(recipe=recipe).jobs
    assert [set(job.components(["transformer"])) for job in jobs] == [{"transformer", "text_encoder_3"}] * 3
    assert jobs[1].config.components["transformer"] == NO_SCHEME
    again = tmp_path / "again.yaml"
    for job in jobs:
        again.write_text(job.recipe_yaml, encoding="utf-8")
        (same,) = quantlab.compose(recipe=str(again)).jobs
        assert (same.resolved["components"], said(same)) == (job.resolved["components"], said(job))


def test_what_is_quantized_by_default_is_not_guessed_of_a_pipeline_on_the_hub(tmp_path):
    """Its files are not here: a denoiser may be the whole request's, a text encoder is not."""
    both = "{transformer: {backend: quanto}, text_encoder: {backend: quanto}}"
    candidates = f"sweep: {{candidates: [{{components: {both}}}, {{backend: torchao, dtype: int8}}]}}\n"
    recipe = tmp_path / "mine.yaml"
    model = "defaults:\n  - override /model: diffusers\nmodel: {path: someone/something}\n"
    recipe.write_text(f"# @package _global_\n{model}{candidates}", encoding="utf-8")
    own, whole = quantlab.compose(recipe=str(recipe)).jobs
    assert set(own.schemes) == {"transformer", "text_encoder"}
    assert whole.config.components == {"text_encoder": NO_SCHEME}


@pytest.mark.parametrize("words", [BOTH, [*BOTH, "components.transformer.modules_to_not_convert=[norms, 'a.*']"]])
def test_a_run_is_written_as_a_recipe_that_says_the_same(tmp_path, words):
    (job,) = quantlab.compose(words).jobs
    file = tmp_path / "again.yaml"
    file.write_text(job.recipe_yaml, encoding="utf-8")
    (again,) = quantlab.compose(recipe=str(file)).jobs
    assert again.name == job.name
    assert again.resolved["components"] == job.resolved["components"]
    assert {n: s.native for n, s in again.schemes.items()} == {n: s.native for n, s in job.schemes.items()}


def test_an_importance_matrix_of_a_component_is_left_open_where_it_lies_elsewhere(tmp_path):
    file = tmp_path / "mine.imatrix"
    file.write_bytes(b"x")
    node = f"{{backend: gguf, dtype: q4_k, algorithm: imatrix, imatrix_file: '{file}'}}"
    (job,) = quantlab.compose([SD3, f"components.transformer={node}"]).jobs
    assert "Give it components.transformer.imatrix_file" in job.recipe_yaml
    assert yaml.safe_load(job.recipe_yaml)["components"]["transformer"]["imatrix_file"] == "???"


# -- Diffusers' PipelineQuantizationConfig


@pytest.mark.parametrize(
    "pasted",
    [
        {"quant_mapping": BLOCKS},
        {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"bnb_4bit_quant_type": "nf4"}, "components_to_quantize": [
            "transformer", "text_encoder_3"]},
    ],
)  # fmt: skip
def test_a_pasted_pipeline_config_is_components(pasted, tmp_path):
    (job,) = quantlab.compose([SD3, f"quantization_config={json.dumps(pasted)}"]).jobs
    assert said(job)["transformer"] == "bitsandbytes nf4"
    assert set(job.schemes) == {"transformer", "text_encoder_3"}
    file = tmp_path / "again.yaml"
    file.write_text(job.recipe_yaml, encoding="utf-8")
    (again,) = quantlab.compose(recipe=str(file)).jobs
    assert {n: s.native for n, s in again.schemes.items()} == {n: s.native for n, s in job.schemes.items()}


def test_diffusers_own_object_both_ways():
    import diffusers
    import transformers

    theirs = diffusers.PipelineQuantizationConfig(
        quant_mapping={
            "transformer": diffusers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            "text_encoder_3": transformers.QuantoConfig(weights="int8"),
        }
    )
    ours = quantlab.from_pipeline_config(theirs)
    assert {name: config.axes().dtype for name, config in ours.items()} == {
        "transformer": "nf4",
        "text_encoder_3": "int8",
    }
    back = quantlab.to_pipeline_config(ours)
    assert isinstance(back.quant_mapping["transformer"], diffusers.BitsAndBytesConfig)
    assert isinstance(back.quant_mapping["text_encoder_3"], transformers.QuantoConfig)
    assert quantlab.from_pipeline_config(back) == ours


def test_what_a_component_is_asked_for_goes_out_as_diffusers_has_it():
    (job,) = quantlab.compose(BOTH).jobs
    made = quantlab.to_pipeline_config({name: scheme.native for name, scheme in job.schemes.items()})
    assert made.quant_mapping["transformer"].bnb_4bit_quant_type == "nf4"
    gguf = quantlab.GGUFQuantizationConfig(gguf_type="q4_k")
    with pytest.raises(ConfigError, match=r"^components\.transformer: gguf_type='q4_k': Diffusers only loads"):
        quantlab.to_pipeline_config({"transformer": gguf})


# -- what is refused


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*BOTH, "backend=torchao"], r"^backend=torchao: is for transformer, and components\.transformer says otherwise"),
        ([*BOTH, "dtype=int8"], r"^backend=torchao: is for transformer, and components\.transformer"),
        ([*BOTH, NF4], r"^components\.transformer\.backend: is said twice"),
        ([*BOTH, "components.transformer.dtype=fp4"], r"^components\.transformer\.dtype: is said twice"),
        ([*BOTH, "components.transformer.dtype=fp4,nf4"], r"^components\.transformer\.dtype: is said twice"),
        (
            [SD3, "components={transformer: {backend: quanto}, transformer: {backend: gguf}}"],
            r"^components: transformer is named twice",
        ),
        (
            [*BOTH, f"quantization_config={json.dumps({'quant_mapping': BLOCKS})}"],
            r"^components\.text_encoder_3: quantization\.quantization_config has a scheme for text_encoder_3 too",
        ),
        (
            [SD3, 'quantization_config={"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int8"}, '
             '"components_to_quantize": ["transformer", "transformer"]}'],
            r"^quantization\.quantization_config: components_to_quantize: transformer is named twice",
        ),
        (
            [SD3, 'quantization_config={"quant_mapping": {"transformer": {"quant_method": "quanto"}, '
             '"transformer": {"quant_method": "gguf"}}}'],
            r"^quantization\.quantization_config: transformer: is in it twice",
        ),
        ([SD3, 'quantization_config={"quant_backend": "quanto", "quant_kwargs": {"weights_dtype": "int8"}}'],
         r"^quantization\.quantization_config: components_to_quantize: is missing"),
        ([SD3, "components.transformer=nf4"], r"^components\.transformer=nf4: a scheme is wanted, as in"),
        ([SD3, "components.transformer={dtype: nf4}"], r"^components\.transformer\.backend: is missing"),
        ([SD3, "components.transformer={backend: bnb}"], r"^components\.transformer\.backend=bnb: there are"),
        ([SD3, "components.transformer={backend: quanto, dtype: nf4}"], r"^components\.transformer\.dtype=nf4: quanto"),
        ([SD3, "components.transformer={backend: quanto, group_size: 64}"], r"^components\.transformer\.group_size=64"),
        ([SD3, "components.transformer={backend: quanto, dtyp: int8}"], r"^components\.transformer\.dtyp: no such key"),
        (
            [SD3, "components.transformer={backend: quanto, bnb_4bit_use_double_quant: true}"],
            r"^components\.transformer\.bnb_4bit_use_double_quant: no such key with backend=quanto; .* of bitsandbytes",
        ),
        ([SD3, "components.transformer={backend: quanto, layer_kinds: linear}"], r"^components\.transformer\.layer_kinds"),
        ([SD3, "components.transformer={backend: none, dtype: int8}"], r"^components\.transformer\.dtype=int8"),
        ([SD3, "components.transformer={backend: none, dtype: bfloat16}"], r"^components\.transformer\.dtype: backend=none"),
        ([SD3, "components={2: {backend: quanto}}"], r"^components\.2: no component is called so"),
        ([*BOTH, "modules_to_not_convert=[norms]"], r"^modules_to_not_convert: the request has schemes for single"),
        ([*BOTH, "backend=none", "dtype=bfloat16"], r"^dtype=bfloat16: a cast of the model, and components\.transformer"),
        (["components.model={backend: quanto}"], ""),
    ],
)  # fmt: skip
def test_contradictions_and_what_is_none_begin_with_the_key(words, message):
    if not message:
        plan(words)
        return
    with pytest.raises(ConfigError, match=message):
        plan(words, multirun=any("fp4,nf4" in word for word in words))


def test_a_recipe_of_others_asks_for_the_files_of_its_components(tmp_path):
    file = tmp_path / "block.json"
    file.write_text(json.dumps({"quant_method": "quanto", "weights_dtype": "int8"}))
    matrix = "{backend: gguf, dtype: q4_k, algorithm: imatrix, imatrix_file: /etc/hosts}"
    text = f"components:\n  transformer: {{quantization_config: '{file}'}}\n  text_encoder: {matrix}\n"
    asked = quantlab.compose(recipe=written(tmp_path, text)).asked_for
    assert asked["components.transformer.quantization_config"] == str(file)
    assert asked["components.text_encoder.imatrix_file"] == "/etc/hosts"
