"""Checkpoints that other libraries made, read back from their tensors; and those that cannot be believed."""

from __future__ import annotations

import json
import re
import shutil
import struct

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlab.backends import checkpoints
from quantlab.backends.gguf.blocks import linear_class
from quantlab.backends.others import packed_integers
from quantlab.errors import ConfigError, MissingPackage, ModelError, NotQuantized
from quantlab.models import diffusers_pipeline
from quantlab.models.foreign import also_quantized, sources_of
from quantlab.modules.packed import stored_at
from quantlab.stages import foreign as stage
from quantlab.stages.foreign import load_candidate
from quantlab.vocabulary.dtypes import UNREAD
from quantlab.vocabulary.schema import ModelConfig
from tests.support.foreign import LANGUAGE, TRANSFORMERS
from tests.support.tiny_text_models import load_llama, save_llama

SAID = {
    "bnb_nf4": ("nf4", 64, 4.75, 0.12),
    "bnb_int8": ("int8", None, 8.7, 0.01),
    "torchao_int8": ("int8", None, 8.7, 0.01),
    "modelopt_int8": ("int8", None, 32.6, 0.01),
    "q8_0.gguf": ("q8_0", 32, 8.5, 0.01),
    "flux_torchao": ("int8", None, 10.5, 0.01),
    "flux_quanto": ("int8", None, 10.1, 0.01),
    "flux_modelopt": ("int8", None, 34, 0.01),
}
"""Checkpoint -> dtype and group size, and at most so many bits a weight and so large an error."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def llama(foreign, cache):
    return load_llama(foreign / "llama", cache)


@pytest.fixture(scope="module")
def flux(foreign, cache):
    return diffusers_pipeline.load(ModelConfig(family="diffusers", path=str(foreign / "flux")), "cpu", cache)


@pytest.fixture
def read(llama, cache):
    return lambda path, model=llama: load_candidate(str(path), model, list(model.components), {}, cache)


def check(found, name):
    dtype, group_size, bits, error = SAID[name]
    done = [row for row in found.quantization.layers if row.status == "quantized" and not row.shares]
    linear = [row for row in done if row.kind == "linear"]
    assert len(linear) >= 14
    assert {(row.dtype, row.group_size) for row in done} == {(dtype, group_size)}
    assert max(row.bits_per_weight for row in done) <= bits
    assert 0 < max(row.weight_rel_error for row in done) < error
    assert all(row.product_rel_error < 0.02 for row in linear)
    assert {row.is_simulated for row in done} == {"modelopt" in name}
    assert found.disk_bytes > 0
    return done


@pytest.fixture
def made(foreign, request):
    """The path of a checkpoint, by name."""
    return lambda name: (request.getfixturevalue("foreign_modelopt") if "modelopt" in name else foreign) / name


def each(names):
    return [pytest.param(name, marks=pytest.mark.slow) if "modelopt" in name else name for name in names]


@pytest.mark.parametrize("name", each(LANGUAGE))
def test_a_language_model(made, read, name):
    found = read(made(name))
    done = check(found, name)
    kept = {row.name: row for row in found.quantization.layers if row.status in ("left", "excluded")}
    if name.endswith("gguf"):
        assert {row.kind for row in done} == {"linear", "embedding"}
        assert not kept
    else:
        assert set(kept) == {"model.embed_tokens", "lm_head"}
        assert {row.dtype for row in kept.values()} == {"float32"}
    assert found.depends_on_neighbours is (name == "bnb_int8")
    methods = {"bnb": "bitsandbytes", "q8": "gguf"}
    assert found.quantization.resolved["checkpoint_method"] == methods.get(name.split("_")[0], name.split("_")[0])


@pytest.mark.parametrize("name", each(TRANSFORMERS))
def test_a_transformer_of_diffusers(made, flux, read, name):
    check(read(made(name), flux), name)


def test_the_claims_of_a_configuration_are_not_believed(foreign, read, tmp_path):
    """What it says is only which package reads it."""
    shutil.copytree(foreign / "bnb_nf4", tmp_path / "claims")
    file = tmp_path / "claims" / "config.json"
    said = json.loads(file.read_text())
    said["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    file.write_text(json.dumps(said))
    row = next(r for r in read(tmp_path / "claims").quantization.layers if r.status == "quantized")
    assert (row.dtype, row.group_size) == ("nf4", 64)


def altered(source, folder, change):
    shutil.copytree(source, folder)
    said = json.loads((folder / "config.json").read_text())
    change(said)
    (folder / "config.json").write_text(json.dumps(said))
    return folder


def test_settings_that_compute_otherwise_are_told(foreign, flux, read, tmp_path, cache):
    def otherwise(said):
        said.update(hidden_act="gelu", rope_parameters={"rope_theta": 500.0, "rope_type": "default"})
        said.update(bos_token_id=7, use_cache=False, initializer_range=0.1, attention_dropout=0.5)  # compute nothing

    found = read(altered(foreign / "bnb_nf4", tmp_path / "claims", otherwise))
    [told] = [line for line in found.quantization.unquantized if "config.json" in line]
    assert told == (
        "model: its config.json says hidden_act=gelu (the model's: silu), rope_parameters.rope_theta=500.0 (the model's: "
        "10000.0): what that changes is part of its numbers; name the model that it was made from (model.path=...)"
    )
    plain = [line for line in read(foreign / "bnb_nf4").quantization.unquantized if "config.json" in line]
    assert plain == []
    path = altered(foreign / "flux_torchao", tmp_path / "flux", lambda said: said.update(axes_dims_rope=[4, 14, 14]))
    found = load_candidate(str(path), flux, ["transformer"], {}, cache)
    assert any(
        line.startswith("transformer: its config.json says axes_dims_rope=[4, 14, 14] (the model's: [8, 12, 12]):")
        for line in found.quantization.unquantized
    )


def test_layers_that_are_not_what_their_configuration_makes_of_them(foreign, read, tmp_path):
    """4 bits are said, and the weights are whole: bitsandbytes' layers have no codes."""
    block = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path = altered(foreign / "llama", tmp_path / "whole", lambda said: said.update(quantization_config=block))
    with pytest.raises(ModelError, match=r"^checkpoint=\S+: model\.layers\.0\S+ is not stored as .*; copy or download"):
        read(path)


def test_a_whole_pipelines_folder(foreign, flux, cache, tmp_path):
    shutil.copytree(foreign / "flux", tmp_path / "flux")
    shutil.rmtree(tmp_path / "flux" / "transformer")
    shutil.copytree(foreign / "flux_torchao", tmp_path / "flux" / "transformer")
    found = load_candidate(str(tmp_path / "flux"), flux, ["transformer"], {}, cache)
    check(found, "flux_torchao")
    with pytest.raises(ModelError, match=r"the pipeline has no vaeX/config.json; choose what it has"):
        load_candidate(str(tmp_path / "flux"), flux, ["vaeX"], {}, cache)


# -- of another model


def test_another_models_checkpoint(foreign, cache, tmp_path):
    other = load_llama(save_llama(tmp_path / "other", hidden_size=64, intermediate_size=128, seed=1), cache)
    for name in ("bnb_nf4", "q8_0.gguf"):
        with pytest.raises(
            ModelError, match=r"it was not made from this model: model\.model\.\w+.*: name|; name the mo"
        ):
            load_candidate(str(foreign / name), other, ["model"], {}, cache)


def test_one_unquantized_value_that_differs(foreign, read, tmp_path):
    shutil.copytree(foreign / "torchao_int8", tmp_path / "changed")
    file = tmp_path / "changed" / "model.safetensors"
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    tensors["model.norm.weight"][5] += 0.01
    save_file(tensors, file, metadata)
    told = r"model\.model\.norm\.weight: 1 of 64 unquantized values differ from the model's; name the model"
    with pytest.raises(ModelError, match=told):
        read(tmp_path / "changed")
    tensors["model.norm.weight"][5] = torch.nan
    save_file(tensors, file, metadata)
    with pytest.raises(ModelError, match=r"model\.model\.norm\.weight holds NaN or infinities"):
        read(tmp_path / "changed")


@pytest.mark.parametrize("sizes", [{"intermediate_size": 192}, {"hidden_size": 32}])
@pytest.mark.parametrize("name", ["bnb_int8", "q8_0.gguf"])
def test_other_shapes(foreign, cache, tmp_path, sizes, name):
    other = load_llama(save_llama(tmp_path / "other", **{"hidden_size": 64, "intermediate_size": 128, **sizes}), cache)
    with pytest.raises(ModelError, match=r"name the model that it was made from"):
        load_candidate(str(foreign / name), other, ["model"], {}, cache)


def test_another_class(foreign, flux, cache):
    with pytest.raises(ModelError, match="it is a LlamaForCausalLM and the model's component a FluxTransformer2DModel"):
        load_candidate(str(foreign / "bnb_nf4"), flux, ["transformer"], {}, cache)


def test_16_bit_copies_of_unquantized_tensors_are_the_models(foreign, llama, read, tmp_path):
    """In one step and in two, of either side; and a value one step off is not."""
    own = llama.components["model"].get_parameter("model.norm.weight").detach()
    values = torch.randn(1000)
    for made in (values.half(), values.bfloat16(), values.bfloat16().half(), values.half().bfloat16()):
        assert stage._is_same(made.float(), values)
        assert stage._is_same(values, made.float())
    off = values.clone()
    off[7] *= 1 + 2**-9
    assert not stage._is_same(off, values)
    assert stage._is_same(own, own)


# -- what is not decoded


class Strange(torch.nn.Module):
    """A layer of a library that quantlab does not know: nibbles, and a row's scale."""

    def __init__(self, linear):
        super().__init__()
        self.scales = torch.nn.Parameter(linear.weight.detach().abs().amax(1, keepdim=True) / 7)
        self.qweight = torch.nn.Parameter((linear.weight.detach() / self.scales).round().to(torch.int8), False)
        self.bias = linear.bias

    def forward(self, x):
        return x @ (self.qweight * self.scales).T + (0 if self.bias is None else self.bias)


def strange(monkeypatch, model, name):
    module = model.copy_of("model")
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, Strange(module.get_submodule(name)))
    monkeypatch.setattr(stage, "load_part", lambda *_: (module, "strange"))
    return module


def test_a_layer_that_nobody_decodes_says_so(foreign, llama, read, monkeypatch):
    name = "model.layers.0.mlp.up_proj"
    strange(monkeypatch, llama, name)
    row = next(r for r in read(foreign / "bnb_nf4").quantization.layers if r.name == name)
    assert (row.dtype, row.group_size, row.status) == (UNREAD, None, "quantized")
    assert 0.03 < row.weight_rel_error < 0.2
    assert row.reason.startswith("Strange: not decoded here")
    assert row.bits_per_weight == pytest.approx(8 + 32 / 64)


def test_a_layer_that_nobody_decodes_and_does_not_run(foreign, llama, read, monkeypatch):
    name = "model.layers.0.mlp.up_proj"
    module = strange(monkeypatch, llama, name)
    module.get_submodule(name).forward = None
    row = next(r for r in read(foreign / "bnb_nf4").quantization.layers if r.name == name)
    assert row.weight_rel_error is None
    assert row.reason.endswith("its error is not known")


def test_a_layer_that_multiplies_by_something_else(foreign, llama, read, monkeypatch):
    name, module = "model.layers.0.mlp.up_proj", llama.copy_of("model")
    good = read(foreign / "q8_0.gguf").model.components["model"].get_submodule(name)

    class Doubled(linear_class()):
        def forward(self, input):
            return 2 * super().forward(input)

    module.get_submodule("model.layers.0.mlp").up_proj = Doubled(good.qweight, "q8_0", None, torch.float32)
    monkeypatch.setattr(stage, "load_part", lambda *_: (module, ""))
    with pytest.raises(NotQuantized, match=r"up_proj .* multiplies by something else than the weight"):
        read(foreign / "bnb_nf4")


# -- files that cannot be believed


def test_pickles(foreign, read, tmp_path):
    """One of tensors alone is loaded; one of anything else is not even opened by the library."""

    class Evil:
        def __reduce__(self):
            return (shutil.rmtree, (str(tmp_path / "gone"),))

    (tmp_path / "gone").mkdir()
    folder = shutil.copytree(foreign / "llama", tmp_path / "pickled")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    assert read(folder).quantization.coverage == 0
    torch.save({**tensors, "x": Evil()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is a pickle that holds more than tensors"):
        read(folder)
    assert (tmp_path / "gone").is_dir()


def test_code_of_its_own_is_not_run(foreign, read, tmp_path):
    folder = shutil.copytree(foreign / "bnb_nf4", tmp_path / "code")
    (folder / "evil.py").write_text("raise SystemExit('ran')\n")
    said = json.loads((folder / "config.json").read_text())
    said |= {"architectures": ["EvilForCausalLM"], "auto_map": {"AutoModelForCausalLM": "evil.EvilForCausalLM"}}
    (folder / "config.json").write_text(json.dumps(said))
    with pytest.raises(ModelError, match="remote code: not run, by policy"):
        read(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "auto-round", "sdnq", "nunchaku"])
def test_a_package_that_is_not_there_is_named(foreign, read, tmp_path, method, monkeypatch):
    package, install = checkpoints.PACKAGES[method]
    monkeypatch.setitem(checkpoints.PACKAGES, method, (f"{package}_absent", install))
    folder = shutil.copytree(foreign / "llama", tmp_path / "absent")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": {"quant_method": method}}))
    assert ("github.com" in install) == (method == "nunchaku")  # PyPI's package of that name is another project
    told = rf"checkpoint=.*: quant_method={method}: the package .* is not installed; pip install '{re.escape(install)}'"
    with pytest.raises(MissingPackage, match=told):
        read(folder)


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ({"quant_method": 7}, "names no quant_method"),
        ({}, "names no quant_method"),
        ("int8", "a mapping is wanted"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": "maybe"}, "it cannot be loaded"),
    ],
)
def test_blocks_that_say_nothing(foreign, read, tmp_path, block, told):
    folder = shutil.copytree(foreign / "llama", tmp_path / "said")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": block}))
    with pytest.raises(ConfigError, match=told):
        read(folder)


def test_a_method_that_no_library_knows_is_what_its_tensors_are(foreign, read, tmp_path):
    folder = shutil.copytree(foreign / "llama", tmp_path / "said")
    said = json.loads((folder / "config.json").read_text())
    block = {"quant_method": "unheard_of"}
    (folder / "config.json").write_text(json.dumps({**said, "quantization_config": block}))
    found = read(folder)
    assert found.quantization.coverage == 0
    assert found.quantization.resolved["checkpoint_method"] == "unheard_of"


@pytest.mark.parametrize("cut", [4, 200, -10])
def test_a_safetensors_file_that_ends_early(foreign, read, tmp_path, cut):
    folder = shutil.copytree(foreign / "torchao_int8", tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(ModelError, match=r"model\.safetensors is damaged or cut off .*; copy or download it again"):
        read(folder)


@pytest.mark.parametrize(
    ("made", "told"),
    [
        ("nothing", "there is no such file or folder"),
        ("empty/", r"the folder has neither config\.json nor model_index\.json"),
        ("weights.safetensors", r"a single \.safetensors says neither its format nor its model"),
        ("model.bin", r"a single \.bin says neither"),
        ("two/", r"it holds a\.gguf, b\.gguf: name one"),
    ],
)
def test_what_is_no_checkpoint(read, tmp_path, made, told):
    path = tmp_path / made
    if made.endswith("/"):
        path.mkdir()
    elif made != "nothing":
        path.write_bytes(b"x")
    if made == "two/":
        for name in "ab":
            (path / f"{name}.gguf").write_bytes(b"x")
    with pytest.raises(ModelError, match=told):
        read(path)


# -- GGUF files that lie


def tensor_at(data, name):
    """Where the entry of a tensor is: its number of dimensions, after its name."""
    found = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    assert struct.unpack_from("<I", data, found)[0] == 2
    return found


@pytest.mark.parametrize(
    ("at", "value", "told"),
    [
        (4, 32, r"blk\.0\.ffn_up\.weight has shape \[128, 32\]"),
        (4, 2**40, "does not lie in the file"),
        (4, 63, "rows of 63 values, in blocks of 32"),
        (12, 64, r"has shape \[64, 64\]"),
        (24, 0, "begins in the one before it"),
        (24, 2**50, "does not lie in the file"),
        (24, 3, "does not lie in the file"),
    ],
)
def test_a_header_that_lies_about_shapes_and_offsets(foreign, read, tmp_path, at, value, told):
    data = bytearray((foreign / "q8_0.gguf").read_bytes())
    struct.pack_into("<Q", data, tensor_at(bytes(data), b"blk.0.ffn_up.weight") + at, value)
    file = tmp_path / "lies.gguf"
    file.write_bytes(data)
    with pytest.raises(ModelError, match=told):
        read(file)


def test_a_gguf_file_of_another_architecture_or_with_more_tensors(foreign, read, tmp_path):
    for made, told in (
        (_other_architecture, "its architecture is qwen2 and the model's llama"),
        (_more, "no place for"),
    ):
        made(tmp_path / "x.gguf")
        with pytest.raises(ModelError, match=told):
            read(tmp_path / "x.gguf")


def _other_architecture(file):
    _write(file, "qwen2", [])


def _more(file):
    _write(file, "llama", ["blk.7.attn_q.weight"])


def _write(file, architecture, names):
    writer = gguf.GGUFWriter(file, architecture)
    for name in names:
        writer.add_tensor(name, torch.zeros(4, 32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_the_blocks_of_a_file_stay_as_they_are(foreign, read):
    """Bytes of a layer are the file's (rows of queries in the model's order); a tied or read weight is no dense copy."""
    module = read(foreign / "q8_0.gguf").model.components["model"]
    file = {t.name: t.data for t in gguf.GGUFReader(foreign / "q8_0.gguf").tensors}
    up = module.get_submodule("model.layers.1.mlp.up_proj")
    assert (up.qweight.numpy() == file["blk.1.ffn_up.weight"]).all()
    query = module.get_submodule("model.layers.1.self_attn.q_proj").qweight.numpy()
    assert not (query == file["blk.1.attn_q.weight"]).all()
    assert sorted(map(bytes, query)) == sorted(map(bytes, file["blk.1.attn_q.weight"]))
    table = module.get_submodule(stored_at(module, "model.embed_tokens"))
    assert (table.qweight.numpy() == file["token_embd.weight"]).all()


@pytest.mark.parametrize(
    ("words", "scales", "wanted"),
    [
        ((4, 64), (1, 64), ("int4", None)),
        ((8, 64), (1, 64), ("int8", None)),
        ((4, 64), (2, 64), ("int4", 16)),
        ((3, 64), (2, 64), ("int3", 16)),
        ((4, 64), (3, 64), None),
        ((5, 60), (1, 64), None),
    ],
)
def test_integers_packed_into_words_are_counted(words, scales, wanted):
    """Of 64 outputs and 32 inputs: bits by the words, groups by the scales; what does not come out even is not known."""
    layer = torch.nn.Module()
    layer.qweight, layer.scales = torch.zeros(words, dtype=torch.int32), torch.ones(scales)
    assert packed_integers(layer, 64, 64 * 32) == wanted
    assert packed_integers(torch.nn.Linear(32, 64), 64, 64 * 32) is None


def test_what_a_pipeline_has_quantized_besides_is_told(tmp_path):
    """Only the chosen components are its; the reference's stand in the place of the others."""
    for name, said in (
        ("unet", {"quantization_config": {"quant_method": "torchao"}}),
        ("vae", {}),
        ("text_encoder", {}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **said}))
    (tmp_path / "text_encoder" / "model.gguf").touch()
    (tmp_path / "model_index.json").write_text("{}")
    classes = dict.fromkeys(("unet", "text_encoder", "vae"), "UNet2DConditionModel")
    sources = sources_of(str(tmp_path), ["unet"], classes)
    assert also_quantized("checkpoint=x", sources) == ["text_encoder"]
    sources = sources_of(str(tmp_path), ["unet", "text_encoder"], classes)
    assert also_quantized("checkpoint=x", sources) == []
    assert sources["text_encoder"].name == "model.gguf"
    assert also_quantized("checkpoint=x", {"text_encoder": sources["text_encoder"]}) == ["unet"]
    assert sources_of(str(tmp_path / "text_encoder"), ["unet"], classes) == {
        "unet": tmp_path / "text_encoder" / "model.gguf"
    }
