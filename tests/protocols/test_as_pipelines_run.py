"""Numbers of single samples and steps where a pipeline runs its denoiser, or steps, in a way of its own."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from quantlab.protocols import diffusion
from tests.support.tiny_families import SETTINGS, family_model

SHORT = replace(SETTINGS, num_inference_steps=2)


def test_attention_that_a_pipeline_changed_for_its_calls_is_there_when_they_are_replayed(tmp_path):
    """A perturbed row of a step, replayed with the denoiser's own attention, would count guidance as an error."""
    model, inputs = family_model("stable_diffusion_pag", tmp_path)
    own = dict(model.components["unet"].attn_processors)
    reference = diffusion.observe(model, inputs, SHORT)
    found = diffusion.measure(model, inputs, SHORT, reference, model)
    assert (found.steps["step_sqnr_db"] == 100).all()
    assert model.components["unet"].attn_processors == own


def test_attention_with_a_state_is_no_number(tmp_path):
    model, inputs = family_model("stable_diffusion_pag", tmp_path)
    reference = diffusion.observe(model, inputs, SHORT)
    for call in reference["calls"]:
        call["processors"] = dict.fromkeys(call["processors"], "")
    found = diffusion.measure(model, inputs, SHORT, reference, model)
    assert set(found.undefined) == {"step_sqnr_db", "weighted_velocity_mse"}
    assert "cannot be repeated" in found.undefined["step_sqnr_db"]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_frames_that_are_stepped_as_rows_are_their_own_samples(tmp_path, guidance):
    model, inputs = family_model("text_to_video", tmp_path)
    settings = replace(SHORT, num_frames=3, guidance_scale=guidance)
    reference = diffusion.observe(model, inputs, settings)
    alone = diffusion.measure(model, inputs, settings, reference, model, batch_size=1)
    assert alone.samples["latent_rel_mse"].max() < 1e-6  # a sample is no other in another batch
    worse = model.copy_of("unet")
    with torch.no_grad():
        worse.conv_out.weight.mul_(1.1)
        worse.conv_out.bias.mul_(1.1)
    found = diffusion.measure(model.with_components({"unet": worse}), inputs, settings, reference, model)
    assert found.undefined == {}
    np.testing.assert_allclose(found.steps["step_sqnr_db"], 20, atol=1e-3)  # a tenth too large, at each step
