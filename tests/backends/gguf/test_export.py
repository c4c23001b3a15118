"""GGUF files that are GGUF files: read by llama.cpp, by Diffusers' ``from_single_file``, by transformers, and by quantlab."""

from __future__ import annotations

import inspect
import json

import diffusers
import gguf
import pytest
import torch
from diffusers.loaders import single_file_utils

from quantlab.backends.gguf import export as write
from quantlab.backends.gguf.export import FILE, _joined, digest, stored_tensors
from quantlab.backends.gguf.header import check_header
from quantlab.backends.gguf.language import load_language_model
from quantlab.backends.gguf.llama import pre_tokenizer
from quantlab.backends.gguf.names import ARCHITECTURES
from quantlab.backends.gguf.published import published_names
from quantlab.backends.part import Part
from quantlab.errors import ConfigError
from quantlab.exporting import check
from tests.protocols.test_llama_cpp import merging_tokenizer
from tests.support.copies import quantized
from tests.support.llama_cpp import library, of_llama_cpp
from tests.support.tiny_images import flux, qwen_image, sd3, z_image
from tests.support.tiny_text_models import TEXT, load_llama, save_llama
from tests.support.tiny_unets import sdxl
from tests.support.tiny_videos import wan_2_2


def part_of(module, name="transformer", dtype="q8_0", tokenizer=None, **axes):
    module = module.eval().requires_grad_(False)
    made, report = quantized(module, "gguf", dtype, on_mismatch="skip", **axes)
    from quantlab.vocabulary.axes import QuantizationAxes
    from tests.support.tables import native_config

    config = native_config(QuantizationAxes(backend="gguf", dtype=dtype))
    kind = type(module).__module__.partition(".")[0]
    return Part(
        name=name,
        module=made,
        original=module,
        library=kind,
        config=config,
        layers=report.layers,
        dtype="float32",
        compute_dtype="float32",
        tokenizer=tokenizer,
    )


def names_in(file):
    return {t.name: t for t in gguf.GGUFReader(file).tensors}


# -- denoisers

DENOISERS = {
    "flux": (flux, "transformer", "flux"),
    "sd3": (sd3, "transformer", "sd3"),
    "sdxl": (sdxl, "unet", "sdxl"),
    "wan": (wan_2_2, "transformer", "wan"),
    "qwen_image": (qwen_image, "transformer", "qwen_image"),
    "z_image": (z_image, "transformer", "lumina2"),
}
PUBLISHED = {
    "sd3": "joint_blocks.0.x_block.attn.qkv.weight",
    "sdxl": "model.diffusion_model.input_blocks.1.0.in_layers.0.weight",
    "wan": "blocks.0.self_attn.q.weight",
    "qwen_image": "transformer_blocks.0.attn.to_q.weight",
    "z_image": "layers.0.attention.qkv.weight",
}
"""A name of each that its published files have; Diffusers' converter of Flux knows the one published width alone."""


@pytest.mark.parametrize("name", DENOISERS)
def test_a_denoiser_that_diffusers_loads(tmp_path, name):
    make, component, architecture = DENOISERS[name]
    part = part_of(getattr(make(), component), component)
    written = write(part, tmp_path)
    assert written.method == "from_single_file"
    check_header(tmp_path / FILE)
    reader = gguf.GGUFReader(tmp_path / FILE)
    assert reader.get_field("general.architecture").contents() == architecture
    found = {t.name for t in reader.tensors}
    if name in PUBLISHED:
        assert PUBLISHED[name] in found
        assert "ComfyUI-GGUF" in written.loader
    else:
        assert found == set(stored_tensors(part.module))
        assert "named as Diffusers names" in written.loader
    kind = getattr(diffusers, written.target.partition(":")[2])
    loaded = kind.from_single_file(
        str(tmp_path / FILE),
        config=str(tmp_path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    assert check.digests(loaded) == dict(written.state)
    layer = next(row.name for row in part.layers if row.status == "quantized")
    x = torch.randn(3, part.module.get_submodule(layer).in_features)
    ours, theirs = part.module.get_submodule(layer)(x), loaded.get_submodule(layer)(x)
    assert torch.linalg.vector_norm(theirs - ours) < 1e-3 * torch.linalg.vector_norm(ours)
    assert "_name_or_path" not in json.loads((tmp_path / "config.json").read_text())


def converter_of_width(width):
    """Diffusers' converter of Flux, for a narrower model than the one that it was written for."""
    source = inspect.getsource(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
    scope = {"torch": torch}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {width}"), scope)  # noqa: S102
    return scope["convert_flux_transformer_checkpoint_to_diffusers"]


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0"])
def test_flux_under_its_published_names(tmp_path, monkeypatch, dtype):
    """As Diffusers reads FLUX.1, whose width is written into its converter."""
    part = part_of(flux().transformer, dtype=dtype)
    width = part.original.inner_dim
    from diffusers.loaders import single_file_model

    row = {**single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]}
    row["checkpoint_mapping_fn"] = converter_of_width(width)
    monkeypatch.setitem(single_file_model.SINGLE_FILE_LOADABLE_CLASSES, "FluxTransformer2DModel", row)
    written = write(part, tmp_path)
    assert "ComfyUI-GGUF" in written.loader
    found = names_in(tmp_path / FILE)
    assert {"double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "img_in.weight"} <= set(found)
    assert tuple(found["double_blocks.0.img_attn.qkv.weight"].shape)[1] == 3 * width
    loaded = diffusers.FluxTransformer2DModel.from_single_file(
        str(tmp_path / FILE),
        config=str(tmp_path),
        quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    assert check.digests(loaded) == dict(written.state)


def test_matrices_of_two_formats_that_are_one_in_the_file(tmp_path):
    """They stand under Diffusers' names then."""
    part = part_of(sd3().transformer)
    tensors = stored_tensors(part.module)
    assert "joint_blocks.0.x_block.attn.qkv.weight" in published_names("SD3Transformer2DModel", tensors, {})
    mixed, _ = quantized(
        part.original, "gguf", "q8_0", on_mismatch="skip", settings={"tensor_types": {"*.to_v": "q4_0"}}
    )
    from dataclasses import replace

    written = write(replace(part, module=mixed), tmp_path)
    assert set(names_in(tmp_path / FILE)) == set(tensors)
    assert "named as Diffusers names" in written.loader


def test_a_class_without_published_names(tmp_path):
    from tests.support.tiny_images import sana

    part = part_of(sana().transformer)
    written = write(part, tmp_path)
    assert set(names_in(tmp_path / FILE)) == set(stored_tensors(part.module))
    assert "named as Diffusers names" in written.loader


def test_digests_are_those_of_the_check():
    for tensor in (torch.randn(3, 4), torch.randn(3, 4).bfloat16(), torch.zeros(2, 3, dtype=torch.uint8)):
        assert digest(tensor) == check.digest(tensor)


# -- language models


def small_model(kind, **more):
    import transformers

    names = {
        "llama": ("LlamaConfig", "LlamaForCausalLM"),
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM"),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM"),
        "gemma": ("GemmaConfig", "GemmaForCausalLM"),
        "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
        "gemma3_text": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        "mistral": ("MistralConfig", "MistralForCausalLM"),
    }
    if kind in ("gemma2", "gemma3_text"):
        more = {"query_pre_attn_scalar": 16, **more}
    config = getattr(transformers, names[kind][0])(
        vocab_size=270,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(0)
    made = getattr(transformers, names[kind][1])(config)
    for name, parameter in made.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("kind", ARCHITECTURES)
@pytest.mark.parametrize("kinds", [["linear"], ["linear", "embedding"]])
def test_a_language_model_that_is_read_again(tmp_path, kind, kinds):
    """Every block and every number is where it was, in the order and under the names of llama.cpp."""
    part = part_of(small_model(kind), "model", tokenizer=merging_tokenizer(True), layer_kinds=kinds)
    write(part, tmp_path)
    check_header(tmp_path / FILE)
    found = names_in(tmp_path / FILE)
    assert {"token_embd.weight", "blk.0.attn_q.weight", "blk.1.ffn_down.weight", "output_norm.weight"} <= set(found)
    again = small_model(kind).eval().requires_grad_(False)
    load_language_model("checkpoint=x", tmp_path / FILE, again, "float32")
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        ours, theirs = part.module(ids).logits, again(ids).logits
    assert torch.allclose(ours, theirs, atol=2e-5 * float(ours.abs().max()))
    if kind in ("llama", "qwen2", "qwen3", "mistral"):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("scaling", [
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 64, "rope_theta": 10000.0},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0},
])  # fmt: skip
def test_rotary_embeddings_that_are_scaled(tmp_path, scaling):
    part = part_of(small_model("llama", rope_parameters=scaling), "model", tokenizer=merging_tokenizer(False))
    write(part, tmp_path)
    reader = gguf.GGUFReader(tmp_path / FILE)
    if scaling["rope_type"] == "llama3":
        factors = next(t.data for t in reader.tensors if t.name == "rope_freqs.weight")
        plain = 1.0 / (10000.0 ** (torch.arange(0, 16, 2) / 16))
        wanted = part.module.model.rotary_emb.inv_freq
        assert torch.allclose(plain / torch.tensor(factors), wanted)
    else:
        assert reader.get_field("llama.rope.scaling.factor").contents() == 2.0


def test_what_llama_cpp_has_no_names_for(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    part = part_of(GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=259)), "model")
    with pytest.raises(
        ConfigError, match=r"export\.path: llama\.cpp's names are known here for llama, .*, not for gpt2"
    ):
        write(part, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_scale_of_queries_that_llama_cpp_has_not(tmp_path):
    part = part_of(small_model("gemma3_text", query_pre_attn_scalar=256), "model")
    with pytest.raises(ConfigError, match="query_pre_attn_scalar=256: llama.cpp divides queries by the root of 16"):
        write(part, tmp_path)


def test_transformers_reads_the_same_weights(tmp_path):
    from transformers import AutoModelForCausalLM

    part = part_of(small_model("llama"), "model", tokenizer=merging_tokenizer(True))
    written = write(part, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=FILE, dtype=torch.float32)
    assert check.digests(loaded) == dict(written.state)


@pytest.mark.parametrize(
    ("pre", "told"),
    [
        ({"type": "ByteLevel"}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]},
         "smollm"),
        ({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s]+"}},
            {"type": "ByteLevel"}]}, "llama-bpe"),
        ({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s]+"}},
            {"type": "ByteLevel"}]}, "qwen2"),
    ],
)  # fmt: skip
def test_how_a_text_is_cut_before_it_is_merged(pre, told):
    assert pre_tokenizer({"pre_tokenizer": pre}) == told


def test_a_cut_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="how llama.cpp calls a pre-tokenizer of Whitespace"):
        pre_tokenizer({"pre_tokenizer": {"type": "Whitespace"}})


# -- llama.cpp itself

NEEDS_LLAMA_CPP = pytest.mark.skipif(
    library() is None, reason="llama.cpp is not installed: pip install xllamacpp (34 MB)"
)


def perplexity_of(module, windows):
    """llama.cpp's, of the windows that it had: the second half of each is scored."""
    nll, count = 0.0, 0
    for window in windows:
        with torch.no_grad():
            logits = module(torch.tensor(window)[None]).logits[0].double().log_softmax(-1)
        half = len(window) // 2
        scored = range(half, len(window) - 1)
        nll -= sum(float(logits[k, window[k + 1]]) for k in scored)
        count += len(scored)
    return float(torch.tensor(nll / count).exp())


@NEEDS_LLAMA_CPP
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "gemma", "mistral"])
def test_llama_cpp_computes_the_same_model(tmp_path, kind):
    part = part_of(small_model(kind), "model", tokenizer=merging_tokenizer(True), layer_kinds=["linear", "embedding"])
    write(part, tmp_path)
    (tmp_path / "text.txt").write_text(TEXT[:2100])
    theirs = of_llama_cpp(tmp_path / FILE, tmp_path / "text.txt")
    assert theirs["ppl"] == pytest.approx(perplexity_of(part.module, theirs["windows"]), rel=5e-3)


def test_a_run_of_quantlab_reads_what_quantlab_wrote(tmp_path):
    """Bytes, formats and errors of the file are those that were exported."""
    from quantlab.stages.foreign import load_candidate

    model = load_llama(save_llama(tmp_path / "llama", hidden_size=64, intermediate_size=128), tmp_path)
    part = part_of(model.components["model"], "model", tokenizer=model.parts["tokenizer"])
    (tmp_path / "out").mkdir()
    write(part, tmp_path / "out")
    found = load_candidate(str(tmp_path / "out" / FILE), model, ["model"], {}, tmp_path).quantization
    ours = {row.name: row for row in part.layers if row.status == "quantized"}
    theirs = {row.name: row for row in found.layers if row.status == "quantized"}
    assert set(theirs) == set(ours)
    for name, row in ours.items():
        assert (row.dtype, row.weight_bytes, row.weight_rel_error) == (
            theirs[name].dtype, theirs[name].weight_bytes, theirs[name].weight_rel_error,
        )  # fmt: skip


def test_pieces_are_joined_in_their_order():
    part = part_of(sd3().transformer)
    tensors = stored_tensors(part.module)
    pieces = published_names("SD3Transformer2DModel", tensors, {})
    joined = _joined(pieces["joint_blocks.0.x_block.attn.qkv.weight"], tensors)
    wanted = [tensors[f"transformer_blocks.0.attn.to_{n}.weight"].rows for n in "qkv"]
    assert torch.equal(joined.rows, torch.cat(wanted))
