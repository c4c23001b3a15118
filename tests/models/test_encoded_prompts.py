"""Prompts that are kept: what a pipeline makes of them is what it makes where it encodes them anew."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quantlab.models import diffusers_pipeline
from quantlab.models.pipeline_call import sample
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiny_families import FAMILIES


@pytest.fixture
def pads_left(monkeypatch):
    """A pipeline that looks at its tokenizer's padding before and after it encodes, which sets it (as LTX-2's do)."""
    from diffusers import StableDiffusionPipeline as Pipeline

    init, encode, draw = Pipeline.__init__, Pipeline.encode_prompt, Pipeline.prepare_latents

    def __init__(self, vae, text_encoder, tokenizer, *rest, **others):  # noqa: N807
        init(self, vae, text_encoder, tokenizer, *rest, **others)
        self.side_when_made = tokenizer.padding_side

    def encode_prompt(self, *args, **kwargs):
        self.tokenizer.padding_side = "left"
        return encode(self, *args, **kwargs)

    def prepare_latents(self, *args, **kwargs):
        sides = {"right": 1.0, "left": 2.0}
        return draw(self, *args, **kwargs) * sides[self.side_when_made] * 4 * sides[self.tokenizer.padding_side]

    __init__.__wrapped__ = init
    monkeypatch.setattr(Pipeline, "__init__", __init__)
    monkeypatch.setattr(Pipeline, "encode_prompt", encode_prompt)
    monkeypatch.setattr(Pipeline, "prepare_latents", prepare_latents)
    return Pipeline


def test_what_encoding_changes_of_a_tokenizer_is_kept_with_the_prompts(pads_left, tmp_path):
    row = FAMILIES["stable_diffusion"]
    made = row.build()
    made.save_pretrained(tmp_path / "p")
    conditioning, seed = {"prompt": ["a red fox"]}, torch.tensor([3])
    plain = pads_left.from_pretrained(tmp_path / "p")
    plain.set_progress_bar_config(disable=True)
    wanted = plain(
        "a red fox", height=32, width=32, num_inference_steps=3, guidance_scale=3.0, output_type="np",
        negative_prompt="blurred", generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip
    config = ModelConfig(family="diffusers", path=str(tmp_path / "p"), call=dict(row.call))
    for _ in range(2):  # in another process, later: the prompts are there
        model = diffusers_pipeline.load(config, "cpu", tmp_path / "cache")
        for _ in range(2):
            found = sample(model, seed, conditioning, row.settings).media["images"]
            np.testing.assert_array_equal(found, wanted)
