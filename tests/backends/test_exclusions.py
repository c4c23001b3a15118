"""Configs to and from Diffusers and transformers: whose rule reads a list, lists that say a choice, their objects."""

import copy
import dataclasses
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import quantlab
from quantlab.backends import exclusions
from quantlab.errors import ConfigError
from quantlab.stages.quantize import quantize_component
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.configs import METHODS, config_of, rule_of
from tests.support.exclusion_rules import TABLE, excluded_by_diffusers, paths_of, request, tiny_flux, tiny_llama
from tests.support.tables import BACKENDS, CAPABILITIES


@pytest.fixture(scope="module")
def flux():
    return tiny_flux()


@pytest.fixture(scope="module")
def paths(flux):
    return paths_of(flux)


# -- a dictionary keeps its library's rule


@pytest.mark.parametrize("entry", ["transformer_blocks.0", "attn", "0"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pasted_dictionary_keeps_its_own_rule(method, entry, flux):
    stored = {k: v for k, v in config_of(method).to_dict().items() if k != "exclusion_rule"}
    config = quantlab.config_from_dict({**stored, "modules_to_not_convert": [entry, "nowhere"]})
    assert config == type(config).from_dict({**stored, "modules_to_not_convert": [entry, "nowhere"]})
    assert config.exclusion_rule == ("library" if method in ("bitsandbytes", "torchao") else "diffusers")
    reasons, idle = exclusions.expand(config, flux)
    assert len(reasons) == TABLE[entry][METHODS.index(method)]
    assert set(reasons.values()) <= {f"diffusers {method}: {entry}"}
    assert "nowhere" in idle


def test_pasted_exclusions_are_shown_with_their_reason(flux):
    config = quantlab.config_from_dict(
        {"quant_method": "quanto", "weights_dtype": "int8", "modules_to_not_convert": ["proj_out", "norm_out"]}
    )
    _, report = quantlab.quantize(flux, config, replace_default_exclusions=True)
    excluded = {r.name: r.reason for r in report.layers if r.status == "excluded"}
    assert excluded == {
        "proj_out": "diffusers quanto: proj_out",
        "single_transformer_blocks.0.proj_out": "diffusers quanto: proj_out",
    }
    assert report.resolved["exclusions_without_effect"] == "norm_out"


def test_own_entries_come_on_top_by_quantlabs_matcher(flux):
    config = quantlab.config_from_dict(
        {"quant_method": "quanto", "weights_dtype": "int8", "modules_to_not_convert": ["proj_out"]}
    )
    module = copy.deepcopy(flux)
    asked = request(config, module, modules_to_not_convert={"own": ["norm_out"]})
    _, report = quantize_component(asked, module, flux)
    assert {r.name for r in report.layers if r.status == "excluded"} == {
        "proj_out",
        "single_transformer_blocks.0.proj_out",
        "norm_out.linear",
    }
    with pytest.raises(ConfigError, match=r"^modules_to_not_convert\.own=atn: matches none"):
        quantize_component(request(config, module, modules_to_not_convert={"own": ["atn"]}), module, flux)


def test_the_model_settles_whose_rule_reads_an_ambiguous_dictionary(flux):
    config = quantlab.config_from_dict({"load_in_8bit": True, "llm_int8_skip_modules": ["0"]})
    assert config.exclusion_rule == "library"
    assert len(exclusions.expand(config, flux)[0]) == 20  # Diffusers: "0." is somewhere in the path
    llama = tiny_llama()
    found = set(exclusions.expand(config, llama)[0])
    assert found == set()  # transformers: no path starts or ends so
    explicit = quantlab.config_from_dict(
        {"load_in_8bit": True, "llm_int8_skip_modules": ["0"], "exclusion_rule": "diffusers"}
    )
    assert len(exclusions.expand(explicit, llama)[0]) == 7


def test_entries_of_a_modelopt_config_switch_layers_off(flux):
    pasted = {
        "quant_method": "modelopt",
        "quant_type": "INT8",
        "modelopt_config": {
            "algorithm": "max",
            "quant_cfg": [
                {"quantizer_name": "*", "enable": False},
                {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
                {"quantizer_name": "*proj_out.*", "enable": False},
                {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False},
            ],
        },
    }
    _, report = quantlab.quantize(flux, quantlab.config_from_dict(pasted), replace_default_exclusions=True)
    excluded = {r.name: r.reason for r in report.layers if r.status == "excluded"}
    assert excluded == dict.fromkeys(
        ("proj_out", "single_transformer_blocks.0.proj_out"), "modelopt_config: *proj_out.*"
    )


# -- lists that say a choice


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_list_says_exactly_the_layers_or_names_those_it_cannot(library, flux, paths, data):
    wanted = data.draw(st.sets(st.sampled_from(paths), max_size=12))
    for method in METHODS:
        if library not in config_of(method).exclusion_rules:
            continue
        try:
            entries = exclusions.exclusions_for(config_of(method, sorted(wanted) or None), flux, library)
        except ConfigError as error:
            assert library == "diffusers", "every choice has an anchored regular expression"
            named = [p for p in paths if p in str(error)]
            assert set(named) & wanted
            continue
        assert set(exclusions.taken(rule_of(method, library), entries or [], paths)) == wanted
        if library == "transformers":
            assert entries is not None, "None means defaults of its own there"


@pytest.mark.parametrize("method", METHODS)
def test_to_diffusers_is_resolved_by_diffusers_to_the_same_layers(method, flux):
    names = ["proj_out", "single_transformer_blocks.0.proj_out", "single_transformer_blocks.0.attn"]
    if method in ("quanto", "gguf"):
        names = names[:2]  # what the rule of that backend can say
    config = config_of(method, names)
    theirs = config.to_diffusers(flux)
    key = "llm_int8_skip_modules" if method == "bitsandbytes" else "modules_to_not_convert"
    assert excluded_by_diffusers(method, flux, list(getattr(theirs, key))) == exclusions.excluded_layers(config, flux)


@pytest.mark.parametrize("method", ["quanto", "gguf"])
def test_what_a_rule_cannot_say_is_named(method, flux):
    with pytest.raises(
        ConfigError,
        match=r"no list of diffusers says transformer_blocks\.0\.attn\.to_q for .* without "
        r"other layers \(single_transformer_blocks\.0\.attn\.to_q\)",
    ):
        config_of(method, ["transformer_blocks.0.attn.to_q"]).to_diffusers(flux)


@pytest.mark.parametrize("method", METHODS)
def test_exclusions_need_the_model(method):
    with pytest.raises(ConfigError, match=r"give the model, to_diffusers\(model\)"):
        config_of(method, ["proj_out"]).to_diffusers()
    theirs = config_of(method, ["proj_out"], exclusion_rule="diffusers").to_diffusers()
    assert "proj_out" in (theirs.llm_int8_skip_modules if method == "bitsandbytes" else theirs.modules_to_not_convert)


def test_layers_that_the_model_keeps_in_float32_are_in_the_list_too(flux):
    model = copy.deepcopy(flux)
    model._keep_in_fp32_modules = ["norm_out"]
    for config in (config_of("torchao", ["norm_out"]), config_of("torchao")):
        assert exclusions.excluded_layers(config, model) == {"norm_out.linear"}
        assert config.to_diffusers(model).modules_to_not_convert == ["norm_out"]
    model._keep_in_fp32_modules = ["norm"]  # a piece of a name, which is one to ModelOpt in Diffusers alone
    with pytest.raises(ConfigError, match="also leaves out .*norm_out.linear.*, which the model keeps in float32"):
        config_of("modelopt").to_diffusers(model)


def test_layers_that_quantlab_never_takes_are_left_out_for_the_library_too():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2), "ff": nn.Linear(32, 32)})
    theirs = config_of("torchao", None).to_diffusers(model)
    assert exclusions.taken(
        rule_of("torchao", "diffusers"), theirs.modules_to_not_convert, ["attn.out_proj", "ff"]
    ) == {"attn.out_proj": "attn"}


# -- the libraries' objects


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_blocksize=128),
            "bnb_4bit_blocksize=128: the BitsAndBytes",
        ),
        (quantlab.QuantoConfig("int4", optimizer="hqq"), "optimizer='hqq': the QuantoConfig of diffusers has no such"),
        (quantlab.QuantoConfig("int8", activations="int8"), "activations='int8': the QuantoConfig of diffusers has no"),
        (quantlab.QuantoConfig("float8_e5m2"), "weights_dtype=float8_e5m2: the installed library cannot build"),
        (quantlab.GGUFQuantizationConfig(gguf_type="q4_0"), "gguf_type='q4_0': Diffusers only loads GGUF files"),
        (
            quantlab.GGUFQuantizationConfig(tensor_types={"*.a": "q4_0"}),
            "tensor_types=.*: Diffusers only loads GGUF files",
        ),
        (
            quantlab.NVIDIAModelOptConfig("INT8", channel_quantize=0, compress=False),
            "compress=False: the NVIDIAModelOptConfig",
        ),
        (quantlab.NVIDIAModelOptConfig("NVFP4"), "quant_type=NVFP4: Diffusers cannot load NVFP4"),
        (quantlab.NVIDIAModelOptConfig("MXFP8"), "quant_type=MXFP8: Diffusers cannot load MXFP8"),
        (quantlab.NVIDIAModelOptConfig("INT4", channel_quantize=0), "ModelOpt packs 4 bits in blocks only"),
        (quantlab.TorchAoConfig("int4dq", fit_group_size=True), "fit_group_size=true: diffusers has one group size"),
    ],
)
def test_what_diffusers_cannot_hold_is_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        config.to_diffusers()


def test_a_fitted_group_size_is_written_where_it_is_one_for_all():
    config = quantlab.TorchAoConfig.from_axes(QuantizationAxes(backend="torchao", dtype="int3"))
    fits, odd = nn.Sequential(nn.Linear(128, 8)), nn.Sequential(nn.Linear(128, 8), nn.Linear(96, 8))
    assert config.to_diffusers(fits).quant_type.granularity.group_size == 128
    with pytest.raises(ConfigError, match="fit_group_size=true: 1 would take another group size than 128"):
        config.to_diffusers(odd)


ROWS = [(b, d) for b, rows in CAPABILITIES.items() if b not in ("none", "gguf") for d in rows]
NOT_THERE = {("quanto", "float8_e5m2"), *(("modelopt", d) for d in ("nvfp4", "mxfp8", "mxfp4", "int3", "int2"))}


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize(("backend", "dtype"), ROWS)
def test_there_and_back(backend, dtype, library):
    """Our config -> the library's object -> its own JSON -> our config, for what its class can hold."""
    config = BACKENDS[backend].Config.from_axes(QuantizationAxes(backend=backend, dtype=dtype))
    model = nn.Sequential(nn.Linear(256, 32), nn.Conv2d(3, 3, 1), nn.Embedding(4, 4))
    if (backend, dtype) in NOT_THERE or (backend, library) == ("modelopt", "transformers"):
        with pytest.raises(ConfigError, match="cannot build|cannot load|has no such config"):
            getattr(config, f"to_{library}")(model)
        return
    theirs = getattr(config, f"to_{library}")(model)
    assert type(theirs).__module__.startswith(library)
    stored = json.loads(json.dumps(theirs.to_dict(), sort_keys=True))
    fitted = {k: v for k, v in vars(config).items() if k == "fit_group_size"}
    read = type(config).from_dict(stored, **fitted)
    assert dataclasses.replace(read, exclusion_rule="quantlab") == config
    if backend not in ("modelopt",) and dtype != "nf4":  # torchao's own reader does not know its nf4
        again = type(theirs).from_dict(stored)
        assert again.to_dict() == theirs.to_dict()


def test_gguf_there_and_back():
    for dtype in ("float32", "bfloat16", "float16"):
        config = quantlab.GGUFQuantizationConfig(compute_dtype=dtype)
        assert quantlab.GGUFQuantizationConfig.from_dict(config.to_diffusers().to_dict()) == config


def test_modelopts_object_quantizes_linear_layers_only():
    import modelopt.torch.opt as mto

    model = nn.Sequential(nn.Linear(256, 32), nn.Conv2d(3, 3, 1), nn.Embedding(4, 4), nn.BatchNorm1d(4))
    config = quantlab.NVIDIAModelOptConfig("INT8_FP8", channel_quantize=0, weight_only=False)
    mto.apply_mode(model, mode=[("quantize", config.to_diffusers().modelopt_config)])
    enabled = {n: q.num_bits for n, q in model.named_modules() if getattr(q, "is_enabled", False)}
    assert enabled == {"0.weight_quantizer": 8, "0.input_quantizer": (4, 3)}
