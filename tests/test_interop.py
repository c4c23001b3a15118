"""Configs to and from Diffusers and transformers: six rules of exclusion, lists that say a choice, stored dictionaries."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import quantlab
from quantlab import interop
from quantlab.axes import QuantizationAxes
from quantlab.backends.table import BACKENDS
from quantlab.capabilities import CAPABILITIES
from quantlab.errors import ConfigError
from quantlab.layers import linear_layers
from quantlab.stages.quantize import Request, quantize_component

METHODS = ("bitsandbytes", "torchao", "quanto", "gguf", "modelopt")
TABLE = {  # entry -> Linear layers that it excludes from the tiny Flux under each backend's rule in Diffusers
    "proj_out": (2, 2, 2, 2, 2),
    "norm_out.linear": (1, 1, 0, 0, 1),
    "transformer_blocks.0.attn.to_q": (1, 2, 0, 0, 2),
    "transformer_blocks.0": (20, 20, 0, 0, 20),
    "attn": (11, 11, 0, 11, 11),
    "to_out.0": (0, 1, 0, 0, 1),
    "out": (2, 5, 0, 0, 5),
    "0": (20, 20, 1, 20, 20),
    "k": (0, 2, 0, 0, 20),
    "*.to_q": (0, 0, 0, 0, 2),
    "proj_out.weight": (0, 1, 0, 0, 2),
    "ff.net": (2, 2, 0, 0, 2),
    "re:.*to_q": (0, 0, 0, 0, 0),
    "does_not_exist": (0, 0, 0, 0, 0),
    "TO_Q": (0, 0, 0, 0, 0),
    "add_": (0, 0, 0, 0, 4),
    "": (25, 28, 0, 0, 28),
}
OURS = {"proj_out": 1, "norm_out.linear": 1, "transformer_blocks.0.attn.to_q": 1, "transformer_blocks.0": 14,
        "*.to_q": 2, "re:.*to_q": 2}
"""Entry -> layers that quantlab's matcher takes, on every backend; all other entries of the table match nothing."""


def tiny_flux():
    import diffusers

    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=False).eval()


def tiny_llama(tie=False):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, tie_word_embeddings=tie)).eval()


@pytest.fixture(scope="module")
def flux():
    return tiny_flux()


@pytest.fixture(scope="module")
def paths(flux):
    return [n for n, m in flux.named_modules() if isinstance(m, nn.Linear)]


def config_of(method, names=None, **more):
    made = {"bitsandbytes": {"load_in_8bit": True}, "torchao": {"quant_type": "int8wo"}, "quanto": {"weights_dtype": "int8"},
            "gguf": {}, "modelopt": {"quant_type": "INT8", "channel_quantize": 0}}[method]
    return BACKENDS[method].Config(**made, modules_to_not_convert=names, **more)


# -- the rules


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: e or "empty")
def test_diffusers_rules_give_the_known_counts(entry, paths):
    assert len(paths) == 28
    assert tuple(len(interop.taken("diffusers", m, [entry], paths)) for m in METHODS) == TABLE[entry]


def excluded_by_diffusers(method, model, entries):
    """The Linear layers that the installed Diffusers' own code leaves alone."""
    import diffusers

    before = {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    model = copy.deepcopy(model)
    if method == "bitsandbytes":
        from diffusers.quantizers.bitsandbytes.utils import _replace_with_bnb_linear

        _replace_with_bnb_linear(model, entries, quantization_config=diffusers.BitsAndBytesConfig(load_in_8bit=True))
        import bitsandbytes as bnb

        return {n for n in before if not isinstance(model.get_submodule(n), bnb.nn.Linear8bitLt)}
    if method == "torchao":
        from diffusers.quantizers.torchao.torchao_quantizer import TorchAoHfQuantizer

        quantizer = TorchAoHfQuantizer.__new__(TorchAoHfQuantizer)
        quantizer.modules_to_not_convert, quantizer.offload = entries, False
        return {n for n in before if not quantizer.check_if_quantized_param(model, None, f"{n}.weight", {})}
    if method == "quanto":
        from diffusers.quantizers.quanto.utils import _replace_with_quanto_layers
        from optimum.quanto import QLinear

        _replace_with_quanto_layers(model, config_of("quanto").to_diffusers(), entries)
        return {n for n in before if not isinstance(model.get_submodule(n), QLinear)}
    if method == "gguf":
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter, _replace_with_gguf_linear

        state = {f"{n}.weight": GGUFParameter(torch.zeros(1, 34, dtype=torch.uint8), quant_type=8) for n in before}
        _replace_with_gguf_linear(model, torch.float32, state, modules_to_not_convert=entries)
        return {n for n in before if not isinstance(model.get_submodule(n), GGUFLinear)}
    from diffusers.quantizers.modelopt.modelopt_quantizer import NVIDIAModelOptQuantizer

    config = config_of("modelopt").to_diffusers()
    config.modules_to_not_convert = list(entries)
    quantizer = NVIDIAModelOptQuantizer.__new__(NVIDIAModelOptQuantizer)
    quantizer.quantization_config, quantizer.pre_quantized = config, False
    quantizer._process_model_before_weight_loading(model, None)
    return {n for n in before if not model.get_submodule(n).weight_quantizer.is_enabled}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", TABLE, ids=lambda e: e or "empty")
def test_diffusers_own_code_leaves_out_the_same_layers(method, entry, flux, paths):
    assert set(interop.taken("diffusers", method, [entry], paths)) == excluded_by_diffusers(method, flux, [entry])


@pytest.mark.parametrize("entry", [*TABLE, "transformer_blocks.*.attn", "(norm|proj)_out", "to_q$", r"x_embedder\b"],
                         ids=lambda e: e or "empty")
@pytest.mark.parametrize("method", ["bitsandbytes", "torchao", "quanto"])
def test_transformers_rule_is_its_own_function(method, entry, paths):
    from transformers.quantizers.quantizers_utils import should_convert_module

    tail = ".weight" if method == "torchao" else ""
    try:
        wanted = {p for p in paths if not should_convert_module(p + tail, [entry])}
    except Exception as error:  # noqa: BLE001  (the library lets re's error through)
        with pytest.raises(ConfigError, match=r"reads it as a regular expression, which it is not"):
            interop.taken("transformers", method, [entry], paths)
        assert "repeat" in str(error)
        return
    assert set(interop.taken("transformers", method, [entry], paths)) == wanted


def test_transformers_without_a_list_leaves_out_its_defaults():
    from transformers.quantizers.base import get_keys_to_not_convert

    for tie in (False, True):
        model = tiny_llama(tie)
        config = quantlab.config_from_dict({"quant_method": "quanto", "weights": "int8", "activations": None})
        reasons, idle = interop.expand(config, model)
        assert set(reasons) == {"lm_head"}
        assert "lm_head" in get_keys_to_not_convert(model)
        assert idle == ()
    with pytest.raises(ConfigError, match="and this is no model of transformers; name the modules"):
        interop.expand(config, nn.Sequential(nn.Linear(4, 4)))


@pytest.mark.parametrize("method", ["gguf", "modelopt"])
def test_transformers_has_no_such_backend(method):
    with pytest.raises(ConfigError, match=f"transformers does not quantize with {method}"):
        interop.rule_of("transformers", method)


# -- quantlab's one matcher


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", [e for e in TABLE if e])
def test_one_matcher_on_every_backend(method, entry, flux):
    config = config_of(method, [entry])
    if entry in OURS:
        assert len(interop.excluded_layers(config, flux)) == OURS[entry]
    else:
        with pytest.raises(ConfigError, match=r"^modules_to_not_convert=.*: matches none of the 28 layers"):
            interop.excluded_layers(config, flux)


@pytest.mark.parametrize("method", METHODS)
def test_the_empty_entry_is_no_entry(method):
    with pytest.raises(ConfigError, match="a list of non-empty words"):
        config_of(method, [""])


def request(config, module, **axes):
    asked = config.axes() if not axes else QuantizationAxes(**{**vars(config.axes()), **axes})
    return Request(component="model", axes=asked, native=config, compute_dtype="float32", device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_every_backend_leaves_the_same_layers(method, flux):
    wanted = interop.excluded_layers(config_of("quanto", ["transformer_blocks.0"]), flux)
    config = config_of(method, ["transformer_blocks.0"])
    module = copy.deepcopy(flux)
    _, report = quantize_component(request(config, module, on_mismatch="skip"), module, flux)
    assert {r.name for r in report.layers if r.status == "excluded"} == wanted
    assert sum(r.status == "quantized" for r in report.layers) >= 12


# -- a dictionary keeps its library's rule


@pytest.mark.parametrize("entry", ["transformer_blocks.0", "attn", "0"])
@pytest.mark.parametrize("method", METHODS)
def test_a_pasted_dictionary_keeps_its_own_rule(method, entry, flux):
    config = quantlab.config_from_dict({**config_of(method).to_dict(), "modules_to_not_convert": [entry, "nowhere"]})
    assert config.exclusion_rule == ("library" if method in ("bitsandbytes", "torchao") else "diffusers")
    reasons, idle = interop.expand(config, flux)
    assert len(reasons) == TABLE[entry][METHODS.index(method)]
    assert set(reasons.values()) <= {f"diffusers {method}: {entry}"}
    assert "nowhere" in idle


def test_pasted_exclusions_are_shown_with_their_reason(flux):
    config = quantlab.config_from_dict({"quant_method": "quanto", "weights_dtype": "int8",
                                        "modules_to_not_convert": ["proj_out", "norm_out"]})
    _, report = quantlab.quantize(flux, config)
    excluded = {r.name: r.reason for r in report.layers if r.status == "excluded"}
    assert excluded == {"proj_out": "diffusers quanto: proj_out",
                        "single_transformer_blocks.0.proj_out": "diffusers quanto: proj_out"}
    assert report.resolved["exclusions_without_effect"] == "norm_out"


def test_own_entries_come_on_top_by_quantlabs_matcher(flux):
    config = quantlab.config_from_dict({"quant_method": "quanto", "weights_dtype": "int8",
                                        "modules_to_not_convert": ["proj_out"]})
    module = copy.deepcopy(flux)
    asked = request(config, module, modules_to_not_convert={"own": ["norm_out"]})
    _, report = quantize_component(asked, module, flux)
    assert {r.name for r in report.layers if r.status == "excluded"} == {
        "proj_out", "single_transformer_blocks.0.proj_out", "norm_out.linear"}
    with pytest.raises(ConfigError, match="^modules_to_not_convert=atn: matches none"):
        quantize_component(request(config, module, modules_to_not_convert={"own": ["atn"]}), module, flux)


def test_the_model_settles_whose_rule_reads_an_ambiguous_dictionary(flux):
    config = quantlab.config_from_dict({"load_in_8bit": True, "llm_int8_skip_modules": ["0"]})
    assert config.exclusion_rule == "library"
    assert len(interop.expand(config, flux)[0]) == 20  # Diffusers: "0." is somewhere in the path
    llama = tiny_llama()
    found = set(interop.expand(config, llama)[0])
    assert found == set()  # transformers: no path starts or ends so
    explicit = quantlab.config_from_dict({"load_in_8bit": True, "llm_int8_skip_modules": ["0"],
                                          "exclusion_rule": "diffusers"})
    assert len(interop.expand(explicit, llama)[0]) == 7


def test_entries_of_a_modelopt_config_switch_layers_off(flux):
    pasted = {"quant_method": "modelopt", "quant_type": "INT8", "modelopt_config": {"algorithm": "max", "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
        {"quantizer_name": "*proj_out.*", "enable": False},
        {"quantizer_name": "*", "parent_class": "nn.Embedding", "enable": False}]}}
    _, report = quantlab.quantize(flux, quantlab.config_from_dict(pasted))
    excluded = {r.name: r.reason for r in report.layers if r.status == "excluded"}
    assert excluded == dict.fromkeys(("proj_out", "single_transformer_blocks.0.proj_out"), "modelopt_config: *proj_out.*")


# -- lists that say a choice


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("library", ["diffusers", "transformers"])
def test_a_list_says_exactly_the_layers_or_names_those_it_cannot(library, flux, paths, data):
    wanted = data.draw(st.sets(st.sampled_from(paths), max_size=12))
    for method in METHODS:
        if (library, method) not in interop.RULES:
            continue
        try:
            entries = interop.exclusions_for(config_of(method, sorted(wanted) or None), flux, library)
        except ConfigError as error:
            assert library == "diffusers", "every choice has an anchored regular expression"
            named = [p for p in paths if p in str(error)]
            assert set(named) & wanted
            continue
        assert set(interop.taken(library, method, entries or [], paths)) == wanted
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
    assert excluded_by_diffusers(method, flux, list(getattr(theirs, key))) == interop.excluded_layers(config, flux)


@pytest.mark.parametrize("method", ["quanto", "gguf"])
def test_what_a_rule_cannot_say_is_named(method, flux):
    with pytest.raises(ConfigError, match=r"no list of diffusers says transformer_blocks\.0\.attn\.to_q for .* without "
                                          r"other layers \(single_transformer_blocks\.0\.attn\.to_q\)"):
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
    with pytest.raises(ConfigError, match="also leaves out norm_out.linear, which the model keeps in float32"):
        config_of("torchao", ["proj_out"]).to_diffusers(model)
    assert config_of("torchao", ["norm_out"]).to_diffusers(model).modules_to_not_convert == ["norm_out"]


def test_layers_that_quantlab_never_takes_are_left_out_for_the_library_too():
    model = nn.ModuleDict({"attn": nn.MultiheadAttention(32, 2), "ff": nn.Linear(32, 32)})
    theirs = config_of("torchao", None).to_diffusers(model)
    assert interop.taken("diffusers", "torchao", theirs.modules_to_not_convert, ["attn.out_proj", "ff"]) == {
        "attn.out_proj": "attn"}


# -- the libraries' objects


@pytest.mark.parametrize(("config", "message"), [
    (quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_blocksize=128), "bnb_4bit_blocksize=128: the BitsAndBytes"),
    (quantlab.QuantoConfig("int4", optimizer="hqq"), "optimizer='hqq': the QuantoConfig of diffusers has no such"),
    (quantlab.QuantoConfig("int8", activations="int8"), "activations='int8': the QuantoConfig of diffusers has no"),
    (quantlab.QuantoConfig("float8_e5m2"), "weights_dtype=float8_e5m2: the installed library cannot build"),
    (quantlab.GGUFQuantizationConfig(gguf_type="q4_0"), "gguf_type='q4_0': Diffusers only loads GGUF files"),
    (quantlab.GGUFQuantizationConfig(tensor_types={"*.a": "q4_0"}), "tensor_types=.*: Diffusers only loads GGUF files"),
    (quantlab.NVIDIAModelOptConfig("INT8", channel_quantize=0, compress=False), "compress=False: the NVIDIAModelOptConfig"),
    (quantlab.NVIDIAModelOptConfig("NVFP4"), "quant_type=NVFP4: Diffusers cannot load NVFP4"),
    (quantlab.NVIDIAModelOptConfig("MXFP8"), "quant_type=MXFP8: Diffusers cannot load MXFP8"),
    (quantlab.NVIDIAModelOptConfig("INT4", channel_quantize=0), "ModelOpt packs 4 bits in blocks only"),
    (quantlab.TorchAoConfig("int4dq", fit_group_size=True), "fit_group_size=true: diffusers has one group size"),
])
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


@pytest.mark.parametrize("library", ["diffusers", "transformers"])
@pytest.mark.parametrize(("backend", "dtype"), ROWS)
def test_there_and_back(backend, dtype, library):
    """Our config -> the library's object -> its own JSON -> our config, for what its class can hold."""
    config = BACKENDS[backend].Config.from_axes(QuantizationAxes(backend=backend, dtype=dtype))
    model = nn.Sequential(nn.Linear(256, 32), nn.Conv2d(3, 3, 1), nn.Embedding(4, 4))
    try:
        theirs = getattr(config, f"to_{library}")(model)
    except ConfigError as error:
        assert (backend, dtype) in {("quanto", "float8_e5m2"), ("modelopt", "nvfp4"), ("modelopt", "mxfp8"),
                                    ("modelopt", "mxfp4")} or (backend, library) == ("modelopt", "transformers"), error
        return
    assert type(theirs).__module__.startswith(library)
    stored = json.loads(json.dumps(theirs.to_dict(), sort_keys=True))
    fitted = {"fit_group_size": getattr(config, "fit_group_size")} if hasattr(config, "fit_group_size") else {}
    assert type(config).from_dict(stored, **fitted) == config
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


# -- checkpoints


@pytest.mark.parametrize("config", [
    quantlab.TorchAoConfig("int8wo", modules_to_not_convert=["norm_out"]),
    quantlab.TorchAoConfig("float8wo"),
    quantlab.QuantoConfig("int4", modules_to_not_convert=["proj_out", "single_transformer_blocks.0.proj_out"]),
], ids=["torchao int8", "torchao e5m2", "quanto int4"])
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
    assert interop.excluded_layers(read, flux) == interop.excluded_layers(config, flux)
    assert (read.axes().dtype, read.axes().group_size) == (config.axes().dtype, config.axes().group_size)
    done = {n for n, layer in model.named_modules() if type(layer).__name__ == "QLinear" or (
        isinstance(layer, nn.Linear) and type(layer.weight).__name__ in ("Int8Tensor", "Float8Tensor"))}
    assert done == set(linear_layers(flux)) - interop.excluded_layers(config, flux)


AO = {"_type": "Int8WeightOnlyConfig", "_version": 2, "_data": {}}


@pytest.mark.parametrize(("stored", "wanted"), [
    ({"load_in_4bit": True}, quantlab.BitsAndBytesConfig(load_in_4bit=True, exclusion_rule="library")),
    ({"quant_method": "bitsandbytes", "_load_in_8bit": True, "_load_in_4bit": False},
     quantlab.BitsAndBytesConfig(load_in_8bit=True, exclusion_rule="library")),
    ({"quant_method": "torchao", "quant_type": {"default": AO}, "exclusion_rule": "diffusers"},
     quantlab.TorchAoConfig("int8wo")),
    ({"quant_method": "torchao", "quant_type": "int4wo", "quant_type_kwargs": {"group_size": 64},
      "exclusion_rule": "diffusers", "modules_to_not_convert": ["a"]},
     quantlab.TorchAoConfig("int4wo", ["a"], group_size=64, exclusion_rule="diffusers")),
    ({"quant_method": "torchao", "quant_type": {"default": AO}, "include_input_output_embeddings": False,
      "untie_embedding_weights": False}, quantlab.TorchAoConfig("int8wo", exclusion_rule="transformers")),
    ({"quant_method": "quanto", "weights": "int4", "activations": "int8", "modules_to_not_convert": ["lm_head"]},
     quantlab.QuantoConfig("int4", ["lm_head"], activations="int8", exclusion_rule="transformers")),
    ({"quant_method": "quanto", "weights_dtype": "float8"}, quantlab.QuantoConfig("float8")),
    ({"quant_method": "gguf", "compute_dtype": "torch.bfloat16", "pre_quantized": True},
     quantlab.GGUFQuantizationConfig("bfloat16")),
])
def test_stored_dictionaries(stored, wanted):
    before = copy.deepcopy(stored)
    assert quantlab.config_from_dict(stored) == wanted
    assert stored == before


@pytest.mark.parametrize(("writer", "rule"), [("_diffusers_version", "diffusers"), ("transformers_version", "transformers")])
def test_a_models_config_says_who_wrote_it(writer, rule):
    whole = {writer: "1.0", "quantization_config": {"load_in_8bit": True, "llm_int8_skip_modules": ["a"]}}
    assert quantlab.from_pretrained_config(whole).exclusion_rule == rule


MODELOPT_LIST = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, {
    "quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {"-1": 32}}}], "algorithm": "max"}
MODELOPT_DICT = {"quant_cfg": {"*weight_quantizer": {"num_bits": 4, "block_sizes": {"-1": 32}, "fake_quant": False},
                               "*input_quantizer": {"enable": False}, "nn.Embedding": {"*": {"enable": False}},
                               "default": {"enable": False}}, "algorithm": {"method": "max"}}


@pytest.mark.parametrize("shape", [MODELOPT_LIST, MODELOPT_DICT], ids=["list", "mapping"])
def test_modelopts_two_shapes_with_string_keys(shape):
    config = quantlab.config_from_dict({"quant_method": "modelopt", "quant_type": "INT4", "modelopt_config": shape})
    axes = config.axes()
    assert (axes.dtype, axes.group_size, axes.activation_dtype) == ("int4", 32, "none")
    module, report = quantlab.quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 32)), config)
    assert {(r.dtype, r.group_size) for r in report.layers} <= {("int4", 32), ("int4", None)}
    assert {r.status for r in report.layers} == {"quantized"}


@pytest.mark.parametrize(("stored", "message"), [
    ({}, "^quant_method: the dictionary has none"),
    ({"quant_method": "bitsandbyte"}, "^quant_method=bitsandbyte: .*did you mean bitsandbytes"),
    ({"quant_method": "sdnq"}, "^quant_method=sdnq: there are bitsandbytes, torchao"),
    ({"quant_method": "quanto", "weights_dtype": "int8", "load_in_8bit": True}, "^load_in_8bit: QuantoConfig has no such"),
    ({"quant_method": "quanto", "exclusion_rule": "diffuser"}, "^exclusion_rule=diffuser: .*did you mean diffusers"),
    ({"quant_method": "torchao", "quant_type": "fp6"}, "^quant_type='fp6': torchao removed"),
    ({"quant_method": "torchao", "quant_type": "int8wo", "include_embedding": True}, "^include_embedding=true: quantlab"),
    ({"quant_method": "bitsandbytes"}, "neither is true"),
    ({"quant_method": "modelopt", "quant_type": "FP8", "modelopt_config": MODELOPT_LIST}, "modelopt_config says INT4"),
    ({"quant_method": "modelopt", "quant_type": "INT4", "modelopt_config": {"quant_cfg": 3}}, "it has a quant_cfg"),
])
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
    with pytest.raises(ConfigError, match="not a readable JSON file"):
        quantlab.from_pretrained_config(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="its quantization_config is a str; a mapping is wanted"):
        quantlab.from_pretrained_config({"quantization_config": "int8"})


# -- in a recipe, on the command line


def test_a_dictionary_on_the_command_line_shows_its_axes():
    text = "{quant_method: torchao, quant_type: int4dq, modules_to_not_convert: [proj_out]}"
    job = quantlab.compose([f"quantization_config={text}"]).jobs[0]
    assert job.native == quantlab.TorchAoConfig("int4dq", ["proj_out"], exclusion_rule="library")
    shown = job.resolved["quantization"]
    assert {k: shown[k] for k in ("backend", "dtype", "group_size", "activation_dtype", "algorithm")} == {
        "backend": "torchao", "dtype": "int4", "group_size": 32, "activation_dtype": "int8", "algorithm": "max"}
    assert shown["quantization_config"]["modules_to_not_convert"] == ["proj_out"]


def test_a_recipe_holds_a_dictionary_and_a_run_can_be_repeated(tmp_path):
    recipe = tmp_path / "pasted.yaml"
    recipe.write_text("# @package _global_\nquantization:\n  quantization_config:\n    quant_method: bitsandbytes\n"
                      "    load_in_4bit: true\n    bnb_4bit_quant_type: nf4\n    bnb_4bit_use_double_quant: true\n"
                      "    bnb_4bit_compute_dtype: bfloat16\n    llm_int8_skip_modules: [proj_out]\n")
    job = quantlab.compose(recipe=str(recipe)).jobs[0]
    assert (job.config.quantization.backend, job.config.quantization.dtype) == ("bitsandbytes", "nf4")
    assert job.config.quantization.bnb_4bit_use_double_quant is True
    again = tmp_path / "again.yaml"
    again.write_text(job.recipe_yaml)
    repeated = quantlab.compose(recipe=str(again)).jobs[0]
    assert repeated.native == job.native
    assert repeated.resolved["quantization"] == job.resolved["quantization"]


@pytest.mark.parametrize(("words", "message"), [
    (["dtype=nf4"], "^dtype=nf4: the quantization.quantization_config says fp4; leave dtype out"),
    (["backend=quanto"], "^backend=quanto: the quantization.quantization_config says bitsandbytes"),
    (["backend=torchao"], "^backend=torchao: the quantization.quantization_config says bitsandbytes"),
    (["group_size=64"], "^group_size=64: the quantization.quantization_config says auto"),
    (["backend=bitsandbytes", "bnb_4bit_use_double_quant=true"], "^quantization.bnb_4bit_use_double_quant=True: the quant"),
])
def test_a_dictionary_and_an_axis_that_disagree_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        quantlab.compose(["quantization_config={load_in_4bit: true}", *words])


@pytest.mark.parametrize(("text", "message"), [
    ("{quant_method: quanto, weights_dtype: int5}", "^quantization.quantization_config: weights_dtype='int5': QuantoConfig"),
    ("{quant_method: gguf}", "add gguf_type, the format to write"),
    ("{quant_method: quanto, weights: int8, activations: int8}", "^quantization.quantization_config: activation_dtype=int8"),
    ("{quant_method: torchao, quant_type: {_type: FqnToConfig, _data: {}}}", "no axes of quantlab express it"),
])
def test_a_dictionary_that_cannot_be_run_is_refused_at_composition(text, message):
    with pytest.raises(ConfigError, match=message):
        quantlab.compose([f"quantization_config={text}"])


def test_reading_dictionaries_imports_no_torch():
    code = ("import sys, quantlab\n"
            "quantlab.config_from_dict({'quant_method': 'torchao', 'quant_type': 'int4wo'}).axes()\n"
            "quantlab.compose(['quantization_config={load_in_4bit: true}'])\n"
            "assert not {'torch', 'torchao', 'diffusers', 'transformers'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
