"""Checkpoints of packages that are no backend, made by the packages themselves and read back from their tensors.

Tried with compressed-tensors 0.20.0, sdnq 0.2.8, gptqmodel 7.7.0 (with optimum 2.3.0, for GPTQ and AWQ) and auto-round 0.16.1.
They may lie outside the environment: name their folders in PYTHONPATH. Nunchaku needs a GPU: its message is tested alone.
"""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
import torch

from quantlab.errors import ModelError
from quantlab.models import causal_lm, diffusers_pipeline
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
    utils = importlib.import_module("compressed_tensors.quantization.utils")
    calculate, of_all = utils.calculate_qparams, utils.generate_gparam
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
        ends, whole = (blocks.amin(-1), blocks.amax(-1)), {}
        if hasattr(layer, "weight_global_scale"):
            layer.weight_global_scale.data.copy_(of_all(rows.amin(), rows.amax()))
            whole = {"global_scale": layer.weight_global_scale}
        scale, zero = calculate(*ends, told.weights, **whole)
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


def test_nvfp4_of_compressed_tensors(llama, tmp_path):
    """Its library unpacks it to bfloat16 whatever the model is: refused in float32, read in bfloat16."""
    plain, folder = llama
    target = compressed(folder / "llama", tmp_path / "made", "NVFP4A16")
    with pytest.raises(
        ModelError, match=r"^checkpoint=.* to bfloat16, .* float32 cannot run; pass model\.dtype=bfloat16$"
    ):
        load_candidate(str(target), plain, ["model"], {}, folder)
    config = ModelConfig(family="causal_lm", path=str(folder / "llama"), dtype="bfloat16")
    found = load_candidate(str(target), causal_lm.load(config, "cpu", folder), ["model"], {}, folder)
    rows = [row for row in found.quantization.layers if row.status == "quantized"]
    assert {(r.dtype, r.group_size, r.activation_dtype) for r in rows} == {("nvfp4", 16, "none")}
    assert 4.5 <= max(r.bits_per_weight for r in rows) < 4.6
    assert 0.05 < max(r.weight_rel_error for r in rows) < 0.2
    with torch.no_grad():
        assert found.model.components["model"](torch.arange(3, 20)[None]).logits.isfinite().all()


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


MAKER = """
import os, sys
os.cpu_count = lambda: 4  # gptqmodel refuses fewer
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
method, base, target = sys.argv[1:]
texts = [f"Line {i}: the quick brown fox number {i * i} jumps over {i % 7} lazy dogs. " * 4 for i in range(10)]
if method == "auto-round":
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"iters": 0, "disable_opt_rtn": True, "device_map": "cpu"}
    made = AutoRound(model, AutoTokenizer.from_pretrained(base), scheme="W4A16", group_size=32, **settings)
    made.quantize_and_save(target, format="auto_round")
else:
    from gptqmodel import GPTQModel, QuantizeConfig
    from gptqmodel.quantization import FORMAT, METHOD

    awq = {"method": METHOD.AWQ, "format": FORMAT.GEMM} if method == "awq" else {}
    made = GPTQModel.load(base, QuantizeConfig(bits=4, group_size=32, **awq), device="cpu")
    made.quantize(texts, batch_size=1)
    made.save(target)
"""
"""In a process of its own: these packages change transformers, and GPTQ's compiles its packing."""


@pytest.mark.parametrize(
    ("method", "package", "largest_bits", "kept"),
    [
        ("gptq", "gptqmodel", 5.2, "float32"),  # with the index of each input's group
        ("awq", "gptqmodel", 4.7, "float32"),
        ("auto-round", "auto_round", 4.7, "float16"),
    ],
)
def test_integers_packed_into_words(llama, tmp_path, method, package, largest_bits, kept):
    """Format, group size and bytes from the tensors, the weight from the layer's answers; AutoRound's float16 is told."""
    pytest.importorskip(package, reason=f"pip install {package}")
    _, folder = llama
    base = save_llama(folder / "wide", adds_bos=True, hidden_size=128, intermediate_size=256)
    command = [sys.executable, "-c", MAKER, method, str(base), str(tmp_path / "made")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)  # they leave logs there
    assert done.returncode == 0, done.stderr[-2000:]
    (config,) = (tmp_path / "made").rglob("config.json")
    found = load_candidate(str(config.parent), load_llama(base, folder), ["model"], {}, folder)
    rows = [row for row in found.quantization.layers if row.status == "quantized"]
    assert len(rows) == 14
    assert {(r.dtype, r.group_size, r.activation_dtype) for r in rows} == {("int4", 32, "none")}
    assert 4.5 < min(r.bits_per_weight for r in rows) <= max(r.bits_per_weight for r in rows) < largest_bits
    assert 0.03 < max(r.weight_rel_error for r in rows) < 0.2
    assert {r.dtype for r in found.quantization.layers if r.status != "quantized"} == {kept}
    told = " ".join(found.quantization.unquantized)
    assert ("its library loads it in float16, and the reference computes in float32" in told) == (kept == "float16")
    assert found.quantization.resolved["checkpoint_method"] == method
