"""A plan's bytes: those that others published, and those that real tensors occupy."""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from quantlab.errors import ModelError
from quantlab.models.architectures import Architecture, Part
from quantlab.models.outline import build
from quantlab.models.outlines import outline
from quantlab.modules.memory import component_memory, logical_size
from quantlab.planning.architectures import shipped_architecture, shipped_architectures
from quantlab.planning.places import groups
from quantlab.planning.plan import plan
from quantlab.running.forecast import forecast
from quantlab.running.phases import _decoder_activations
from quantlab.stages.price import price_component
from quantlab.stages.quantize import quantize_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import EvaluationConfig, ModelConfig
from tests.support.tables import CAPABILITIES, held_packages, the_scheme
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, save_llama

GIB = 2**30
PUBLISHED = {
    # transformer or model -> (parameters, of which in Linear layers, Linear layers), counted by others and by hand
    "flux_dev.transformer": (11_901_408_320, 11_898_322_944, 504),
    "flux_schnell.transformer": (11_891_178_560, 11_888_099_328, 502),
    "flux_dev.text_encoder": (123_060_480, 84_934_656, 72),
    "flux_dev.text_encoder_2": (4_762_310_656, 4_630_511_616, 168),
    "flux_dev.vae": (83_819_683, 2_097_152, 8),
    "sd3_medium.transformer": (2_028_328_000, 2_027_126_784, 340),
    "sd35_medium.transformer": (2_243_171_520, None, None),
    "sd35_large.transformer": (8_056_627_520, 8_053_694_464, 536),
    "sd3_medium.text_encoder_2": (694_659_840, 630_784_000, 193),
    "sdxl.unet": (2_567_463_684, 2_232_647_680, 743),
    "sdxl.vae": (83_653_863, 2_097_152, 8),
    "sd15.unet": (859_520_964, 270_049_280, 184),
    "pixart_sigma.transformer": (610_856_096, None, None),
    "flux2_klein.transformer": (3_875_544_576, None, None),
    "flux2_klein.text_encoder": (4_022_468_096, None, None),
    "qwen_image.transformer": (20_430_401_088, None, None),
    "qwen_image.text_encoder": (8_292_166_656, None, None),
    "z_image.transformer": (6_154_908_736, None, None),
    "wan22_5b.transformer": (4_999_787_712, None, None),
    "llama_3_8b.model": (8_030_261_248, 7_504_658_432, 225),
    "llama_3_1_8b.model": (8_030_261_248, 7_504_658_432, 225),
    "llama_3_2_1b.model": (1_235_814_400, None, None),
    "qwen3_0_6b.model": (596_049_920, None, None),
    "qwen3_8b.model": (8_190_735_360, None, None),
    "qwen3_30b_a3b.model": (30_532_122_624, None, None),
    "smollm2_135m.model": (134_515_008, None, None),
}
ASKED = [
    *("flux_dev", "flux_schnell", "flux2_klein", "sd3_medium", "sd35_medium", "sd35_large", "sdxl", "sd15"),
    *("pixart_sigma", "qwen_image", "z_image", "wan22_5b", "llama_3_8b", "llama_3_1_8b", "llama_3_2_1b"),
    *("qwen3_0_6b", "qwen3_8b", "qwen3_30b_a3b"),
]
_BUILT = {}


def module_of(name, dtype="bfloat16"):
    """A component of a shipped architecture on the meta device, built once."""
    if (name, dtype) not in _BUILT:
        file, _, part = name.partition(".")
        found = shipped_architectures()[file]
        one = Architecture(path=found.path, parts={part: found.parts[part]})
        _BUILT[name, dtype] = build(name, one, dtype)[part]
    return _BUILT[name, dtype]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name):
    """Diffusers' and transformers' classes on the meta device; a tied weight counts once (T5, Llama 3.2 1B)."""
    parameters, in_linear, num_linear = PUBLISHED[name]
    module = module_of(name)
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert logical_size(module)[0] == parameters
    if in_linear is not None:
        assert (sum(m.weight.numel() for m in linear), len(linear)) == (in_linear, num_linear)


def test_pixart_with_the_embeddings_of_size_that_its_class_adds_by_default():
    """611,349,152 are counted where ``use_additional_conditions`` is left to the class; Sigma is made without."""
    config = dict(shipped_architectures()["pixart_sigma"].parts["transformer"].config)
    del config["use_additional_conditions"]
    one = Architecture(path="p", parts={"t": Part(class_name="PixArtTransformer2DModel", config=config)})
    module = build("p", one, "bfloat16")["t"]
    linear = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert logical_size(module)[0] == 611_349_152
    assert (sum(m.weight.numel() for m in linear), len(linear)) == (610_701_312, 290)


def test_every_architecture_has_an_option_and_says_its_source():
    assert set(ASKED) <= set(groups()["model"])
    for name, found in shipped_architectures().items():
        assert shipped_architecture(found.path) is not None, name
        assert all(part.source and part.class_name for part in found.parts.values())
    assert "architectures" not in groups()


def priced(name, backend, dtype, settings=None, compute="bfloat16", device="cuda", defaults=(), **axes):
    """The price of a shipped component under a scheme, all its Linear layers but ``defaults``."""
    scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype, **axes), settings)
    request = QuantizationRequest(
        component=name, scheme=scheme, compute_dtype=compute, device=device, default_exclusions=defaults
    )
    return price_component(name, module_of(name, compute), request, dtype)


def plain(name, dtype="bfloat16"):
    return price_component(name, module_of(name, dtype), None).memory.weights_bytes


def test_double_quantization_by_qloras_own_sum():
    """arXiv 2305.14314, section 3: 8/64 + 32/(64 * 256) = 0.126953 bits for the scales, 4.126953 in all; the code
    tables and the mean, 1,092 bytes a layer, come on top."""
    price = priced("flux_dev.transformer", "bitsandbytes", "nf4", {"bnb_4bit_use_double_quant": True})
    num = price.quantized_parameters
    layers = 504
    assert num == 11_898_322_944
    scales = price.memory.scale_bytes - layers * (64 + 1024 + 4)
    assert round(8 * scales / num, 6) == pytest.approx(0.126953, abs=2e-6)
    assert round(8 * (price.memory.quantized_bytes + scales) / num, 6) == pytest.approx(4.126953, abs=2e-6)


# -- the Flux pipeline of the Diffusers blog, https://huggingface.co/blog/diffusers-quantization (GiB after load)

ALL = {"replace_default_exclusions": True}
WO = {"replace_default_exclusions": True, "modules_to_not_convert": {"own": ["*.wo"]}}


def flux(backend, dtype, t5=None, wo="bfloat16", settings=None):
    """GiB of FLUX.1-dev with transformer and T5 quantized as the blog did: all Linear layers but T5's ``wo``, which the
    loader of the time kept in ``wo``'s dtype (None: quantized as well)."""
    transformer = priced("flux_dev.transformer", backend, dtype, settings, **ALL).memory.weights_bytes
    kept = 0
    if t5 == "plain":
        encoder = plain("flux_dev.text_encoder_2")
    else:
        price = priced("flux_dev.text_encoder_2", backend, dtype, settings, **(ALL if wo is None else WO))
        encoder = price.memory.weights_bytes
        kept = sum(k.num_bytes for k in price.kept if k.rule == "modules_to_not_convert: *.wo")
        assert kept == (0 if wo is None else 2 * 1_006_632_960)
    rest = plain("flux_dev.text_encoder") + plain("flux_dev.vae")
    return (transformer + encoder + rest + (kept if wo == "float32" else 0)) / GIB


BLOG = [
    # (GiB that the blog printed, the plan's, tolerance): max_memory_reserved of an H100, in GiB (blog issue 2852)
    ("bfloat16", 31.447, lambda: sum(map(plain, FLUX_PARTS)) / GIB, 0.006),
    ("bitsandbytes 4-bit", 12.584, lambda: flux("bitsandbytes", "nf4", wo="float32"), 0.006),
    ("torchao int8wo", 17.020, lambda: flux("torchao", "int8"), 0.006),
    ("torchao fp8wo", 17.016, lambda: flux("torchao", "float8_e4m3"), 0.006),
    # reserved, not allocated: load leaves up to half a GiB of the allocator's blocks unused
    ("bitsandbytes 8-bit", 19.273, lambda: flux("bitsandbytes", "int8", wo="float32"), 0.04),
    ("quanto int8", 17.330, lambda: flux("quanto", "int8"), 0.04),
    ("quanto fp8, wo too", 16.395, lambda: flux("quanto", "float8_e4m3", wo=None), 0.04),
    # T5's wo was kept in float32 here as with bitsandbytes (in bfloat16 it would be 10.19): 1.875 GiB that nobody asked
    # for; the rest is the allocator's
    ("quanto int4", 12.254, lambda: flux("quanto", "int4", wo="float32"), 0.04),
    ("gguf q8_0, T5 in 16 bits", 21.502, lambda: flux("gguf", "q8_0", t5="plain"), 0.04),
    ("gguf q4_1, T5 in 16 bits", 16.838, lambda: flux("gguf", "q4_1", t5="plain"), 0.04),
    # the file's own 128 MB of kept embedders and vectors come on top: see test_diffusion_mixes.py
    ("gguf q2_k, T5 in 16 bits", 13.264, lambda: flux("gguf", "q2_k", t5="plain"), 0.04),
]
FLUX_PARTS = ("flux_dev.transformer", "flux_dev.text_encoder", "flux_dev.text_encoder_2", "flux_dev.vae")


@pytest.mark.parametrize(("published", "planned", "tolerance"), [c[1:] for c in BLOG], ids=[c[0] for c in BLOG])
def test_the_flux_pipeline_of_the_diffusers_blog(published, planned, tolerance):
    found = planned()
    assert found == pytest.approx(published, rel=tolerance)
    assert found < published, "what is reserved is never less than the weights"


def test_a_third_of_that_4_bit_pipeline_is_one_layer_of_t5_in_float32():
    assert flux("bitsandbytes", "nf4", wo="float32") - flux("bitsandbytes", "nf4") == pytest.approx(1.875)
    assert flux("quanto", "int8") - flux("quanto", "float8_e4m3", wo=None) == pytest.approx(0.9375, abs=1e-3)


TORCHAO = [("bfloat16", 31.438, None), ("int8wo", 20.385, "int8"), ("fp8wo", 20.363, "float8_e4m3")]


@pytest.mark.parametrize(("name", "published", "dtype"), TORCHAO, ids=[c[0] for c in TORCHAO])
def test_the_rows_of_diffusers_torchao(name, published, dtype):
    """sayakpaul/diffusers-torchao, README: memory of FLUX.1-dev in GiB, the transformer alone quantized."""
    rest = sum(map(plain, FLUX_PARTS[1:]))
    transformer = priced("flux_dev.transformer", "torchao", dtype, **ALL).memory.weights_bytes if dtype else None
    total = (transformer or plain("flux_dev.transformer")) + rest
    assert total / GIB == pytest.approx(published, rel=0.003)


# -- against real tensors


def on_disk(tmp_path, kind):
    return BUILDERS[kind](tmp_path / kind)


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", pytest.param("float32", marks=pytest.mark.slow), pytest.param("float16", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", BUILDERS)
def test_an_outline_is_what_is_loaded(tmp_path, kind, dtype):
    """Every component of a local pipeline: the same names, shapes, dtypes, ties and bytes as after from_pretrained."""
    from diffusers import DiffusionPipeline

    folder = on_disk(tmp_path, kind)
    made = outline(ModelConfig(family="diffusers", path=str(folder), dtype=dtype), "cpu", shipped_architecture)
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    loaded = {n: m for n, m in pipe.components.items() if isinstance(m, nn.Module)}
    assert set(made.components) == set(loaded)
    for name, module in loaded.items():
        own = made.components[name]
        shape = {n: (tuple(t.shape), t.dtype) for n, t in [*module.named_parameters(), *module.named_buffers()]}
        assert {n: (tuple(t.shape), t.dtype) for n, t in [*own.named_parameters(), *own.named_buffers()]} == shape
        assert price_component(name, own, None).memory == component_memory(module, (), module, held_packages())


def as_run(module, request, price):
    """The ledger of the module when it is really quantized."""
    real, report = quantize_component(request, copy.deepcopy(module), module)
    names = [r.name for r in report.layers if r.is_stored_quantized]
    assert sum(p.numel() for p in module.parameters()) >= price.quantized_parameters
    return component_memory(real, names, module, held_packages())


EVERY = [(b, d) for b, rows in CAPABILITIES.items() if b != "none" for d, row in rows.items() if "cpu" in row.devices]


FIRST = {backend: dtype for backend, dtype in reversed(EVERY)}
CASES = [pytest.param(b, d, id=f"{b}-{d}", marks=[] if FIRST[b] == d else [pytest.mark.slow]) for b, d in EVERY]


@pytest.mark.parametrize(("backend", "dtype"), CASES)
def test_planned_is_measured_on_a_real_pipeline(tmp_path, backend, dtype):
    """Transformer and T5 of a tiny Flux on this CPU, in bfloat16: codes, scales, the rest, all to the byte."""
    from diffusers import FluxTransformer2DModel
    from transformers import T5EncoderModel

    folder = on_disk(tmp_path, "flux")
    config = ModelConfig(family="diffusers", path=str(folder), dtype="bfloat16")
    made = outline(config, "cpu", shipped_architecture)
    loaded = {
        "transformer": FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16),
        "text_encoder_2": T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.bfloat16),
    }
    settled = False
    for name, module in loaded.items():
        scheme = the_scheme(QuantizationAxes(backend=backend, dtype=dtype, on_mismatch="skip"))
        request = QuantizationRequest(
            component=name,
            scheme=scheme,
            compute_dtype="bfloat16",
            device="cpu",
            default_exclusions=made.default_exclusions[name],
        )
        price = price_component(name, made.components[name], request, dtype)
        if price.refused:  # a scheme that fits none of its layers
            continue
        assert price.memory == as_run(module.eval().requires_grad_(False), request, price)
        settled = True
    assert settled or CAPABILITIES[backend][dtype].in_features_multiple > 64 or dtype == "nf4"


def test_a_misfit_falls_back_and_a_tied_head_stays(tmp_path):
    """q4_k does not fit rows of 192: stored as q8_0; the head is the embedding's own weight."""
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path / "m", hidden_size=256, intermediate_size=192, tie_word_embeddings=True)
    made = outline(ModelConfig(family="causal_lm", path=str(folder)), "cpu", shipped_architecture)
    module = AutoModelForCausalLM.from_pretrained(folder).eval().requires_grad_(False)
    for fallback in ("q8_0", "float16", "skip"):
        scheme = the_scheme(QuantizationAxes(backend="gguf", dtype="q4_k", on_mismatch=fallback))
        request = QuantizationRequest(
            component="model",
            scheme=scheme,
            compute_dtype="float32",
            device="cpu",
            default_exclusions=made.default_exclusions["model"],
        )
        price = price_component("model", made.components["model"], request)
        assert price.memory == as_run(module, request, price)
        assert not price.refused


# -- the command


def prices(*words):
    return forecast(plan([*words, "sweep.dry_run=true"], multirun=True))


def test_the_fields_that_are_promised():
    [price] = prices("model=llama_3_2_1b", "backend=bitsandbytes", "dtype=nf4", "memory.device_gib=8")
    data = json.loads(json.dumps(price.data()))
    assert {"backend", "dtype", "group_size", "total_bytes", "components", "unmatched", "refused", "phases"} <= set(
        data
    )
    [part] = data["components"]
    assert {"name", "parameters", "bytes", "quantized_parameters", "bits_per_weight", "kept"} <= set(part)
    assert all({"rule", "modules", "bytes"} <= set(k) for k in part["kept"])
    assert all({"name", "device_bytes", "host_bytes"} <= set(p) for p in data["phases"])
    assert data["total_bytes"] == sum(k["bytes"] for k in part["kinds"]) == part["bytes"]
    assert sum(k["parameters"] for k in part["kinds"]) == part["parameters"]
    assert data["fits"] is True
    assert data["placement"] == "resident"


def test_a_grid_is_built_once(monkeypatch):
    built = []
    true = outline
    monkeypatch.setattr("quantlab.running.forecast.outline", lambda *args: built.append(args[0].path) or true(*args))
    found = prices("model=qwen3_0_6b", "backend=bitsandbytes,quanto,torchao", "dtype=int8,int4", "group_size=auto,none")
    assert len([p for p in found if p.components]) > 4
    assert len(built) == 1


def test_a_grid_tells_the_reason_of_what_is_impossible():
    found = prices("model=llama_3_2_1b", "backend=bitsandbytes,gguf", "dtype=nf4,q4_k")
    assert [(p.backend, p.dtype, bool(p.components)) for p in found] == [
        ("bitsandbytes", "nf4", True),
        ("gguf", "q4_k", True),
        ("bitsandbytes", "q4_k", False),
        ("gguf", "nf4", False),
    ]
    assert all(p.refused[0].startswith("dtype=") for p in found[2:])


@pytest.mark.slow
def test_the_nearest_change_that_would_fit():
    [price] = prices("model=flux_dev", "backend=bitsandbytes", "dtype=int8", "memory.device_gib=9")
    assert price.fits is False
    assert price.advice
    [larger] = prices("model=flux_dev", "backend=bitsandbytes", "dtype=int8", "memory.device_gib=24")
    assert (larger.fits, larger.placement) == (True, "alone")
    sizes = {c.name: c.memory.weights_bytes for c in larger.components}
    decode = next(p for p in larger.phases["alone"] if p.name == "decode")  # the candidate waits on the host
    assert decode.device_bytes - decode.activation_bytes == sizes["vae"]
    assert decode.host_bytes == sizes["transformer"]
    [host] = prices("model=flux_dev", "backend=bitsandbytes", "dtype=nf4", "memory.device_gib=12", "memory.host_gib=16")
    assert host.advice.startswith("nothing found that fits: group_offload needs ")
    small = ["model=llama_3_2_1b", "backend=bitsandbytes", "dtype=nf4", "memory.device_gib=4.5"]
    [asked] = prices(*small, "memory.placement=resident")
    assert (asked.fits, asked.advice) == (False, "memory.placement=streamed fits")
    [free] = prices(*small)
    assert free.placement == "streamed"


@pytest.mark.parametrize(
    ("sizes", "pixels"),
    [
        ({"tile_sample_min_size": 512}, 512 * 512),
        ({"tile_sample_min_height": 256, "tile_sample_min_width": 128}, 256 * 128),
        ({"tile_sample_min_size": 2048}, 1024 * 768),
        ({}, 1024 * 768),
    ],
)
def test_tiles_are_priced_by_the_decoders_own_sizes(sizes, pixels):
    decoder = SimpleNamespace(config={"block_out_channels": [128]}, **sizes)
    whole = EvaluationConfig(height=1024, width=768)
    tiled = EvaluationConfig(height=1024, width=768, tiled_decoding=True)
    unit = _decoder_activations(decoder, whole, 2) / (1024 * 768)
    assert _decoder_activations(decoder, tiled, 2) == unit * pixels


def test_what_the_code_reads_is_priced_as_what_a_run_sees_read(tmp_path):
    """The experts of NLLB-MoE ask a layer for its dtype, whose integers bitsandbytes would then show."""
    from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration

    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 64, "num_experts": 2}
    wide = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("ffn_dim", 32), ("sparse_step", 1))}
    NllbMoeForConditionalGeneration(NllbMoeConfig(**sizes, **wide)).save_pretrained(tmp_path)
    words = ["model=seq2seq", f"model.path={tmp_path}", "device=cpu", "backend=bitsandbytes", "dtype=int8"]
    (price,) = prices(*words, "quantization.on_mismatch=skip")
    kept = {name for row in price.components[0].kept if "reads its weight" in row.rule for name in row.modules}
    assert kept == {f"model.{side}coder.layers.0.ffn.experts.expert_{i}.fc2" for side in ("en", "de") for i in (0, 1)}


def test_an_exclusion_that_matches_nothing_is_told_and_the_rest_is_priced():
    [price] = prices(
        "model=llama_3_2_1b", "backend=quanto", "dtype=int8", "quantization.modules_to_not_convert.own=[nothing]"
    )
    data = price.data()
    assert data["unmatched"] == ["nothing"]
    assert data["refused"][0].startswith("modules_to_not_convert.own=nothing: matches none")
    assert data["components"][0]["quantized_parameters"] > 0


def test_layers_that_cannot_be_stored_are_told():
    [price] = prices("model=smollm2_135m", "backend=gguf", "dtype=q4_k")
    [reason] = price.data()["refused"]
    assert reason.startswith("dtype=q4_k: 180 layers of model cannot be stored as gguf q4_k: model.layers.0.")
    assert "quantization.on_mismatch=skip" in reason


@pytest.mark.parametrize(
    "asked",
    [
        ["backend=gguf", "dtype=q4_k"],
        ["backend=gguf", "dtype=q4_k", "quantization.on_mismatch=skip"],
        ["backend=modelopt", "dtype=int4", "group_size=512"],
        ["backend=quanto", "dtype=int8", "quantization.layer_kinds=[conv]"],
        ["backend=quanto", "dtype=int8", "quantization.modules_to_not_convert.own=[q_prok]"],
        ["backend=torchao", "dtype=mxfp8"],
        ["components.model={backend: gguf, dtype: q4_k}"],
    ],
    ids=" ".join,
)
def test_a_plan_refuses_what_a_run_refuses_in_the_same_words(shell, asked):
    save_llama(shell.folder / "m", hidden_size=64, intermediate_size=128)
    (shell.folder / "text.txt").write_text(TEXT)
    words = ["model=causal_lm", "model.path=m", "dataset=text", "dataset.path=text.txt", "device=cpu"]
    words += ["evaluation.context_length=32", "evaluation.num_samples=2", "sweep.floors=false", *asked]
    code, out, _ = shell("plan", *words, "--json")
    [told] = json.loads(out)[0]["refused"]
    assert shell(*words, "-q")[::2] == (code, f"quantlab: {told}\n")
    assert code == 2


def test_a_layer_that_falls_back_to_a_float_is_not_quantized(tmp_path):
    folder = save_llama(tmp_path / "m", hidden_size=256, intermediate_size=192)
    words = ["model=causal_lm", f"model.path={folder}", "device=cpu", "backend=gguf", "dtype=q4_k"]
    [skipped] = prices(*words, "quantization.on_mismatch=skip")
    [cast] = prices(*words, "quantization.on_mismatch=bfloat16")
    assert cast.components[0].quantized_parameters == skipped.components[0].quantized_parameters
    assert cast.components[0].bits_per_quantized_weight == 4.5
    assert cast.components[0].memory.quantized_bytes == skipped.components[0].memory.quantized_bytes
    kept = {k.rule: k.modules for k in cast.components[0].kept}
    why = "does not fit: in_features 192 does not divide by 256, the block of q4_k; kept in bfloat16"
    assert kept[why] == ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")


BAD = {
    "class": ({"_class_name": "FluxPipeline", "transformer": ["diffusers", "NoSuchModel"]}, {}),
    "denoiser": ({"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}, {"vae": {}}),
    "config": (
        {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]},
        {"transformer": {"num_layers": "many"}},
    ),
    "code": ({"_class_name": "FluxPipeline", "transformer": ["mine", "MyModel"]}, {"transformer": {}}),
}


@pytest.mark.parametrize("case", BAD)
def test_a_model_that_cannot_be_built_is_one_message(tmp_path, case):
    index, configs = BAD[case]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        prices("model=diffusers", f"model.path={tmp_path}", "backend=quanto", "dtype=int8")
    assert str(caught.value).startswith(f"model.path={tmp_path}"), caught.value


def test_no_network_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match="^model.path=nobody/nothing"):
        prices("model=causal_lm", "model.path=nobody/nothing", "backend=quanto", "dtype=int8")


def test_what_loaders_keep_is_kept_and_named_with_its_dtype():
    """transformers keeps T5's ``wo`` out of whatever quantizes, in float32 for models of float16 alone (facts of its
    quantizers' ``_keep_in_fp32_modules``): 1,006,632,960 weights of T5-XXL, 1.875 GiB in bfloat16."""
    for backend, dtype in (("bitsandbytes", "nf4"), ("quanto", "int8")):
        price = priced("flux_dev.text_encoder_2", backend, dtype)
        [wo] = [kept for kept in price.kept if kept.rule.startswith("T5EncoderModel: wo")]
        assert wo.num_bytes == 2 * 1_006_632_960
        assert wo.rule.endswith("here it stays bfloat16)")
        assert len(wo.modules) == 24


def test_in_groups_the_references_head_is_there_while_its_logits_are_made_again():
    [price] = prices("model=qwen3_8b", "backend=bitsandbytes", "dtype=nf4", "memory.device_gib=10")
    evaluate = next(p for p in price.phases["group_offload"] if p.name == "evaluate")
    (component,) = price.components
    head = 151936 * 4096 * 2
    assert evaluate.device_bytes - evaluate.activation_bytes == component.memory.weights_bytes + head
