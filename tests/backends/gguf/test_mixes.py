"""llama.cpp's file types: the formats by tensor, and the sizes that its own table prints."""

import copy

import pytest
import torch
from torch import nn

from quantlab.backends.gguf.config import GGUFQuantizationConfig
from quantlab.backends.gguf.mixes import BASES, FALLBACKS, OTHERS, Measures, format_of
from quantlab.backends.gguf.sizes import file_bytes
from quantlab.errors import ConfigError
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES, the_scheme

TABLE = {
    # llama.cpp, tools/quantize/README.md: bits a weight of Llama 3.1 8B
    "q2_k_s": 2.9697,
    "q2_k": 3.1593,
    "q3_k_s": 3.6429,
    "q3_k_m": 3.9960,
    "q3_k_l": 4.2979,
    "iq4_xs": 4.4597,
    "iq4_nl": 4.6818,
    "q4_k_s": 4.6672,
    "q4_k_m": 4.8944,
    "q5_k_s": 5.5704,
    "q5_k_m": 5.7036,
    "q6_k": 6.5633,
    "q8_0": 8.5008,
}


def llama_3_8b():
    shapes = {"model.embed_tokens.weight": (128256, 4096), "lm_head.weight": (128256, 4096)}
    shapes["model.norm.weight"] = (4096,)
    for i in range(32):
        at = f"model.layers.{i}"
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (4096, 4096) for n in "qo"}
        shapes |= {f"{at}.self_attn.{n}_proj.weight": (1024, 4096) for n in "kv"}
        shapes |= {f"{at}.mlp.{n}_proj.weight": (14336, 4096) for n in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (4096, 14336)}
        shapes |= {f"{at}.{n}_layernorm.weight": (4096,) for n in ("input", "post_attention")}
    return shapes


def config(file_type):
    return GGUFQuantizationConfig(gguf_type=BASES[file_type], file_type=file_type)


@pytest.mark.parametrize("file_type", TABLE)
def test_bits_are_those_of_llama_cpps_table(file_type):
    assert round(8 * file_bytes(config(file_type), llama_3_8b()) / 8_030_261_248, 4) == TABLE[file_type]


def test_q4_k_m_to_the_byte():
    assert file_bytes(config("q4_k_m"), llama_3_8b()) == 4_912_898_048


def test_a_tied_embedding_is_stored_as_the_output():
    shapes = llama_3_8b()
    del shapes["lm_head.weight"]
    q6_k, q4_k = 210 / 256, 144 / 256
    untied = file_bytes(config("q4_k_m"), llama_3_8b())
    assert untied - file_bytes(config("q4_k_m"), shapes) == 128256 * 4096 * q4_k
    assert file_bytes(config("q4_k_m"), {"model.embed_tokens.weight": (128256, 4096)}) == 128256 * 4096 * q6_k


@pytest.mark.parametrize("file_type", BASES)
def test_every_format_of_a_mix_is_offered_and_told_before(file_type):
    formats = {BASES[file_type], *OTHERS[file_type]}
    assert formats <= set(CAPABILITIES["gguf"])
    seen = set()
    for num_layers in (2, 8, 32, 80):
        for heads in (1, 4, 8):
            model = Measures(num_layers=num_layers, heads_per_kv_head=heads)
            for layer in range(num_layers):
                for leaf in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv_proj"):
                    for columns in (256, 96):
                        seen.add(format_of(file_type, f"model.layers.{layer}.x.{leaf}", columns, model))
    assert seen <= formats
    assert format_of(file_type, "model.layers.0.x.q_proj", 33, Measures(num_layers=1, heads_per_kv_head=1)) == "float16"
    assert all(FALLBACKS.get(f, f) in formats or f not in FALLBACKS for f in [BASES[file_type]])


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.self_attn = nn.ModuleDict({f"{n}_proj": nn.Linear(width, width, bias=False) for n in "qkvo"})
        self.mlp = nn.ModuleDict({"up_proj": nn.Linear(width, 256), "down_proj": nn.Linear(256, width)})


class Model(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layers = nn.ModuleList(Layer(width) for _ in range(8))


@pytest.mark.parametrize("width", [256, 96])
def test_a_model_is_stored_as_the_mix_says(width):
    """Read back from the tensors: the layers' formats, also where rows do not divide by 256."""
    torch.manual_seed(0)
    original = Model(width).eval().requires_grad_(False)
    scheme = the_scheme(QuantizationAxes(backend="gguf", dtype="q4_k"), {"file_type": "q4_k_m"})
    request = QuantizationRequest(component="model", scheme=scheme, compute_dtype="float32", device="cpu")
    _, report = quantize_component(request, copy.deepcopy(original), original)
    found = {row.name: row.dtype for row in report.layers}
    assert len(found) == 8 * 6
    better = {f"layers.{i}" for i in (0, 3, 6, 7)}
    wide = {"q4_k": "q4_k", "q6_k": "q6_k"} if width == 256 else {"q4_k": "q5_0", "q6_k": "q8_0"}
    for name, dtype in found.items():
        block, leaf = name.rpartition(".")[0].rpartition(".")[0], name.rpartition(".")[2]
        wanted = "q6_k" if block in better and leaf in ("v_proj", "down_proj") else "q4_k"
        assert dtype == (wanted if leaf == "down_proj" else wide[wanted]), name


def test_what_contradicts_is_refused():
    with pytest.raises(ConfigError, match="^file_type=q4_k_m: most of its layers are q4_k; set dtype=q4_k"):
        GGUFQuantizationConfig(gguf_type="q8_0", file_type="q4_k_m")
    with pytest.raises(ConfigError, match="tensor_types"):
        GGUFQuantizationConfig(gguf_type="q4_k", file_type="q4_k_m", tensor_types={"*": "q8_0"})
    with pytest.raises(ConfigError, match="q4_k_m"):
        GGUFQuantizationConfig(gguf_type="q4_k", file_type="q4_km")


def test_a_t5_encoder_is_mixed_as_llama_cpp_mixes_it():
    """Its names of layers are of Google's code: ``v`` and ``o`` of the attention, ``wo`` of the network."""
    model = Measures(num_layers=24, heads_per_kv_head=1)
    block = "encoder.block.0.layer"
    assert format_of("q4_k_m", f"{block}.0.SelfAttention.v", 4096, model) == "q6_k"
    assert format_of("q4_k_m", f"{block}.0.SelfAttention.q", 4096, model) == "q4_k"
    assert format_of("q3_k_l", f"{block}.0.SelfAttention.o", 4096, model) == "q5_k"
    assert format_of("q4_k_m", f"{block}.1.DenseReluDense.wo", 10240, model) == "q6_k"
