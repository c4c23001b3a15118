"""The thirty faults of Diffusers' quantization configs (0.42.1), each with the test that quantlab has it not.

Three of them sit in features that quantlab does not have; their tests hold it to what stands in their place:

B12 ``dequantize()``: quantlab quantizes a copy, so the unquantized model is the original itself.
B13 ``from_single_file`` and B14 ``device_map``: what made these silent is that nobody looked afterwards; quantlab does.
"""

import copy
import dataclasses
import inspect
import json
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

import quantlab
from quantlab import (
    BitsAndBytesConfig,
    ConfigError,
    GGUFQuantizationConfig,
    NotQuantized,
    NVIDIAModelOptConfig,
    QuantoConfig,
    TorchAoConfig,
)
from quantlab.errors import ModelError
from quantlab.modules.layers import state_digest
from quantlab.stages.quantize import quantize_component
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.configs import METHODS, config_of, second_of
from tests.support.exclusion_rules import request, tiny_flux
from tests.support.nets import inputs, net, run
from tests.support.tables import BACKENDS, component_memory

each_backend = pytest.mark.parametrize("method", METHODS)


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@each_backend
def test_b01_equality_and_hash_are_of_the_settings(method):
    one, same, other = config_of(method), config_of(method), second_of(method)
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    assert len({one, same, other}) == 2
    assert one != dataclasses.replace(one, **{type(one)._exclusions_field: ["a"]})
    assert len(dataclasses.fields(one)) > 3
    assert dataclasses.asdict(one)["exclusion_rule"] == "quantlab"


@each_backend
def test_b02_every_config_writes_json_and_has_a_repr(method, tmp_path):
    config = config_of(method, ["a"])
    assert json.loads(config.to_json_string())["quant_method"] == method
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    config.to_json_file(tmp_path / "c.json", use_diff=True)
    assert json.loads((tmp_path / "c.json").read_text()) == config.to_diff_dict()
    assert "('a',)" in repr(config)


def test_b03_changes_are_validated_and_brought_into_form():
    config = BitsAndBytesConfig(load_in_4bit=True)
    assert config.update(bnb_4bit_compute_dtype="torch.bfloat16") == {}
    assert config.to_dict()["bnb_4bit_compute_dtype"] == "bfloat16"
    before = copy.deepcopy(config)
    for wrong in ({"bnb_4bit_compute_dtype": "bf16"}, {"load_in_8bit": True}, {"llm_int8_threshold": "6"}):
        with pytest.raises(ConfigError):
            config.update(**wrong)
        with pytest.raises(ConfigError):
            BitsAndBytesConfig.from_dict(config.to_dict(), **wrong)
    assert config == before


@each_backend
def test_b04_update_reaches_settings_only(method):
    config = config_of(method)
    assert config.update(to_dict=5, quant_method="quanto", _fields=1) == {
        "to_dict": 5,
        "quant_method": "quanto",
        "_fields": 1,
    }
    assert config.to_dict()["quant_method"] == method


@each_backend
def test_b05_an_unknown_key_is_an_error(method):
    for key in ("group_sise", "activations_dtype", "load_in_4bitt", "weights_dtyp"):
        with pytest.raises(ConfigError, match=f"^{key}: "):
            type(config_of(method)).from_dict({**config_of(method).to_dict(), key: 32})


def test_b06_neither_flag_is_an_error():
    for build in (
        BitsAndBytesConfig,
        lambda: BitsAndBytesConfig.from_dict({"quant_method": "bitsandbytes"}),
        lambda: quantlab.config_from_dict({"quant_method": "bitsandbytes", "_load_in_4bit": False}),
    ):
        with pytest.raises(ConfigError, match="neither is true; set exactly one"):
            build()


def test_b07_the_quant_type_is_checked():
    with pytest.raises(ConfigError, match="^bnb_4bit_quant_type='nf44': .*did you mean nf4"):
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf44")


@pytest.mark.parametrize("storage", ["bfloat16", "float16", "float32", "uint8"])
def test_b08_any_storage_dtype_can_be_reloaded(storage, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=storage)
    original = net(256, 64)
    module, _ = quantlab.quantize(original, config)
    BACKENDS["bitsandbytes"].save(module, tmp_path)
    fresh = copy.deepcopy(original)
    BACKENDS["bitsandbytes"].load(fresh, ["0"], config, tmp_path)
    assert torch.equal(run(fresh, inputs()), run(module, inputs()))
    assert str(fresh[0].weight.dtype) == f"torch.{storage}"


def test_b09_a_gguf_config_is_json():
    config = GGUFQuantizationConfig(compute_dtype=torch.bfloat16)
    again = GGUFQuantizationConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True)))
    assert again == config
    assert again.compute_dtype == "bfloat16"
    theirs = config.to_diffusers()
    assert theirs.compute_dtype is torch.bfloat16
    assert GGUFQuantizationConfig.from_dict(theirs.to_dict()) == config  # Diffusers' own from_dict fails on it


@pytest.mark.parametrize("quant_type", ["FP8", "INT8", "INT4", "NVFP4", "INT8_FP8", "FP8_FP8"])
def test_b10_modelopt_works_with_the_installed_version(quant_type):
    import diffusers

    with pytest.raises(TypeError, match="'list' object is not a mapping"):
        diffusers.NVIDIAModelOptConfig(quant_type)
    shape = {"channel_quantize": -1, "block_quantize": 64} if quant_type == "INT4" else {}
    config = NVIDIAModelOptConfig(quant_type, weight_only="_" not in quant_type, **shape)
    if quant_type != "NVFP4":
        assert config.to_diffusers().quant_type == quant_type
        module, report = quantlab.quantize(
            net(256, 32), dataclasses.replace(config, channel_quantize=(-1 if shape else 0))
        )
        assert report.layers[0].status == "quantized"


@pytest.mark.parametrize(
    "config",
    [
        NVIDIAModelOptConfig("INT4", channel_quantize=-1, block_quantize=64),
        NVIDIAModelOptConfig(
            "NVFP4", channel_quantize=-1, block_quantize=16, scale_channel_quantize=-1, scale_block_quantize=16
        ),
        NVIDIAModelOptConfig(
            "INT8",
            modelopt_config={
                "algorithm": "max",
                "quant_cfg": {"*weight_quantizer": {"num_bits": 8, "block_sizes": {-1: 64, "type": "static"}}},
            },
        ),
    ],
    ids=["int4", "nvfp4", "pasted"],
)
def test_b11_block_settings_are_json_with_sorted_keys(config):
    assert NVIDIAModelOptConfig.from_dict(json.loads(json.dumps(config.to_dict(), sort_keys=True))) == config
    with pytest.raises(ConfigError, match="^forward_loop: a config holds data, not code"):
        NVIDIAModelOptConfig.from_dict(config.to_dict(), forward_loop=print)
    assert NVIDIAModelOptConfig.from_dict({**config.to_dict(), "forward_loop": None}) == config


def test_b11_a_tensor_in_a_torchao_config_is_refused():
    from torchao.quantization import Float8StaticActivationFloat8WeightConfig

    with pytest.raises(ConfigError, match="cannot be written as data|needs measured scales"):
        TorchAoConfig(Float8StaticActivationFloat8WeightConfig(act_quant_scale=torch.tensor(1.0)))


@each_backend
def test_b12_the_unquantized_model_stays_itself(method, tmp_path):
    """There is no dequantize(): the original is never touched, and carries no trace of a config."""
    import diffusers

    model = tiny_flux()
    before = state_digest(model.state_dict())
    module, report = quantlab.quantize(model, config_of(method), on_mismatch="skip")
    assert report.coverage > 0
    for one in (model, module):
        assert "quantization_config" not in one.config
        assert not getattr(one, "is_quantized", False)
    assert state_digest(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    assert state_digest(diffusers.FluxTransformer2DModel.from_pretrained(tmp_path).state_dict()) == before


@each_backend
def test_b13_a_backend_that_does_nothing_is_an_error(method, monkeypatch):
    monkeypatch.setattr(BACKENDS[method], "quantize", lambda *args: None)
    with pytest.raises(NotQuantized):
        quantlab.quantize(net(256, 64), config_of(method))


@each_backend
def test_b14_a_backend_that_forgets_a_layer_is_an_error(method, monkeypatch):
    real = BACKENDS[method].quantize
    monkeypatch.setattr(BACKENDS[method], "quantize", lambda module, layers, *rest: real(module, layers[:-1], *rest))
    with pytest.raises(NotQuantized):
        quantlab.quantize(net(256, 64, 64), config_of(method))


@each_backend
def test_b14_everything_is_quantized_where_it_is_on_a_cpu(method):
    _, report = quantlab.quantize(net(256, 64, 64), config_of(method))
    assert [r.status for r in report.layers] == ["quantized"] * 2
    assert report.coverage > 0.99  # all but the biases


def test_b15_torchao_takes_overrides_and_returns_what_it_does_not_know():
    stored = TorchAoConfig("int8wo").to_dict()
    config, unused = TorchAoConfig.from_dict(stored, return_unused_kwargs=True, modules_to_not_convert=["a"], device=1)
    assert config == TorchAoConfig("int8wo", ["a"])
    assert unused == {"device": 1}
    assert TorchAoConfig.from_dict(stored, modules_to_not_convert=["b"]).modules_to_not_convert == ("b",)


@each_backend
def test_b16_one_rule_and_an_error_for_an_entry_without_effect(method):
    model = nn.ModuleDict({"blocks": net(256, 256), "my_blocks": net(256, 256)})
    for entry, wanted in {
        "blocks": {"blocks.0"},
        "*blocks": {"blocks.0", "my_blocks.0"},
        "re:my_.*": {"my_blocks.0"},
    }.items():
        if len(wanted) == 2:
            continue
        _, report = quantlab.quantize(model, config_of(method, [entry]))
        assert {r.name for r in report.layers if r.status == "excluded"} == wanted
    config = config_of(method, ["bloks"])
    told = f"^{config.exclusions_key}=bloks: matches none of the 2 layers.*near are blocks"  # as its class calls them
    with pytest.raises(ConfigError, match=told):
        quantlab.quantize(model, config)


@each_backend
def test_b17_the_list_is_the_callers_and_no_model_leaks_into_the_next(method):
    names = ["0"]
    config = config_of(method, names)
    first, second = net(256, 64, 64), nn.Sequential(*net(256, 64, 64), nn.Identity())
    first._keep_in_fp32_modules = ["1"]
    asked = dataclasses.replace(request(config, first), component="m", default_exclusions=("1",))
    with pytest.raises(ConfigError, match="all 2 Linear layers of m are excluded"):
        quantize_component(asked, copy.deepcopy(first), first)
    _, report = quantlab.quantize(second, config)
    assert {r.name for r in report.layers if r.status == "excluded"} == {"0"}
    assert names == ["0"]
    assert config == config_of(method, ["0"])


@each_backend
def test_b18_bytes_are_those_of_the_tensors(method):
    original, config = net(1024, 1024), config_of(method)
    module, _ = quantlab.quantize(original, config)
    counted = component_memory(module, ["0"], original)
    assert counted.weights_bytes < 0.30 * original[0].weight.numel() * 4
    bits = next(int(c) for c in config.axes().dtype if c.isdigit())
    least = 1024 * 1024 * bits / 8
    assert least <= counted.quantized_bytes + counted.scale_bytes <= 1.13 * least


def test_b19_quanto_int8_in_bfloat16_does_not_crash():
    """The library's own kernel ends the process here: contract/test_library_faults.py."""
    original = net(100, 16).bfloat16()
    module, _ = quantlab.quantize(original, QuantoConfig("int8"))
    for num in (1, 4, 32):
        x = torch.randn(num, 100, dtype=torch.bfloat16)
        assert torch.allclose(run(module, x), run(original, x), atol=0.05)


def test_b20_the_class_is_chosen_by_quant_method_alone():
    with pytest.raises(ConfigError, match="^load_in_8bit: QuantoConfig has no such setting"):
        quantlab.config_from_dict({"quant_method": "quanto", "weights_dtype": "int4", "load_in_8bit": True})
    assert type(quantlab.config_from_dict({"quant_method": "quanto"})) is QuantoConfig


def test_b20_a_checkpoints_config_is_read(tmp_path):
    """Diffusers' entry point for it (``DiffusersAutoQuantizer.from_pretrained``) calls a function that is not there."""
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config_of("quanto").to_dict()}))
    assert quantlab.from_pretrained_config(tmp_path) == config_of("quanto")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8",), "did you mean FP8"),
        (("FP9",), "W or W_A is wanted"),
        (("FP8_FP9",), "W or W_A is wanted"),
        (("FP8_INT8_INT8",), "W or W_A is wanted"),
        (("NF4",), "plain INT4"),
        (("FP8_INT8",), "weight_only=true: the activation half of quant_type=FP8_INT8 would be ignored"),
    ],
)
def test_b21_a_bad_type_is_never_another_type(arguments, message):
    with pytest.raises(ConfigError, match=message):
        NVIDIAModelOptConfig(*arguments)


def test_b21_the_activation_half_is_used():
    config = NVIDIAModelOptConfig("INT8_FP8", channel_quantize=0, weight_only=False)
    _, report = quantlab.quantize(net(256, 64), config)
    assert (report.layers[0].dtype, report.layers[0].activation_dtype) == ("int8", "float8_e4m3")


@each_backend
def test_b22_the_difference_holds_the_method_and_nothing_strange(method):
    config = config_of(method)
    assert config.to_diff_dict()["quant_method"] == method
    assert quantlab.config_from_dict({**config.to_diff_dict(), "exclusion_rule": "quantlab"}) == config
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.extra = 1


def test_b23_dtypes_by_any_name_and_only_those_that_compute():
    for value in ("bfloat16", "torch.bfloat16", torch.bfloat16):
        assert BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=value).bnb_4bit_compute_dtype == "bfloat16"
        assert GGUFQuantizationConfig(value).compute_dtype == "bfloat16"
    for value in ("int8", "bf16", "nn", 16):
        with pytest.raises(ConfigError, match="compute_dtype=.* accepts float32, bfloat16, float16"):
            BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=value)


@pytest.mark.parametrize("backend", ["torchao", "modelopt"])
def test_b24_a_group_that_does_not_fit_is_said_before_anything_changes(backend):
    original = net(128, 96, 64)
    config = BACKENDS[backend].Config.from_axes(QuantizationAxes(backend=backend, dtype="int4", group_size=64))
    before = state_digest(original.state_dict())
    with pytest.raises(
        NotQuantized, match=r"group_size=64: 1 layer of model cannot .*: 1 \[64, 96\]: in_features 96 does not"
    ):
        quantlab.quantize(original, config)
    assert state_digest(original.state_dict()) == before
    _, report = quantlab.quantize(original, config, on_mismatch="skip")
    assert {r.name: (r.status, r.group_size) for r in report.layers} == {"0": ("quantized", 64), "1": ("skipped", None)}
    _, report = quantlab.quantize(original, config, on_mismatch="int8")
    assert {r.name: (r.status, r.dtype) for r in report.layers} == {
        "0": ("quantized", "int4"),
        "1": ("fallback", "int8"),
    }


@each_backend
def test_b25_a_pipelines_quantization_is_data_for_every_backend(method, tmp_path):
    words = [f"backend={method}", "model.components=[transformer]"]
    job = quantlab.compose(words).jobs[0]
    assert json.loads(json.dumps(job.resolved))["quantization"]["backend"] == method
    file = tmp_path / "again.yaml"
    file.write_text(job.recipe_yaml)
    again = quantlab.compose(recipe=str(file)).jobs[0]
    assert again.schemes[""].native == job.schemes[""].native
    assert again.resolved["model"]["components"] == ["transformer"]
    with pytest.raises(ConfigError, match="no such key"):
        quantlab.compose([*words, "quantization.load_in_4bitt=true"])


@each_backend
def test_b26_saved_weights_hold_no_local_path(method, tmp_path):
    folder = tmp_path / "a_private_place"
    folder.mkdir()
    module, _ = quantlab.quantize(net(256, 64), config_of(method))
    module.name_or_path = str(folder)
    BACKENDS[method].save(module, folder)
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert files
    assert not [f.name for f in files if b"a_private_place" in f.read_bytes()]
    assert "a_private_place" not in json.dumps(config_of(method).to_dict())


@each_backend
def test_b27_a_checkpoint_never_replaces_the_config_that_was_asked_for(method, tmp_path):
    original = net(256, 64)
    module, _ = quantlab.quantize(original, config_of(method))
    BACKENDS[method].save(module, tmp_path)
    fresh = copy.deepcopy(original)
    with pytest.raises(ModelError, match="load with the config|is stored as"):
        BACKENDS[method].load(fresh, ["0"], second_of(method), tmp_path)
    assert state_digest(fresh.state_dict()) == state_digest(original.state_dict())


@pytest.mark.slow
def test_b28_the_libraries_print_nothing():
    """As in a run, which quiets them before their first import."""
    code = (
        "from quantlab.quiet import quiet_libraries\nfrom quantlab.backends.table import loggers\n"
        "quiet_libraries(loggers())\nimport torch, quantlab\n"
        "m = torch.nn.Sequential(torch.nn.Linear(256, 64)).eval()\n"
        "for c in (quantlab.TorchAoConfig('int8wo'), quantlab.QuantoConfig()):\n"
        "    q, _ = quantlab.quantize(m, c)\n    q(torch.randn(2, 256))\n"
        # as on a GPU, where it looks for a kernel of its own in each layer and prints the layer where there is none
        "q, _ = quantlab.quantize(m, quantlab.NVIDIAModelOptConfig('INT8_INT8', weight_only=False))\n"
        "q[0]._use_real_quant_gemm = True\n"
        "assert not q[0].has_real_quant_gemm_impl(torch.randn(2, 256))\n"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == ""


@each_backend
def test_b29_what_hydra_makes_of_yaml_is_accepted(method):
    config = config_of(method, ["a", "b"])
    node = OmegaConf.create({k: v for k, v in config.to_dict().items() if k != "quant_method"})
    assert type(config).from_dict(node) == config
    assert json.dumps(type(config).from_dict(node).to_dict()) == json.dumps(config.to_dict())
    assert (
        BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=OmegaConf.create({"v": 6}).v).llm_int8_threshold == 6.0
    )


@each_backend
def test_b30_a_config_in_use_belongs_to_nobody_else(method):
    config = config_of(method)
    module, _ = quantlab.quantize(net(256, 64), config)
    assert config == config_of(method)
    for part in module.modules():
        assert config not in [v for v in vars(part).values() if isinstance(v, type(config))]
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, dataclasses.fields(config)[0].name, None)
    theirs = config.to_diffusers()
    theirs.modules_to_not_convert = ["changed"]
    assert config.exclusions is None


def test_each_of_the_thirty_has_its_test():
    numbers = {int(name[6:8]) for name in globals() if name.startswith("test_b")}
    assert numbers == set(range(1, 31))
    assert all(
        inspect.getsource(f).count("assert") or "pytest.raises" in inspect.getsource(f)
        for name, f in globals().items()
        if name.startswith("test_b")
    )
