"""A measured GGUF scheme as a file that others load: the whole way, with the check in a process without quantlab."""

from __future__ import annotations

import gguf
import pytest

from quantlab.exporting.folder import MANIFEST
from tests.exporting.test_export import WORDS, in_process, language_words
from tests.support.shell import pipeline_words
from tests.support.tiny_images import sd3

assert in_process  # the fixture


def test_a_language_model_for_llama_cpp_and_scored_again(shell):
    """The exported file is a candidate like any other, with the numbers of the run that it came from."""
    words = language_words(shell.folder)
    rows = shell.rows(*words, "backend=gguf", "dtype=q8_0", "quantization.layer_kinds=[linear,embedding]")
    code, out, err = shell("export", "latest", "out", "-q")
    assert code == 0, err
    assert "llama.cpp, and transformers LlamaForCausalLM.from_pretrained(gguf_file=...)" in out
    assert "bits identical" in out
    assert gguf.GGUFReader(shell.folder / "out/model.gguf").get_field("general.architecture").contents() == "llama"
    again = shell.rows(*words, "checkpoint=out/model.gguf")["model.gguf"]
    (first,) = rows.values()
    same = {k: v for k, v in first["metrics"].items() if k.startswith("quality/")}
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
