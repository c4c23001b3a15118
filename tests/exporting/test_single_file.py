"""``quantlab.load`` of one file: what it is, its configuration says, which lies beside it or is named."""

from __future__ import annotations

import json
import shutil

import gguf
import pytest
import torch

import quantlab
from quantlab.backends.gguf.export import FILE
from quantlab.backends.gguf.export import export as write
from quantlab.errors import ConfigError, ModelError
from quantlab.exporting import check
from tests.backends.gguf.test_export import part_of
from tests.support.llama_cpp import save_gguf
from tests.support.tiny_images import sd3
from tests.support.tiny_text_models import load_llama, save_llama


@pytest.fixture(scope="module")
def denoiser(tmp_path_factory):
    """A tiny SD 3 transformer as a GGUF file in a folder of its own, and its plain checkpoint."""
    folder = tmp_path_factory.mktemp("denoiser")
    module = sd3().transformer
    module.save_pretrained(folder / "plain")
    (folder / "blocks").mkdir()
    write(part_of(module), folder / "blocks")
    return folder, module


def test_a_gguf_file_of_a_denoiser(denoiser, tmp_path):
    folder, module = denoiser
    made = quantlab.load(folder / "blocks" / FILE)
    assert type(made).__name__ == "SD3Transformer2DModel"
    assert not made.training
    layer = made.transformer_blocks[0].attn.to_q
    assert type(layer).__name__ == "GGUFLinear"
    shutil.copyfile(folder / "blocks" / FILE, tmp_path / "alone.gguf")
    with pytest.raises(ConfigError, match=r"^path=.*GGUF file of sd3 does not say its configuration, .*; give config="):
        quantlab.load(str(tmp_path / "alone.gguf"))
    again = quantlab.load(tmp_path / "alone.gguf", config=folder / "plain")
    assert check.digests(again) == check.digests(made)


def test_a_safetensors_file_of_a_denoiser(denoiser, tmp_path):
    folder, module = denoiser
    weights = "diffusion_pytorch_model.safetensors"
    shutil.copyfile(folder / "plain" / weights, tmp_path / "sd3.safetensors")
    with pytest.raises(
        ConfigError, match="safetensors file does not say its configuration, and beside it is no config"
    ):
        quantlab.load(tmp_path / "sd3.safetensors")
    made = quantlab.load(tmp_path / "sd3.safetensors", config=folder / "plain")
    wanted = module.state_dict()
    assert all(tensor.equal(wanted[name]) for name, tensor in made.state_dict().items())
    assert check.digests(quantlab.load(folder / "plain" / weights)) == check.digests(made)


def test_a_gguf_file_of_a_language_model_says_it_itself(tmp_path):
    model = load_llama(save_llama(tmp_path / "llama", adds_bos=True), tmp_path)
    module = model.components["model"]
    save_gguf(module, model.parts["tokenizer"], tmp_path / "plain.gguf", add_bos=True)
    made = quantlab.load(tmp_path / "plain.gguf")
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.allclose(made(ids).logits, module(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "content", "config", "error", "said"),
    [
        ("x.ckpt", b"1", None, ConfigError, "a .ckpt is not loaded, as pickles run code"),
        ("x.bin", b"1", None, ConfigError, "a .bin is not loaded"),
        ("x.gguf", b"GGUF1", None, ModelError, "not a readable GGUF file"),
        ("x.safetensors", b"\x10\0\0\0\0\0\0\0{", None, ModelError, "damaged or cut off"),
        (
            "x.safetensors",
            b"\2\0\0\0\0\0\0\0{}",
            {"_class_name": "DiTTransformer2DModel"},
            ConfigError,
            "no single file",
        ),
        (
            "x.safetensors",
            b"\2\0\0\0\0\0\0\0{}",
            {"architectures": ["LlamaForCausalLM"]},
            ConfigError,
            "is none of Diff",
        ),
        ("x.safetensors", b"\2\0\0\0\0\0\0\0{}", {"_class_name": "os.system"}, ConfigError, "no single file"),
    ],
)
def test_what_is_refused_is_refused_in_words(tmp_path, name, content, config, error, said):
    (tmp_path / name).write_bytes(content)
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(error, match=said) as refused:
        quantlab.load(str(tmp_path / name))
    assert str(refused.value).startswith("path=")


def test_an_architecture_that_nobody_names(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "made_up")
    writer.add_tensor("a", torch.zeros(32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ConfigError, match="a GGUF file of made_up does not say"):
        quantlab.load(tmp_path / "x.gguf")


def test_a_config_is_for_a_file(tmp_path):
    with pytest.raises(ConfigError, match="it is for a single file"):
        quantlab.load(tmp_path, config=tmp_path)
