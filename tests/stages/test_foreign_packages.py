"""Checkpoints of packages that are no backend, made by the packages themselves and read back from their tensors.

Tried with compressed-tensors 0.20.0 and sdnq 0.2.8. Both may lie outside the environment: name their folders in PYTHONPATH.
GPTQ and AWQ need gptqmodel, which is built from source, and Nunchaku a GPU: for these the message is tested alone.
"""

from __future__ import annotations

import importlib

import pytest
import torch

from quantlab.models import diffusers_pipeline
from quantlab.stages.foreign import load_candidate
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiny_pipelines import build_tiny_flux
from tests.support.tiny_text_models import load_llama, save_llama

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    return load_llama(save_llama(folder / "llama", hidden_size=64, intermediate_size=128), folder), folder


def compressed(base, target, preset, bits=None):
    """A Llama whose Linear layers the library quantizes, by the maximum of each row or group."""
    pytest.importorskip("compressed_tensors", reason="pip install compressed-tensors")
    ct = importlib.import_module("compressed_tensors.quantization")
    calculate = importlib.import_module("compressed_tensors.quantization.utils").calculate_qparams
    made = importlib.import_module("compressed_tensors.compressors").ModelCompressor
    from transformers import AutoModelForCausalLM

    module = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if preset:
        scheme = ct.preset_name_to_scheme(preset, ["Linear"])
    else:
        by_group = {"strategy": "group", "group_size": 32} if bits == 4 else {"strategy": "channel"}
        weights = ct.QuantizationArgs(num_bits=bits, symmetric=True, **by_group)
        scheme = ct.QuantizationScheme(targets=["Linear"], weights=weights)
    ct.apply_quantization_config(module, ct.QuantizationConfig(config_groups={"all": scheme}, ignore=["lm_head"]))
    for layer in module.modules():
        if (told := getattr(layer, "quantization_scheme", None)) is None:
            continue
        rows = layer.weight.detach()
        blocks = rows.reshape(len(rows), -1, told.weights.group_size or rows.shape[1])
        scale, zero = calculate(blocks.amin(-1), blocks.amax(-1), told.weights)
        layer.weight_scale.data.copy_(scale)
        if hasattr(layer, "weight_zero_point"):
            layer.weight_zero_point.data.copy_(zero)
    compressor = made.from_pretrained_model(module)
    compressor.compress_model(module)
    module.save_pretrained(target)
    compressor.update_config(target)
    return target


@pytest.mark.parametrize(
    ("preset", "bits", "dtype", "group_size", "largest_bits", "error", "activations"),
    [
        (None, 8, "int8", None, 8.7, 0.02, "none"),
        (None, 4, "int4", 32, 5.1, 0.2, "none"),
        ("FP8_DYNAMIC", None, "float8_e4m3", None, 8.6, 0.05, "float8_e4m3"),
    ],
)
def test_compressed_tensors(llama, tmp_path, preset, bits, dtype, group_size, largest_bits, error, activations):
    model, folder = llama
    target = compressed(folder / "llama", tmp_path / "made", preset, bits)
    found = load_candidate(str(target), model, ["model"], {}, folder)
    rows = [row for row in found.quantization.layers if row.status == "quantized"]
    assert len(rows) == 14
    assert {(r.dtype, r.group_size, r.activation_dtype) for r in rows} == {(dtype, group_size, activations)}
    assert max(r.bits_per_weight for r in rows) < largest_bits
    assert 0 < max(r.weight_rel_error for r in rows) < error
    assert {row.name for row in found.quantization.layers} - {r.name for r in rows} == {"model.embed_tokens", "lm_head"}
    wanted = {r.name: r.weight_rel_error for r in rows}
    module, own = found.model.components["model"], model.components["model"]
    with torch.no_grad():  # its library unpacks it here
        assert module(torch.arange(3, 20)[None]).logits.isfinite().all()
    for name, told in wanted.items():
        weight, plain = module.get_submodule(name).weight, own.get_submodule(name).weight
        assert float((weight - plain).norm() / plain.norm()) == pytest.approx(told, rel=1e-4)


@pytest.mark.parametrize(
    ("weights_dtype", "group", "dtype", "group_size", "largest_bits", "error"),
    [
        ("int8", -1, "int8", None, 11, 0.02),
        ("uint4", 16, "int4", 16, 9, 0.2),
        ("float8_e4m3fn", -1, "float8_e4m3", None, 11, 0.05),
    ],
)
def test_sdnq(tmp_path, monkeypatch, weights_dtype, group, dtype, group_size, largest_bits, error):
    monkeypatch.setenv("SDNQ_USE_TORCH_COMPILE", "0")
    sdnq = pytest.importorskip("sdnq", reason="pip install sdnq")
    from diffusers import FluxTransformer2DModel

    base = build_tiny_flux(tmp_path / "flux")
    anything = {"minimum_allowed_numel": 0, "minimum_allowed_channel_size": 0}
    config = sdnq.SDNQConfig(weights_dtype=weights_dtype, group_size=group, **anything)
    made = FluxTransformer2DModel.from_pretrained(
        base / "transformer", quantization_config=config, torch_dtype=torch.float32
    )
    made.save_pretrained(tmp_path / "made")
    model = diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(base)), "cpu", tmp_path)
    found = load_candidate(str(tmp_path / "made"), model, ["transformer"], {}, tmp_path)
    rows = [row for row in found.quantization.layers if row.status == "quantized"]
    assert len(rows) >= 19
    assert {r.dtype for r in rows} == {dtype}
    assert group_size in {r.group_size for r in rows}
    assert max(r.bits_per_weight for r in rows) < largest_bits
    assert 0 < max(r.weight_rel_error for r in rows) < error
    assert all(r.product_rel_error < 0.02 for r in rows if r.product_rel_error is not None)
    assert found.quantization.resolved["checkpoint_method"] == "sdnq"
