"""The mixes of GGUF files of diffusion models: by the rules of the tools that write them, on models built from their
configurations alone."""

import copy
import functools

import pytest
import torch
from torch import nn

from quantlab.backends.gguf.config import GGUFQuantizationConfig
from quantlab.backends.gguf.diffusion_mixes import has_fused_attention, is_diffusion, is_kept
from quantlab.backends.gguf.mixes import BASES, OTHERS, format_of, measures, measures_of
from quantlab.backends.gguf.sizes import file_bytes
from quantlab.models.architectures import Architecture
from quantlab.models.outline import build
from quantlab.planning.architectures import shipped_architectures
from quantlab.stages.price import price_component
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import CAPABILITIES, the_scheme

MODELS = ("flux_dev", "sd3_medium", "sdxl", "qwen_image", "wan22_5b", "z_image")


@functools.cache
def denoiser(name):
    known = shipped_architectures()[name]
    part = "unet" if "unet" in known.parts else "transformer"
    only = Architecture(path=known.path, dtype=known.dtype, parts={part: known.parts[part]})
    return build("x", only, "bfloat16")[part]


def shapes_of(name):
    module = denoiser(name)
    saved = module.state_dict(keep_vars=True)
    buffers = {n: b for n, b in module.named_buffers() if n in saved}
    return {n: tuple(t.shape) for n, t in (*module.named_parameters(), *buffers.items())}


def config(file_type):
    return GGUFQuantizationConfig(gguf_type=BASES[file_type], file_type=file_type)


KEPT = {
    # ComfyUI-GGUF, tools/lcpp.patch, "rules for image models", in Diffusers' names
    "flux_dev": {"x_embedder", "context_embedder", "time_text_embed", "norm_out", "proj_out"},
    "sd3_medium": {"pos_embed", "context_embedder", "time_text_embed", "norm_out", "proj_out"},
    "sdxl": {"conv_in", "conv_out", "time_embedding", "add_embedding", "conv_norm_out"},
    "qwen_image": {"img_in", "txt_in", "txt_norm", "time_text_embed", "norm_out", "proj_out"},
    "wan22_5b": {"patch_embedding", "condition_embedder", "proj_out", "scale_shift_table"},
    "z_image": {"all_x_embedder", "all_final_layer", "t_embedder", "cap_embedder", "noise_refiner", "context_refiner",
                "x_pad_token", "cap_pad_token"},
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_what_stands_outside_of_the_blocks_keeps_16_bits(name):
    shapes = shapes_of(name)
    assert is_diffusion(path.removesuffix(".weight") for path in shapes)
    assert {path.split(".")[0] for path in shapes if is_kept(path)} == KEPT[name]
    layers = [path.removesuffix(".weight") for path, shape in shapes.items() if len(shape) == 2]
    off = config("q4_k_s").disabled_layers(layers)
    assert {path.split(".")[0] for path in off} <= KEPT[name]
    assert config("q4_k_s").disabled_layers([path for path in layers if path not in off]) == {}
    plain = GGUFQuantizationConfig(gguf_type="q4_k")
    assert plain.disabled_layers(layers) == {}


# -- Flux, to the byte: of 11,901,408,320 values 64,094,208 are in matrices that are kept, and 3,085,376 in vectors

KEPT_VALUES, VECTORS, VALUES = 64_094_208, 3_085_376, 11_901_408_320
FUSED = 19 * 2 * 3 * 3072 * 3072
"""Queries, keys and values of Flux's 19 blocks of two streams, which are one tensor a stream in its files."""
BITS = {"q2_k": 2.625, "q3_k": 3.4375, "q4_k": 4.5, "q5_k": 5.5, "q6_k": 6.5625, "q8_0": 8.5, "q4_0": 4.5, "q4_1": 5.0}


@pytest.mark.parametrize(
    ("file_type", "base", "fused"),
    [
        ("q2_k", "q2_k", "q2_k"),
        ("q3_k_s", "q3_k", "q3_k"),
        ("q3_k_m", "q3_k", "q4_k"),
        ("q4_k_s", "q4_k", "q4_k"),
        ("q4_k_m", "q4_k", "q5_k"),
        ("q5_k_m", "q5_k", "q6_k"),
        ("q6_k", "q6_k", "q6_k"),
        ("q8_0", "q8_0", "q8_0"),
        ("q4_0", "q4_0", "q4_0"),
        ("q4_1", "q4_1", "q4_1"),
    ],
)
def test_flux_to_the_byte(file_type, base, fused):
    inside = VALUES - KEPT_VALUES - VECTORS
    wanted = (BITS[base] * (inside - FUSED) + BITS[fused] * FUSED) / 8 + 2 * KEPT_VALUES + 4 * VECTORS
    assert file_bytes(config(file_type), shapes_of("flux_dev")) == wanted


@pytest.mark.parametrize(("dtype", "published"), [("q8_0", 21.502), ("q4_1", 16.838), ("q2_k", 13.264)])
def test_the_gguf_rows_of_the_diffusers_blog_by_the_files_own_bytes(dtype, published):
    """https://huggingface.co/blog/diffusers-quantization: GiB reserved after loading the files of city96/FLUX.1-dev-gguf
    with the other parts in bfloat16: 9.255 GiB of them (T5-XXL 8.870, CLIP-L 0.229, the VAE 0.156). What is reserved
    beyond the tensors, 1.9 to 3.8 %, are the allocator's blocks."""
    total = (
        file_bytes(config(dtype), shapes_of("flux_dev")) / 2**30 + (4_762_310_656 + 123_060_480 + 83_819_683) / 2**29
    )
    assert total == pytest.approx(published, rel=0.04)
    assert total < published


# -- the other models: which rule takes which layer


@pytest.mark.parametrize(
    ("name", "file_type", "path", "wanted"),
    [
        ("flux_dev", "q4_k_m", "transformer_blocks.3.attn.add_v_proj", "q5_k"),
        ("flux_dev", "q4_k_m", "transformer_blocks.3.ff.net.2", "q4_k"),
        ("flux_dev", "q4_k_m", "single_transformer_blocks.3.attn.to_v", "q4_k"),
        ("sd3_medium", "q5_k_m", "transformer_blocks.3.attn.to_q", "q6_k"),
        ("sd3_medium", "q5_k_m", "transformer_blocks.3.ff_context.net.2", "q5_k"),
        ("sdxl", "q4_k_m", "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v", "q6_k"),
        ("sdxl", "q4_k_m", "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.2", "q6_k"),
        ("sdxl", "q4_k_m", "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", "q4_k"),
        ("qwen_image", "q3_k_l", "transformer_blocks.30.attn.to_v", "q5_k"),
        ("qwen_image", "q3_k_l", "transformer_blocks.30.attn.add_v_proj", "q3_k"),
        ("qwen_image", "q3_k_l", "transformer_blocks.30.img_mlp.net.2", "q3_k"),
        ("wan22_5b", "q4_k_s", "blocks.20.ffn.net.2", "q5_k"),
        ("wan22_5b", "q4_k_s", "blocks.1.attn1.to_v", "q5_k"),
        ("wan22_5b", "q4_k_s", "blocks.10.attn1.to_v", "q4_k"),
        ("wan22_5b", "q3_k_m", "blocks.0.attn2.to_v", "q5_k"),
        ("wan22_5b", "q3_k_m", "blocks.1.attn2.to_v", "q4_k"),
        ("z_image", "q4_k_m", "layers.5.attention.to_k", "q5_k"),
        ("z_image", "q4_k_m", "layers.5.feed_forward.w2", "q6_k"),
        ("z_image", "q5_0", "layers.5.feed_forward.w2", "q5_1"),
    ],
)
def test_which_rule_takes_which_layer(name, file_type, path, wanted):
    shapes = shapes_of(name)
    model = measures({path.removesuffix(".weight"): shape for path, shape in shapes.items()})
    assert measures_of(model.data) == model
    shape = shapes[f"{path}.weight"]
    assert format_of(file_type, path, shape[-1], model) == (wanted if shape[-1] % 256 == 0 else "float16")


@pytest.mark.parametrize("name", MODELS)
def test_a_file_lies_between_its_narrowest_and_its_widest_format(name):
    shapes = shapes_of(name)
    sizes = {kind: file_bytes(config(kind), shapes) for kind in BASES}
    order = ["q2_k", "q3_k_s", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0"]
    assert [sizes[k] for k in order] == sorted(sizes[k] for k in order)
    assert set(BASES) == set(OTHERS)
    model = measures(shapes)
    formats = {format_of(k, p.removesuffix(".weight"), 256, model) for k in BASES for p in shapes}
    assert formats <= set(CAPABILITIES["gguf"])


def test_the_width_of_a_unet_is_that_of_the_rearranged_tensors():
    """tools/convert.py: tensors of SD 1 and SDXL whose rows do not divide by 256 are stored as rows of 256."""
    shapes = {
        "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
        "down_blocks.1.attentions.0.proj_in.weight": (640, 640),
        "down_blocks.0.resnets.0.conv1.bias": (320,),
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v.weight": (640, 640),
        "conv_in.weight": (320, 4, 3, 3),
    }
    q4_k, q6_k = 144 / 256, 210 / 256
    wanted = 320 * 320 * 9 * q4_k + 640 * 640 * q4_k + 4 * 320 + 640 * 640 * q6_k + 2 * 320 * 36
    assert file_bytes(config("q4_k_m"), shapes) == wanted
    assert not has_fused_attention(path.removesuffix(".weight") for path in shapes)


def test_a_plan_tells_the_file_and_keeps_what_it_keeps():
    scheme = the_scheme(QuantizationAxes(backend="gguf", dtype="q4_k", on_mismatch="skip"), {"file_type": "q4_k_m"})
    request = QuantizationRequest(component="transformer", scheme=scheme, compute_dtype="bfloat16", device="cuda")
    price = price_component("transformer", denoiser("z_image"), request, "q4_k_m")
    assert price.file_bytes == file_bytes(config("q4_k_m"), shapes_of("z_image"))
    reasons = {one.rule for one in price.kept}
    assert any(rule.startswith("file_type=q4_k_m: it is outside of the blocks") for rule in reasons)
    assert not price.refused


def linears(**widths):
    return nn.ModuleDict({name: nn.Linear(256, width) for name, width in widths.items()})


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn1 = linears(to_q=256, to_k=256, to_v=256)
        self.attn2 = linears(to_q=256, to_k=256, to_v=256)
        self.ffn = nn.ModuleDict({"net": nn.ModuleList([linears(proj=256), nn.Identity(), nn.Linear(256, 256)])})


class Wan(nn.Module):
    """Twelve blocks with the names of Wan's: their order by name is 0, 1, 10, 11, 2."""

    def __init__(self):
        super().__init__()
        self.condition_embedder = linears(time_proj=256)
        self.blocks = nn.ModuleList(Block() for _ in range(12))
        self.proj_out = nn.Linear(256, 64)


def test_a_model_reads_back_as_the_mix_says():
    torch.manual_seed(0)
    original = Wan().eval().requires_grad_(False)
    scheme = the_scheme(QuantizationAxes(backend="gguf", dtype="q4_k"), {"file_type": "q4_k_s"})
    request = QuantizationRequest(component="transformer", scheme=scheme, compute_dtype="float32", device="cpu")
    _, report = quantize_component(request, copy.deepcopy(original), original)
    dtypes = {row.name: row.dtype for row in report.layers if row.status == "quantized"}
    better = {f"blocks.{i}.attn{j}.to_v" for i in (0, 1) for j in (1, 2)}
    better |= {f"blocks.{i}.ffn.net.2" for i in range(12)}
    assert {name for name, dtype in dtypes.items() if dtype == "q5_k"} == better
    assert set(dtypes.values()) == {"q4_k", "q5_k"}
    kept = {row.name: row.reason for row in report.layers if row.status != "quantized"}
    assert set(kept) == {"condition_embedder.time_proj", "proj_out"}
    assert all(reason.startswith("file_type=q4_k_s: it is outside of the blocks") for reason in kept.values())
