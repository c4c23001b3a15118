"""A checkpoint with an adapter beside it would be loaded from elsewhere, without a word: it is refused."""

import json

import pytest

from quantlab.errors import ModelError
from quantlab.models import causal_lm, diffusers_pipeline, encoder, foreign, seq2seq, vision
from quantlab.models.outlines import outline
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig
from tests.models.test_stored_dtype import FAMILIES, checkpoint
from tests.support import tiny_images

LOAD = {"causal_lm": causal_lm.load, "encoder": encoder.load, "seq2seq": seq2seq.load, "vision": vision.load}
TOLD = "adapter_config.json is there, so that transformers loads the adapter's own base model from elsewhere"


def with_adapter(folder, base="elsewhere"):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": base}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_is_neither_loaded_nor_planned(family, tmp_path):
    folder = with_adapter(checkpoint(tmp_path / "m", family, "float32", "dtype"))
    config = ModelConfig(family=family, path=str(folder))
    with pytest.raises(ModelError, match=rf"^model.path=.*: {TOLD}.*merge_and_unload"):
        LOAD[family](config, "cpu", tmp_path)
    with pytest.raises(ModelError, match=TOLD):
        outline(config, "cpu", lambda _: None)


def test_a_checkpoint_of_others_is_not_loaded(tmp_path):
    import torch

    folder = with_adapter(checkpoint(tmp_path / "m", "causal_lm", "float32", "dtype"))
    (folder / "adapter_config.json").unlink()
    original = LOAD["causal_lm"](ModelConfig(family="causal_lm", path=str(folder)), "cpu", tmp_path).components["model"]
    with_adapter(folder)
    with pytest.raises(ModelError, match=rf"^checkpoint=x: {TOLD}"):
        foreign._read_folder("checkpoint=x", folder, original, torch.float32)


def test_a_part_of_a_pipeline_is_found_before_weights(tmp_path):
    tiny_images.sana().save_pretrained(tmp_path / "p")
    config = ModelConfig(family="diffusers", path=str(tmp_path / "p"))
    unsized = EvaluationConfig(height=None, width=None)
    assert diffusers_pipeline.look(config, unsized) is not None
    with_adapter(tmp_path / "p" / "text_encoder")
    with pytest.raises(ModelError, match=rf"^model.path=.*: text_encoder: {TOLD}"):
        diffusers_pipeline.look(config, unsized)


def test_a_lora_beside_a_pipeline_is_told_as_not_measured(tmp_path, capsys):
    tiny_images.dit().save_pretrained(tmp_path / "pipe")
    (tmp_path / "pipe" / "pytorch_lora_weights.safetensors").write_bytes(b"")
    diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(tmp_path / "pipe")), "cpu", tmp_path)
    assert "pytorch_lora_weights.safetensors lies there, which Diffusers leaves out" in capsys.readouterr().err
