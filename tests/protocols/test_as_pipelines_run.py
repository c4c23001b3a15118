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


@pytest.mark.parametrize(
    ("family", "name", "holds"),
    [
        ("stable_diffusion", "text_encoder", True),
        ("kandinsky_2_2", "prior_prior", True),
        ("stable_diffusion", "vae", False),  # its work begins when all steps are done
        ("stable_diffusion_img2img", "vae", True),
    ],
)
def test_recorded_calls_say_nothing_of_what_else_is_quantized(tmp_path, family, name, holds):
    """A denoiser's recorded calls hold the reference's own prompts: 100 dB, and 0, of a text encoder alone."""
    model, inputs = family_model(family, tmp_path)
    settings = replace(SHORT, height=64, width=64)
    model = model.with_components({name: model.parts["pipeline"].components[name]})
    reference = diffusion.observe(model, inputs, settings)
    changed = model.copy_of(name)
    with torch.no_grad():
        for weight in changed.parameters():
            weight.mul_(1.2)
    found = diffusion.measure(model.with_components({name: changed}), inputs, settings, reference, model)
    curve = found.steps["step_divergence"]
    if holds:
        assert set(found.undefined) <= {"step_sqnr_db", "weighted_velocity_mse"}
        assert not set(found.undefined) & {*found.steps, *found.estimates}
        assert "weighted_velocity_mse" not in found.estimates
        assert f"what its {name} gave" in found.undefined["step_sqnr_db"]
        assert curve.max() > 0
    else:
        assert found.undefined == {}
        assert (found.steps["step_sqnr_db"] == 100).all()
        assert curve.max() == 0
