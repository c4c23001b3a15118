"""A candidate begins from the reference's noise, in whatever dtype a part of it computes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode

from quantlab.backends.scheme import scheme_of_config
from quantlab.protocols import diffusion
from quantlab.stages.quantize import QuantizationRequest, quantize_component
from tests.support.configs import METHODS, config_of
from tests.support.tiny_families import FAMILIES, family_model

PICTURED = [name for name, row in FAMILIES.items() if row.dataset == "image_prompts"]
DRAWS = (torch.randn, torch.rand, torch.randn_like, torch.rand_like)
OTHER = {"bfloat16": torch.float32, "float32": torch.bfloat16}


class Heard(TorchFunctionMode):
    """What torch really draws."""

    def __init__(self):
        super().__init__()
        self.drawn = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func in DRAWS:
            self.drawn.append(made.clone())
        return made


def drawn(model, inputs, settings, draws=()):
    model = replace(model, parts={**model.parts, "draws": draws})
    with Heard() as heard:
        made = model.sample(model, inputs.noise, inputs.conditioning, settings)
    return heard.drawn, made


def parts_of(model):
    return {n: m for n, m in model.parts["pipeline"].components.items() if isinstance(m, torch.nn.Module)}


def check(name, dtype, folder):
    model, inputs = family_model(name, folder, dtype=dtype)
    model = model.with_components(parts_of(model))
    settings, inputs = replace(FAMILIES[name].settings, num_inference_steps=2), inputs.subset([0])
    expected, reference = drawn(model, inputs, settings)
    assert expected
    for part, module in parts_of(model).items():
        other = model.with_components({part: model.copy_of(part).to(OTHER[dtype])})
        found, made = drawn(other, inputs, settings, reference.draws)
        assert len(found) == len(expected), part
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), part
        error = (made.latents - reference.latents).norm() / reference.latents.norm()
        assert error < 0.1, part
        assert parts_of(model)[part] is module
        assert not {"forward", "encode", "decode"} & set(vars(other.components[part])), part


@pytest.mark.parametrize("dtype", OTHER)
@pytest.mark.parametrize("name", ["stable_diffusion_img2img"])
def test_a_part_in_another_dtype_begins_from_the_references_noise(name, dtype, tmp_path):
    check(name, dtype, tmp_path)


CASES = [(name, "bfloat16") for name in FAMILIES if name != "ddpm"]  # which makes no picture in 16 bits
CASES += [(name, "float32") for name in PICTURED]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_so_does_a_part_of_every_family(name, dtype, tmp_path):
    check(name, dtype, tmp_path)


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    model, inputs = family_model("stable_diffusion_img2img", tmp_path_factory.mktemp("edited"), dtype="bfloat16")
    settings = replace(FAMILIES["stable_diffusion_img2img"].settings, num_inference_steps=2, num_teacher_forced=0)
    return model.with_components(parts_of(model)), inputs, settings


def takes_sixteen_inputs(backend):
    return scheme_of_config(config_of(backend)).row.in_features_multiple <= 16


QUANTIZED = [(backend, "text_encoder") for backend in METHODS]
QUANTIZED += [(backend, "vae") for backend in METHODS if takes_sixteen_inputs(backend)]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("backend", "part"), QUANTIZED)
def test_a_quantized_part_begins_from_it_too(edited, backend, compute_dtype, part):
    model, inputs, settings = edited
    expected, reference = drawn(model, inputs.subset([0]), settings)
    request = QuantizationRequest(
        component=part, scheme=scheme_of_config(config_of(backend)), compute_dtype=compute_dtype, device="cpu"
    )
    module, report = quantize_component(request, model.copy_of(part), model.components[part])
    assert any(layer.status == "quantized" for layer in report.layers)
    found, _ = drawn(model.with_components({part: module}), inputs.subset([0]), settings, reference.draws)
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_is_measured_is_paired(edited):
    """The protocol hands on what the reference drew, also where batches are others."""
    model, inputs, settings = edited
    reference = diffusion.observe(model, inputs, settings)
    assert reference["draws"] == [[], ["bfloat16"] * 2]
    wide = model.with_components({name: model.copy_of(name).float() for name in model.components})
    with Heard() as heard:
        made = diffusion.measure(wide, inputs, settings, reference, model)
    assert {noise.dtype for noise in heard.drawn} == {torch.bfloat16}
    assert 0 < np.max(made.samples["latent_rel_mse"]) < 1e-2
