"""What a model's class keeps in float32 stays as it is, as in the libraries that load it: on every backend."""

import copy
import json

import pytest
import torch
from torch import nn

import quantlab
from quantlab.backends import exclusions
from quantlab.stages.quantize import quantize_component
from tests.support.configs import METHODS, config_of
from tests.support.exclusion_rules import excluded_by_diffusers, paths_of, request, tiny_flux, tiny_llama
from tests.support.tables import BACKENDS
from tests.support.tiers import covering

BY_TRANSFORMERS = [m for m in METHODS if "transformers" in config_of(m).exclusion_rules]
T5 = {"vocab_size": 64, "d_model": 64, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}
WO = {f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in (0, 1)}


@pytest.fixture(scope="module")
def t5():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(**T5, feed_forward_proj="gated-gelu")).eval().requires_grad_(False)


@pytest.fixture
def keeping():
    """A model of Diffusers whose class keeps a container, a layer and a norm."""
    model = tiny_flux()

    class Keeping(type(model)):
        _keep_in_fp32_modules = ["norm_out", "to_q", "time_text_embed", "norm1"]

    model.__class__ = Keeping
    return model


def report_of(config, model, **axes):
    module = copy.deepcopy(model)
    asked = request(config, module, on_mismatch="skip", **axes)
    return quantize_component(asked, module, model)[1]


def excluded(report):
    return {r.name: r.reason for r in report.layers if r.status == "excluded"}


def pasted(method, **more):
    """A dictionary of the library, with what it writes."""
    return {k: v for k, v in config_of(method).to_dict().items() if k != "exclusion_rule"} | more


# -- transformers


def loaded_by_transformers(method, model, folder, names):
    """The Linear layers that transformers' own loader leaves as they are."""
    import transformers

    model.save_pretrained(folder)
    theirs = config_of(method, names or None, exclusion_rule="transformers").to_transformers()
    kinds = {"quantization_config": theirs, "dtype": torch.float32, "device_map": "cpu"}
    loaded = getattr(transformers, type(model).__name__).from_pretrained(folder, **kinds)
    return {n for n, m in loaded.named_modules() if type(m) is nn.Linear and type(m.weight.data) is torch.Tensor}


@pytest.mark.parametrize("names", [[], ["k"], ["encoder.block.0"]], ids=["none", "k", "block"])
@pytest.mark.parametrize("method", BY_TRANSFORMERS)
def test_a_pasted_dictionary_leaves_what_transformers_leaves(method, names, t5, tmp_path):
    expected = loaded_by_transformers(method, t5, tmp_path, names)
    assert method == "torchao" or expected >= WO  # of torchao transformers matches weights, whose paths do not end so
    field = config_of(method)._exclusions_field
    config = quantlab.config_from_dict({**pasted(method, **{field: names}), "exclusion_rule": "transformers"})
    report = report_of(config, t5)
    assert set(excluded(report)) == expected
    told = {reason for name, reason in excluded(report).items() if name in WO and names != ["encoder.block.0"]}
    assert told <= {f"transformers {method}: wo, which its class keeps in float32"}


@pytest.mark.parametrize("method", BY_TRANSFORMERS)
def test_what_is_kept_strictly_is_a_matter_of_dtypes_and_is_quantized(method, t5, tmp_path):
    """As in transformers' loader, for which the other list alone is one of exclusions."""
    import transformers

    class Strict(transformers.T5EncoderModel):
        _keep_in_fp32_modules_strict = ["wi_0"]

    transformers.Strict = Strict
    model = Strict(t5.config)
    try:
        expected = loaded_by_transformers(method, model, tmp_path, [])
    finally:
        del transformers.Strict
    field = config_of(method)._exclusions_field
    config = quantlab.config_from_dict({**pasted(method, **{field: []}), "exclusion_rule": "transformers"})
    assert set(excluded(report_of(config, model))) == expected
    assert not any("wi_0" in name for name in expected)


# -- Diffusers


@pytest.mark.parametrize(
    ("method", "names"), covering((method, names) for names in ([], ["proj_out"], ["attn"]) for method in METHODS)
)
def test_a_pasted_dictionary_leaves_what_diffusers_leaves(method, names, keeping):
    """By each backend's own rule: quanto's takes no containers."""
    theirs = excluded_by_diffusers(method, keeping, [*names, *keeping._keep_in_fp32_modules])
    field = config_of(method)._exclusions_field
    config = quantlab.config_from_dict({**pasted(method, **{field: names}), "exclusion_rule": "diffusers"})
    if config.exclusion_rule == "diffusers":
        assert set(excluded(report_of(config, keeping))) == theirs
        assert any("keeps in float32" in reason for reason in excluded(report_of(config, keeping)).values())
    else:  # no entries need no rule; the class's are kept by default then, by whole names
        assert {n for n in paths_of(keeping) if "to_q" in n.split(".")} <= set(excluded(report_of(config, keeping)))


# -- by quantlab's rule


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_default_every_backend_keeps_the_same_layers(backend, t5, keeping):
    report = report_of(config_of(backend), t5)
    assert excluded(report) == dict.fromkeys(WO, "T5EncoderModel: wo, which its class keeps in float32")
    kept = {p for p in paths_of(keeping) if {"norm_out", "to_q", "time_text_embed", "norm1"} & set(p.split("."))}
    assert set(excluded(report_of(config_of(backend), keeping))) == kept
    assert not excluded(report_of(config_of(backend), keeping, replace_default_exclusions=True))
    assert not excluded(report_of(config_of(backend), tiny_llama()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_inside_another_keeps_its_own(backend, t5):
    report = report_of(config_of(backend), nn.ModuleDict({"text": t5, "wo": nn.Linear(256, 256)}))
    assert set(excluded(report)) == {f"text.{n}" for n in WO}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_that_looks_at_the_dtype_of_a_quantized_weight_works(backend, t5):
    """T5 casts the inputs of ``wo`` to its weight's dtype: to integers, where that is one of codes, so that such a
    weight is stored to be read."""
    tokens = torch.arange(12).reshape(1, 12)
    made, report = quantlab.quantize(t5, config_of(backend), on_mismatch="skip")
    expected = t5(tokens).last_hidden_state
    with torch.no_grad():
        error = torch.linalg.vector_norm(made(tokens).last_hidden_state - expected)
        assert error < 0.3 * torch.linalg.vector_norm(expected)
        made, _ = quantlab.quantize(t5, config_of(backend), on_mismatch="skip", replace_default_exclusions=True)
        error = torch.linalg.vector_norm(made(tokens).last_hidden_state - expected)
        assert error < 0.3 * torch.linalg.vector_norm(expected)


# -- whose rule a dictionary has


@pytest.mark.parametrize("method", METHODS)
def test_every_reader_of_a_dictionary_reads_its_librarys_rule(method, tmp_path):
    """The class's own reader too: entries of a library are not quantlab's."""
    flux, field = tiny_flux(), config_of(method)._exclusions_field
    stored = pasted(method, **{field: ["transformer_blocks.0"]})
    kind = type(config_of(method))
    (tmp_path / "config.json").write_text(json.dumps(stored))
    readings = [
        quantlab.config_from_dict(stored),
        kind.from_dict(stored),
        kind.from_json_file(tmp_path / "config.json"),
    ]
    assert len(set(readings)) == 1
    theirs = excluded_by_diffusers(method, flux, ["transformer_blocks.0"])
    assert exclusions.excluded_layers(readings[0], flux) == theirs
    ours = kind.from_dict(stored, exclusion_rule="quantlab")
    assert len(exclusions.excluded_layers(ours, flux)) == 14
    for data in (ours.to_dict(), ours.to_diff_dict()):
        assert kind.from_dict(data) == quantlab.config_from_dict(data) == ours


@pytest.mark.parametrize("method", BY_TRANSFORMERS)
def test_a_dictionary_without_a_list_leaves_the_output_layer_of_transformers_models(method):
    import transformers

    kinds = {"bitsandbytes": "BitsAndBytesConfig", "torchao": "TorchAoConfig", "quanto": "QuantoConfig"}
    arguments = {"bitsandbytes": {"load_in_4bit": True}, "quanto": {"weights": "int8"}}
    if method == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        arguments["torchao"] = {"quant_type": Int8WeightOnlyConfig()}
    stored = getattr(transformers, kinds[method])(**arguments[method]).to_dict()
    config = type(config_of(method)).from_dict(stored)
    assert exclusions.excluded_layers(config, tiny_llama()) == {"lm_head"}
