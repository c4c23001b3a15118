"""What holds for every pipeline of Diffusers, tried on a tiny one of each family: it runs as its users call it, it
repeats itself, its floor is a number, eight bits are close, each step is measured, and a fault is seen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import quantlab
from quantlab.backends.scheme import scheme_of_config
from quantlab.modules.kept import read_tree, write_tree
from quantlab.modules.layers import linear_layers
from quantlab.protocols import diffusion
from quantlab.protocols.media import METRICS_OF
from quantlab.stages.quantize import QuantizationRequest, quantize_component
from tests.support.tiny_families import FAMILIES, QUICK, family_model


def int8(model):
    """Each denoiser in eight bits, as a job makes it."""
    made = {}
    for name in model.parts["denoisers"]:
        request = QuantizationRequest(
            component=name,
            scheme=scheme_of_config(quantlab.TorchAoConfig("int8wo")),
            compute_dtype=model.dtype,
            device="cpu",
            default_exclusions=model.default_exclusions[name],
        )
        made[name], report = quantize_component(request, model.copy_of(name), model.components[name])
        assert any(layer.status == "quantized" for layer in report.layers), report.layers[:3]
    return model.with_components(made)


def faulty(model, name):
    """A denoiser whose Linear layers are a fifth too large."""
    module = model.copy_of(name)
    with torch.no_grad():
        for layer in linear_layers(module).values():
            layer.weight.mul_(1.2)
    return model.with_components({name: module})


def check_contract(name, folder):
    row = FAMILIES[name]
    settings = row.settings
    model, inputs = family_model(name, folder)
    write_tree(diffusion.observe(model, inputs, settings), folder / "kept.safetensors")
    reference = read_tree(folder / "kept.safetensors")
    assert row.medium in reference

    def measured(candidate, batch_size=None):
        found = diffusion.measure(candidate, inputs, settings, reference, model, batch_size=batch_size)
        assert found.undefined == {}
        return found

    same = measured(model)
    assert (same.samples["latent_rel_mse"] == 0).all()
    for metric in ("psnr_db", "frame_psnr_db", "audio_snr_db"):
        assert (same.samples.get(metric, np.array(100.0)) == 100).all(), metric
    assert (same.steps["step_divergence"] == 0).all()
    assert (same.steps["step_sqnr_db"] == 100).all()

    narrow = {n: model.copy_of(n).to(torch.bfloat16) for n in model.parts["denoisers"]}
    floor = measured(model.with_components(narrow)).samples["latent_rel_mse"]
    assert np.isfinite(floor).all()
    assert 0 < floor.mean() < 1e-2
    other_batch = measured(model, batch_size=1).samples["latent_rel_mse"]
    assert other_batch.max() < (1e-2 if row.pads else 1e-6)  # the noise of a sample is its own, whatever it runs beside

    close = measured(int8(model))
    error = close.samples["latent_rel_mse"].mean()
    assert 0 < error < 1e-3
    assert set(close.samples) & set(METRICS_OF[row.medium])
    assert all(np.isfinite(values).all() for values in close.samples.values())
    assert len(close.steps["step_sqnr_db"]) == len(close.steps["step_divergence"]) == len(reference["steps"])
    assert (close.steps["step_sqnr_db"] > 30).all()
    for denoiser in model.parts["denoisers"]:
        seen = measured(faulty(model, denoiser))
        assert seen.samples["latent_rel_mse"].mean() > 4 * error, denoiser
        assert seen.steps["step_sqnr_db"].min() < close.steps["step_sqnr_db"].min() - 6, denoiser


@pytest.mark.parametrize("name", QUICK)
def test_a_pipeline_keeps_the_contract(name, tmp_path):
    check_contract(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(FAMILIES) - set(QUICK)))
def test_every_family_keeps_the_contract(name, tmp_path):
    check_contract(name, tmp_path)
