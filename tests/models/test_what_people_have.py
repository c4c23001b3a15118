"""Checkpoints as people have them: variants, pipelines without a part, home folders."""

from __future__ import annotations

import shutil

import pytest
import torch

from quantlab.datasets import prompts
from quantlab.errors import ConfigError
from quantlab.models import diffusers_pipeline
from quantlab.vocabulary.schema import DatasetConfig, ModelConfig
from tests.support.tiny_pipelines import SMALL, build_tiny_flux, build_tiny_sd3


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    builders = {"flux": build_tiny_flux, "sd3": build_tiny_sd3}
    return {kind: build(root / kind) for kind, build in builders.items()}


def load(folder, cache, **settings):
    return diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(folder), **settings), "cpu", cache)


def test_a_variant_s_files_are_read(folders, tmp_path):
    folder = shutil.copytree(folders["flux"], tmp_path / "variant")
    for file in [*folder.glob("*/*.safetensors")]:
        file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    model = load(folder, tmp_path, variant="fp16")
    assert model.components["transformer"] is not None
    with pytest.raises(ConfigError, match=r"^model\.variant=fp61: .*there are fp16\); did you mean fp16\?; leave "):
        load(folder, tmp_path, variant="fp61")


def test_a_variant_that_is_not_there(folders, tmp_path):
    with pytest.raises(
        ConfigError, match=r"^model\.variant=fp16: no weight file is of it \(this checkpoint has none\)"
    ):
        load(folders["flux"], tmp_path, variant="fp16")


def test_a_pipeline_can_do_without_a_text_encoder(folders, tmp_path):
    model = load(folders["sd3"], tmp_path, without=["text_encoder_3"])
    pipe = model.parts["pipeline"]
    assert pipe.text_encoder_3 is None
    assert pipe.tokenizer_3 is None
    inputs = prompts.load(DatasetConfig(name="prompts"), SMALL, model)
    final = model.sample(model, inputs.noise, inputs.conditioning, SMALL).latents
    assert torch.isfinite(final).all()
    whole = load(folders["sd3"], tmp_path)
    assert whole.identity != model.identity


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("text_encoder_4", "has no such part; did you mean text_encoder_"),
        ("transformer", "needed to run"),
        ("vae", "needed"),
    ],
)
def test_parts_that_cannot_be_left_out(folders, tmp_path, name, told):
    with pytest.raises(ConfigError, match=rf"^model\.without={name}: .*{told}"):
        load(folders["sd3"], tmp_path, without=[name])


def test_a_home_folder_is_a_folder(tmp_path, monkeypatch):
    from quantlab.models.causal_lm import load as load_lm
    from quantlab.vocabulary.schema import ModelConfig
    from tests.support.tiny_text_models import save_llama

    monkeypatch.setenv("HOME", str(tmp_path))
    save_llama(tmp_path / "models" / "llama")
    model = load_lm(ModelConfig(family="causal_lm", path="~/models/llama"), "cpu", tmp_path)
    assert model.weights_sha256.startswith("sha256:")
