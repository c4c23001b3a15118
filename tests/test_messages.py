"""Errors blame what is to blame, and name the way out."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D as GPT2Layer

import quantlab
from quantlab.errors import ConfigError
from quantlab.modules.reached import called, check_weights_are_here
from quantlab.planning.components import DEFAULT
from quantlab.planning.plan import plan
from quantlab.quiet import quiet_libraries

E4M3 = ["float8_e4m3", "float8_e4m3fn", "qfloat8", "fp8", "e4m3"]


@pytest.mark.parametrize("name", E4M3)
def test_quantos_float8_is_e4m3(name):
    with pytest.raises(ConfigError, match=rf"{name} is called float8$"):
        quantlab.QuantoConfig(name)
    with pytest.raises(ConfigError, match=rf"{name} is called float8$"):
        quantlab.QuantoConfig("int8", activations=name)
    with pytest.raises(ConfigError, match=rf"{name} is called float8$"):
        plan([f"quantization.quantization_config={{quant_method:quanto,weights_dtype:{name}}}"])


@pytest.mark.parametrize(
    "node", ["quantization", "sweep", "model", "dataset", "evaluation", "calibration", "tracking", "launcher"]
)
def test_a_whole_node_in_one_word_says_how_it_is_typed(node):
    with pytest.raises(ConfigError, match=rf"^{node}: its keys are set one by one, as in {node}\."):
        plan(["backend=quanto", f"{node}={{a:1}}"])


def test_a_whole_mapping_of_free_keys_is_taken():
    assert len(plan(["backend=quanto", "sweep.grid={dtype:[int8,int4]}"]).jobs) == 2
    (job,) = plan(["backend=quanto", "quantization.modules_to_not_convert={mine:[a]}"]).jobs
    assert job.config.quantization.modules_to_not_convert == {"mine": ["a"]}


class Own(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T


class Kept(nn.Linear):
    """A Linear of another name, with a Linear's forward."""


class Conv1D(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return x @ self.weight


class Reads(nn.Module):
    """Calls ``b``, and reads the weight of ``a``."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.b(x @ self.a.weight.T)


def test_what_is_no_linear_is_told_by_kind_with_the_key_that_takes_it():
    model = nn.ModuleDict({"h": nn.Conv2d(8, 8, 3), "embed": nn.Embedding(64, 64), "head": nn.Linear(64, 64)})
    own = nn.Sequential(Conv1D())
    with pytest.raises(ConfigError, match=r"in parameter \(4,096\): layer_kinds=\['parameter'\] takes them$"):
        quantlab.quantize(own, quantlab.QuantoConfig("int8"))
    told = r"its weights are in embedding \(4,096\) and conv \(576\): layer_kinds=\['embedding', 'conv'\] takes them$"
    with pytest.raises(ConfigError, match=rf"^modules_to_not_convert: all 1 Linear layers .*; {told}"):
        quantlab.quantize(model, quantlab.QuantoConfig("int8", modules_to_not_convert=["head"]))
    del model["head"]
    with pytest.raises(ConfigError, match=rf"^module: it has no Linear layer; {told}"):
        quantlab.quantize(model, quantlab.QuantoConfig("int8"))


@pytest.mark.parametrize(
    "layer", [lambda: GPT2Layer(64, 64), lambda: Own(64, 64)], ids=["no Linear", "a forward of its own"]
)
@pytest.mark.parametrize("config", [quantlab.QuantoConfig("int8"), quantlab.GGUFQuantizationConfig(gguf_type="q8_0")])
def test_what_reads_its_weight_itself_is_taken_as_linear(layer, config):
    model = nn.Sequential(layer(), layer()).eval()
    made, report = quantlab.quantize(model, config)
    assert [(r.kind, r.status) for r in report.layers] == [("linear", "quantized")] * 2
    x = torch.randn(4, 64)
    assert 0 < torch.linalg.vector_norm(made(x) - model(x)) < 0.05 * torch.linalg.vector_norm(model(x))


def test_exclusions_that_leave_nothing_are_still_blamed():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    for modules in (model, nn.Sequential(Kept(64, 64), Kept(64, 64))):
        with pytest.raises(ConfigError, match=r"^modules_to_not_convert: all 2 Linear layers"):
            quantlab.quantize(modules, quantlab.QuantoConfig("int8", modules_to_not_convert=["*"]))


def test_layers_that_do_not_fit_for_one_reason_are_listed_behind_it_once():
    model = nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 40), nn.Linear(40, 64), nn.Linear(48, 32))
    with pytest.raises(ConfigError, match="^dtype=") as told:
        quantlab.quantize(model, quantlab.GGUFQuantizationConfig(gguf_type="q8_0"))
    assert "gguf q8_0: 0 [64, 48], 3 [32, 48]: in_features 48 does" in str(told.value)
    assert str(told.value).count("in_features 48 does not divide by 32") == 1
    assert "; 2 [64, 40]: in_features 40 does not divide by 32, the block of q8_0. Choose" in str(told.value)


@pytest.mark.parametrize("call", ["quantize", "evaluate"])
def test_weights_that_are_not_here_are_named(call):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64, device="meta"))
    config = quantlab.QuantoConfig("int8")
    calls = {
        "quantize": lambda: quantlab.quantize(model, config),
        "evaluate": lambda: quantlab.evaluate(model, [config], [torch.randn(2, 64)]),
    }
    with pytest.raises(ConfigError, match=r"^module: 2 of 4 weights have no values here \(1.weight: offloaded"):
        calls[call]()


def test_a_module_offloaded_by_accelerate_is_named():
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), execution_device="cpu")
    with pytest.raises(ConfigError, match=r"^module: 2 of 2 weights have no values here"):
        check_weights_are_here(model, "module")


CONFIGS = {
    "bitsandbytes nf4": quantlab.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bitsandbytes int8": quantlab.BitsAndBytesConfig(load_in_8bit=True),
    "torchao": quantlab.TorchAoConfig("int8wo"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_weight_that_a_parent_reads_is_packed_or_left_and_told(name):
    _, _, row = quantlab.evaluate(Reads(), [CONFIGS[name]], [torch.randn(4, 64), torch.randn(4, 64)])
    rows = {r.name: r for r in row.quantization.layers}
    assert rows["a"].status == ("excluded" if name == "bitsandbytes int8" else "quantized")
    assert rows["b"].status == "quantized"
    assert "the part around it reads its weight" in rows["a"].reason
    assert 0 < row.quality["output_rel_error"].value < 0.2
    _, report = quantlab.quantize(Reads(), CONFIGS[name], inputs=[torch.randn(4, 64)])
    assert {r.name: r.reason for r in report.layers} == {r.name: r.reason for r in row.quantization.layers}


@pytest.mark.parametrize("config", [quantlab.GGUFQuantizationConfig(gguf_type="q8_0"), quantlab.QuantoConfig("int8")])
def test_a_weight_that_a_parent_reads_is_the_quantized_one_where_it_can_be_read(config):
    model, x = Reads(), torch.randn(4, 64)
    made, report = quantlab.quantize(model, config)
    assert {r.name for r in report.layers if r.status == "quantized"} == {"a", "b"}
    error = torch.linalg.vector_norm(made(x) - model(x)) / torch.linalg.vector_norm(model(x))
    assert 1e-4 < float(error) < 0.1


def test_which_layers_are_called():
    model = Reads()
    assert called(model, ["a", "b"], lambda: model(torch.randn(1, 64))) == ["b"]
    assert not model.b._forward_pre_hooks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("backend=bitsandbytes", "dtype=nf4", "quantization.bnb_4bit_quant_storage=x"),
            r"^quantization\.bnb_4bit_quant_storage='x'",
        ),
        (("backend=gguf", "dtype=q4_k", "quantization.file_type=q4_0"), r"^quantization\.file_type=q4_0: "),
        (
            ("backend=gguf", "dtype=q4_k", "quantization.file_type=Q4_KM"),
            r"^quantization\.file_type=.*did you mean q4_k_m",
        ),
        (
            ("components.transformer={backend: gguf, dtype: q4_k, file_type: x}",),
            r"^components\.transformer\.file_type='x'",
        ),
        (("sweep.candidates=[{backend: quanto, bits: 8}]",), r"^sweep\.candidates\[0\]\.bits: .*did you mean dtype\?$"),
        (("sweep.candidates=[{backend: quanto, xyz: 8}]",), r"\.xyz: no such key; quantlab --help lists the groups$"),
        (
            ("backend=quanto", "quantization.exclude=[a]"),
            r"^quantization\.exclude: .*did you mean modules_to_not_convert\?",
        ),
        (("components.transformer={backend: torchao, blocksize: 64}",), r"\.blocksize: .*did you mean group_size\?$"),
        (
            ("backend=quanto", "num_samples=5"),
            r"^num_samples: no such key; did you mean evaluation\.num_samples or calib",
        ),
        (("digits_backends",), r"^digits_backends: .*; did you mean recipe=digits_backends\?"),
        (("my/own.yaml",), r"^my/own\.yaml: .*; did you mean recipe=my/own\.yaml\?"),
        (("backend=bnb",), r"^backend=bnb: .*; did you mean bitsandbytes\?$"),
        (("backend=llama.cpp",), r"^backend=llama\.cpp: .*; did you mean gguf\?$"),
        (("backend=gguf", "dtype=Q4_K"), r"^dtype=Q4_K: .*did you mean q4_k\?$"),
        (("backend=BITSANDBYTES", "dtype=nf4"), r"^backend=BITSANDBYTES: .*did you mean bitsandbytes\?$"),
    ],
)
def test_a_setting_is_told_by_the_key_that_was_typed(words, message):
    with pytest.raises(ConfigError, match=message):
        plan(words)


def test_a_choice_may_be_written_in_its_librarys_case():
    """llama.cpp and everyone who names its files write Q4_K_M."""
    jobs = [
        plan(["backend=gguf", "dtype=q4_k", f"quantization.file_type={word}"]).jobs[0] for word in ("Q4_K_M", "q4_k_m")
    ]
    assert jobs[0].schemes[DEFAULT].native == jobs[1].schemes[DEFAULT].native
    assert quantlab.GGUFQuantizationConfig(gguf_type="Q4_K", file_type="Q4_K_M").file_type == "q4_k_m"


def test_what_modelopt_says_of_versions_is_no_word_to_the_user(recwarn):
    # quantlab says itself which versions it was not probed on
    text = "transformers 5.24.0 is not tested with current version of modelopt and may cause issues."
    quiet_libraries([])
    warnings.warn(text, UserWarning, stacklevel=1)
    assert not [w for w in recwarn if "not tested" in str(w.message)]
