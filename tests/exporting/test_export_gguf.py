"""A measured GGUF scheme as a file that others load: the whole way, with the check in a process without quantlab."""

from __future__ import annotations

import gguf
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from quantlab.backends.gguf.llama import write_keys
from quantlab.backends.gguf.names import Architecture
from quantlab.errors import ConfigError
from quantlab.exporting import check
from quantlab.exporting.folder import MANIFEST
from quantlab.models.settings import computing_settings
from tests.exporting.test_export import WORDS, in_process, language_words
from tests.support.shell import pipeline_words
from tests.support.tiny_images import sd3

assert in_process  # the fixture
SIZES = {"vocab_size": 16, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
         "max_position_embeddings": 64}  # fmt: skip


@pytest.mark.slow
def test_a_language_model_for_llama_cpp_and_scored_again(shell):
    """The exported file is a candidate like any other, with the numbers of the run that it came from."""
    words = language_words(shell.folder)
    rows = shell.rows(*words, "backend=gguf", "dtype=q8_0", "quantization.layer_kinds=[linear,embedding]")
    code, out, err = shell("export", "latest", "out", "-q")
    assert code == 0, err
    assert "loads with transformers LlamaForCausalLM.from_pretrained(gguf_file=...), which makes it dense" in out
    assert "bits identical" in out
    assert gguf.GGUFReader(shell.folder / "out/model.gguf").get_field("general.architecture").contents() == "llama"
    again = shell.rows(*words, "checkpoint=out/model.gguf")["model.gguf"]
    (first,) = rows.values()
    same = {k: v for k, v in first["metrics"].items() if k.startswith("quality/") and "llama_cpp" not in k}
    assert {k: again["metrics"][k] for k in same} == same
    assert again["metrics"]["memory/weights_bytes"] == first["metrics"]["memory/weights_bytes"]


@pytest.mark.slow
def test_a_pipeline_whose_denoiser_is_a_gguf_file(shell, in_process):
    sd3().save_pretrained(shell.folder / "sd3")
    words = [w for w in pipeline_words("cpu", "model=diffusers", "model.path=sd3", "backend=gguf", "dtype=q8_0")
             if not w.startswith("calibration")]  # fmt: skip
    shell.rows(*words, "quantization.on_mismatch=skip")
    code, out, err = shell("export", "latest", "out", "-q")
    assert code == 0, err
    assert "SD3Transformer2DModel.from_single_file (ComfyUI-GGUF)" in out
    assert (shell.folder / "out" / MANIFEST).is_file()
    assert (shell.folder / "out/transformer/model.gguf").is_file()


def test_a_class_that_diffusers_reads_from_no_single_file(shell, in_process):
    shell.rows(*WORDS, "backend=gguf", "dtype=q8_0")
    code, _, err = shell("export", "latest", "out", "-q")
    assert code == 2
    assert "export.path: Diffusers reads no single file into a DiTTransformer2DModel" in err
    assert not (shell.folder / "out").exists()


def test_what_its_shapes_refuse_is_refused_before_the_candidate_is_made_again(shell, in_process, monkeypatch):
    shell.rows(*WORDS, "backend=gguf", "dtype=q8_0")
    monkeypatch.setattr("quantlab.running.export.open_session", None)  # who calls it loads, and calibrates
    code, _, err = shell("export", "latest", "out", "-q")
    assert (code, err.split(";")[0]) == (
        2,
        "quantlab: export.path: Diffusers reads no single file into a DiTTransformer2DModel, so that nobody would "
        "load its GGUF file",
    )


def test_other_settings_of_a_files_reader_are_no_other_kernel():
    """transformers reads neither the windows of a Mistral from a GGUF file nor a Gemma's caps."""
    measured = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=1e-6))
    read = LlamaForCausalLM(LlamaConfig(**SIZES, rms_norm_eps=9.999999974752427e-07))
    read.config.sliding_window, measured.config.sliding_window = None, 8
    read.config.attention_dropout = 0.5  # of training
    read.config.rope_parameters = {**measured.config.rope_parameters, "rope_theta": 5.0}
    assert check.other_settings(read, computing_settings(measured)) == ["rope_parameters.rope_theta", "sliding_window"]
    assert check.other_settings(read, {}) == []


@pytest.mark.parametrize(
    ("architecture", "settings", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act=gelu: llama.cpp computes silu in llama"),
        ("gemma2", {"hidden_act": "silu", "hidden_activation": "gelu_pytorch_tanh",
                    "layer_types": ["full_attention", "sliding_attention"]}, "layer_types: "),
        ("gemma3", {"hidden_activation": "gelu_pytorch_tanh", "layer_types": ["sliding_attention"] * 2,
                    "rope_parameters": {"sliding_attention": {"rope_theta": 500.0}}}, "rope_theta=500 of the sliding"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8,
                                       "attention_factor": 1.5}}, "attention_factor=1.5 of yarn"),
    ],
    ids=["activation", "pattern", "local base", "yarn"],
)  # fmt: skip
def test_a_model_that_llama_cpp_would_compute_otherwise_is_refused(architecture, settings, said):
    config = LlamaConfig(**SIZES)
    for key, value in settings.items():
        setattr(config, key, value)
    with pytest.raises(ConfigError) as refused:
        write_keys(gguf.GGUFWriter(None, architecture), Architecture(name=architecture), config, None)
    assert str(refused.value).startswith(f"export.path: {said}")


@pytest.mark.parametrize(("is_used", "context"), [(True, 8), (False, 64)])
def test_a_text_is_no_longer_than_the_windows_that_llama_cpp_does_not_know(is_used, context):
    config = LlamaConfig(**SIZES)
    config.sliding_window, config.use_sliding_window = 8, is_used
    writer = gguf.GGUFWriter(None, "qwen2")
    write_keys(writer, Architecture(name="qwen2"), config, None)
    assert writer.kv_data[0]["qwen2.context_length"].value == context
