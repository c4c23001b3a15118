"""Tensors in a pipeline's files that its parts have no place for: Diffusers leaves them out without a word."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.errors import ModelError
from quantlab.models.diffusers_pipeline import load
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiny_unets import stable_diffusion

UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path):
    stable_diffusion().save_pretrained(tmp_path / "p")
    return tmp_path / "p"


def changed(folder, name, change):
    save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})


def told_of(folder, capsys):
    capsys.readouterr()
    load(ModelConfig(family="diffusers", path=str(folder)), "cpu", folder.parent / "cache")
    return " ".join(capsys.readouterr().err.split())


def test_an_adapter_of_pictures_that_is_left_out_is_told(folder, capsys):
    """As a pipeline is saved that ``load_ip_adapter`` was called of: nothing of it comes back."""
    assert "left" not in told_of(folder, capsys)
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.processor.to_k_ip.0.weight"
    changed(folder, UNET, lambda has: {**has, name: torch.ones(4, 4)})
    told = told_of(folder, capsys)
    assert f"model.path={folder}: 1 tensors in the files of unet are not of a UNet2DConditionModel, such as" in told
    assert f"{name}: Diffusers leaves them out" in told


def test_names_that_diffusers_has_changed_since_are_no_such(folder, capsys):
    """As Stable Diffusion's published decoders have them."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def renamed(name):
        for now, before in old.items():
            name = name.replace(f"attentions.0.{now}.", f"attentions.0.{before}.")
        return name

    original = load_file(folder / VAE)
    changed(folder, VAE, lambda has: {renamed(name): value for name, value in has.items()})
    assert set(load_file(folder / VAE)) != set(original)
    assert told_of(folder, capsys) == ""


def test_weights_below_an_adapter_name_the_way_out(folder):
    """As a pipeline is saved while a LoRA of PEFT is in it."""

    def wrapped(has):
        return {n.replace("to_q.weight", "to_q.base_layer.weight"): value for n, value in has.items()}

    changed(folder, UNET, wrapped)
    with pytest.raises(ModelError, match=r"^model\.path=.*: weights of unet are missing .* after pipe\.fuse_lora\(\)"):
        load(ModelConfig(family="diffusers", path=str(folder)), "cpu", folder.parent / "cache")
