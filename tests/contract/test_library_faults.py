"""Faults of the libraries that the capability table and the backends are built around, one process for each library.

A test here that fails is good news: the library has changed, and what quantlab does about the fault may go.
"""

import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # they change with the libraries' versions, not with quantlab
CPUINFO = Path("/proc/cpuinfo")
HAS_AVX512_BF16 = CPUINFO.exists() and "avx512_bf16" in CPUINFO.read_text()
needs_repack = pytest.mark.skipif(not HAS_AVX512_BF16, reason="the library repacks on CPUs with AVX512-BF16 only")
SCRIPTS = {
    "bitsandbytes": """
import bitsandbytes as bnb
def forward(k, n):
    layer = bnb.nn.Linear4bit(k, n, quant_type="nf4", compute_dtype=torch.bfloat16, compress_statistics=False)
    layer.load_state_dict(nn.Linear(k, n).state_dict())
    layer = layer.to("cpu").eval()
    before = str(layer.weight.quant_state.absmax.dtype)
    with torch.no_grad():
        layer(torch.randn(2, k, dtype=torch.bfloat16))
    return [before, str(layer.weight.quant_state.absmax.dtype)]
for k, n in ((64, 32), (100, 36), (100, 64), (63, 64)):
    attempt(f"{k}x{n}", lambda: forward(k, n))
""",
    "quanto": """
from optimum.quanto import freeze, qint8, quantize
model = nn.Sequential(nn.Linear(100, 16, bias=False)).bfloat16()
quantize(model, weights=qint8)
freeze(model)
with torch.no_grad():
    out = [model(torch.randn(n, 100, dtype=torch.bfloat16)) for n in (1, 4, 32)]
found["is_right"] = all(bool(v.isfinite().all()) and float(v.abs().max()) < 100 for v in out)
""",
    "torchao": """
from torchao.prototype.quantization.gguf import GGUFWeightOnlyConfig
from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
from torchao.quantization import quantize_
for config in (GGUFWeightOnlyConfig(), PrototypeInt4WeightOnlyConfig(group_size=32)):
    model = nn.Sequential(nn.Linear(100, 16))
    quantize_(model, config)
    found[type(config).__name__] = type(model[0].weight.data).__name__
""",
    "modelopt": """
import diffusers
import modelopt.torch.quantization as mtq
found["nf4"] = diffusers.NVIDIAModelOptConfig.quanttype_to_numbits["NF4"]
attempt("constructor", lambda: diffusers.NVIDIAModelOptConfig("FP8") and "built")
model = nn.Sequential()
model.proj_out, model.other = nn.Linear(64, 64), nn.Linear(64, 64)
mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m.other(m.proj_out(torch.randn(2, 64))))
found["preset"] = [model.proj_out.weight_quantizer.is_enabled, model.other.weight_quantizer.is_enabled]
def packed(bits):
    model = nn.Sequential(nn.Linear(64, 64))
    entries = [{"quantizer_name": "*", "enable": False},
               {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits, "axis": None}}]
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": "max"})
    mtq.compress(model)
    return str(model[0].weight.dtype)
for bits in (8, 3, 2, (4, 3), (5, 2)):
    attempt(f"bits {bits}", lambda: packed(bits))
""",
}
HEAD = """
import json, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
torch.manual_seed(0)
found = {}
def attempt(name, make):
    try:
        found[name] = make()
    except Exception as error:
        found[name] = f"{type(error).__name__}: {error}"
"""


@functools.cache
def probe(library):
    """Exit status of the library's script, and what it found."""
    code = f"{HEAD}{SCRIPTS[library]}\nprint('\\n' + json.dumps(found))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode <= 0, done.stderr
    return done.returncode, json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {}


@needs_repack
def test_bitsandbytes_repacks_its_scales_at_the_first_forward():
    """Why ``QuantizedLinear4bit`` switches the CPU kernel off: a saved model would differ after it was evaluated."""
    assert probe("bitsandbytes")[1]["64x32"] == ["torch.float32", "torch.bfloat16"]


@needs_repack
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ("100x36", "AssertionError: N must be divisible by block_n"),
        ("100x64", "RuntimeError: shape '"),
        ("63x64", "AssertionError: K must be even"),
    ],
)
def test_bitsandbytes_fails_on_shapes_at_the_first_forward(shape, message):
    assert probe("bitsandbytes")[1][shape].startswith(message)


def test_quanto_int8_in_bfloat16_ends_the_process_or_is_wrong():
    """Why the quanto backend replaces ``qbytes_mm``: rows that are not aligned to 16 bytes are read out of bounds."""
    status, found = probe("quanto")
    assert status < 0 or found == {"is_right": False}


@pytest.mark.parametrize("name", ["GGUFWeightOnlyConfig", "PrototypeInt4WeightOnlyConfig"])
def test_torchaos_prototypes_skip_layers_without_a_word(name):
    """Why torchao offers no GGUF formats here, and why every layer is looked at after quantizing."""
    assert probe("torchao")[1][name] == "Tensor"


def test_modelopts_presets_leave_proj_out_without_a_word():
    """Why quantlab writes its own list of quantizers."""
    assert probe("modelopt")[1]["preset"] == [False, True]


@pytest.mark.parametrize("bits", [3, 2])
def test_modelopt_does_not_pack_other_integers(bits):
    found = probe("modelopt")[1]
    assert found["bits 8"] == "torch.int8"
    assert "Real quantization not supported for this format" in found[f"bits {bits}"]


def test_modelopt_does_not_pack_five_exponent_bits():
    found = probe("modelopt")[1]
    assert found["bits (4, 3)"] == "torch.float8_e4m3fn"
    assert "e5m2" not in found["bits (5, 2)"]


def test_diffusers_modelopt_class_takes_nf4_for_four_bit_integers_and_cannot_be_built():
    found = probe("modelopt")[1]
    assert found["nf4"] == 4
    assert found["constructor"].startswith("TypeError: 'list' object is not a mapping")
