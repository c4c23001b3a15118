"""Files of weights whose headers lie, and indices that lead elsewhere: one message that begins with the key."""

from __future__ import annotations

import json
import re
import shutil
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantlab
from quantlab.errors import ModelError
from quantlab.models import causal_lm, diffusers_pipeline, reading
from quantlab.models.architectures import Architecture, Part, read_architecture
from quantlab.models.foreign import _check_files, load_part
from quantlab.models.outline import build
from quantlab.modules.source import shards_of
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiny_pipelines import build_tiny_flux
from tests.support.tiny_text_models import save_llama

FLOATS = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LIES = {
    "cut off in the header": lambda whole: whole[:40],
    "cut off before it": lambda whole: whole[:4],
    "cut off in the tensors": lambda whole: whole[:-1],
    "nothing": lambda whole: b"",
    "a header of 2^60 bytes": lambda whole: struct.pack("<Q", 2**60) + whole[8:],
    "a header that is longer than the file": lambda whole: struct.pack("<Q", 10**6) + whole[8:],
    "a header that ends early": lambda whole: struct.pack("<Q", 20) + whole[8:],
    "a dtype that is not there": lambda whole: made({"a": {**FLOATS, "dtype": "F7"}}),
    "one in another": lambda whole: made({"a": FLOATS, "b": {**FLOATS, "data_offsets": [8, 24]}}, 24),
    "a hole": lambda whole: made({"a": FLOATS, "b": {**FLOATS, "data_offsets": [32, 48]}}, 48),
    "offsets past the end": lambda whole: made({"a": {**FLOATS, "data_offsets": [0, 2**62]}}),
    "offsets that go back": lambda whole: made({"a": {**FLOATS, "data_offsets": [16, 0]}}),
    "more values than bytes": lambda whole: made({"a": {**FLOATS, "shape": [2**31, 2**31]}}),
    "a negative size": lambda whole: made({"a": {**FLOATS, "shape": [-2, -2]}}),
    "no JSON": lambda whole: struct.pack("<Q", 8) + b"\xff" * 24,
    "lists without end": lambda whole: struct.pack("<Q", 10**5) + b"[" * 10**5,
}
ELSEWHERE = ("../other.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\..\\b.safetensors", 7, None)


def made(header, num_bytes=16):
    said = json.dumps(header).encode()
    return struct.pack("<Q", len(said)) + said + b"\0" * num_bytes


def refused(call, *keys):
    with pytest.raises(ModelError) as error:
        call()
    text = str(error.value)
    assert text.startswith(keys), text
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("damaged") / "llama")


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies(tmp_path, lie):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 2)}, file)
    file.write_bytes(LIES[lie](file.read_bytes()))
    for call in (lambda: _check_files("checkpoint=x", tmp_path), lambda: shards_of("checkpoint=x", tmp_path)):
        told = refused(call, "checkpoint=x: ")
        assert "model.safetensors is damaged or cut off" in told
        assert told.endswith("copy or download it again")


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_that_leads_elsewhere(llama, tmp_path, name):
    """Not read, neither as a model nor as a checkpoint: its digest would not know of that file."""
    tensors = load_file(llama / "model.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    for kept in llama.glob("*.json"):
        (folder / kept.name).write_text(kept.read_text())
    save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
    save_file(tensors, folder / "model-00001-of-00002.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": {**dict.fromkeys(tensors, "model-00001-of-00002.safetensors")}}
    index["weight_map"]["lm_head.weight"] = name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    path = str(folder)
    for call in (
        lambda: causal_lm.load(ModelConfig(family="causal_lm", path=path), "cpu", tmp_path),
        lambda: _check_files(f"model.path={path}", folder),
        lambda: shards_of(f"model.path={path}", folder),
    ):
        assert "which is no file beside it" in refused(call, f"model.path={path}: ")


@pytest.mark.parametrize(
    "index", ["[]", "{}", '{"weight_map": 3}', "{", "[" * 10**5, '{"weight_map": {"a": "no.safetensors"}}']
)
def test_an_index_that_is_none(llama, tmp_path, index):
    folder = tmp_path / "model"
    folder.mkdir()
    for kept in llama.glob("*.json"):
        (folder / kept.name).write_text(kept.read_text())
    (folder / "model.safetensors.index.json").write_text(index)
    path = str(folder)
    refused(lambda: causal_lm.load(ModelConfig(family="causal_lm", path=path), "cpu", tmp_path), f"model.path={path}: ")


def test_an_index_of_a_pipelines_part_that_leads_elsewhere(tmp_path):
    folder = build_tiny_flux(tmp_path / "flux")
    index = folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../../other.safetensors"}}))
    config = ModelConfig(family="diffusers", path=str(folder))
    told = refused(lambda: diffusers_pipeline.load(config, "cpu", tmp_path), f"model.path={folder}: ")
    assert "transformer" in told
    assert "which is no file beside it" in told


class RunsCode:
    def __reduce__(self):
        return (open, ("was_run", "w"))


def pickled(folder, name):
    for file in folder.glob("*.safetensors"):
        file.unlink()
    torch.save({"a": RunsCode()}, folder / name)
    return folder


def test_a_pickle_that_runs_code_is_refused_in_words(llama, tmp_path, monkeypatch):
    """torch's own words tell how to load it nevertheless."""
    monkeypatch.chdir(tmp_path)
    folder = pickled(shutil.copytree(llama, tmp_path / "llama"), "pytorch_model.bin")
    config, told = ModelConfig(family="causal_lm", path=str(folder)), "name a checkpoint in safetensors"
    assert told in refused(lambda: causal_lm.load(config, "cpu", tmp_path / "cache"), f"model.path={folder}: ")
    assert told in refused(lambda: quantlab.load(folder), f"path={folder}: ")
    pipeline = build_tiny_flux(tmp_path / "flux")
    pickled(pipeline / "text_encoder", "pytorch_model.bin")
    config = ModelConfig(family="diffusers", path=str(pipeline))
    assert told in refused(lambda: diffusers_pipeline.load(config, "cpu", tmp_path / "cache"), f"model.path={pipeline}")
    assert told in refused(lambda: quantlab.load(pipeline), f"path={pipeline}: ")
    model = causal_lm.load(ModelConfig(family="causal_lm", path=str(llama)), "cpu", tmp_path / "cache")
    key, theirs = "checkpoint=theirs", shutil.copytree(llama, tmp_path / "theirs")
    torch.save({"modelopt_state_dict": [("quantize", RunsCode())]}, theirs / "modelopt_state.pth")
    assert told in refused(lambda: load_part(key, theirs, "model", model), key)
    assert told in refused(lambda: quantlab.load(theirs), f"path={theirs}: ")
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("num_hidden_layers", 10**9, "num_hidden_layers=1000000000"),
        ("num_labels", 10**9, "num_labels=1000000000, and no model has more than 1000000 labels"),
        *(
            (field, said, f"{field}={told}, which is code of another package or of the Hub")
            for field in ("attn_implementation", "_attn_implementation")
            for said, told in (("other/kernel", "other/kernel"), ({"": "other/kernel@v1:f"}, "other/kernel@v1:f"))
        ),
        ("attn_implementation", "flash_attention_2", "attn_implementation=flash_attention_2"),
        ("text_config", {"attn_implementation": "a/b"}, "config.*attn_implementation=a/b"),
        ("experts_implementation", "sonicmoe", "experts_implementation=sonicmoe"),
        ("num_attention_heads", 0, "cannot be (loaded|built)"),
        ("head_dim", -1, "cannot be (loaded|built)"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_at_once(llama, tmp_path, field, value, told):
    folder = shutil.copytree(llama, tmp_path / "llama")
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, field: value}))
    config = ModelConfig(family="causal_lm", path=str(folder))
    for call in (lambda: causal_lm.load(config, "cpu", tmp_path / "cache"), lambda: built(config)):
        assert re.search(told, refused(call, f"model.path={folder}"))
    with pytest.raises(ModelError, match=f"^path=.*{told}"):
        quantlab.load(folder)


def test_no_file_chooses_kernels_for_a_pipelines_part(tmp_path, monkeypatch):
    folder = build_tiny_flux(tmp_path / "flux")
    said = json.loads((folder / "text_encoder" / "config.json").read_text())
    (folder / "text_encoder" / "config.json").write_text(json.dumps({**said, "attn_implementation": "other/kernel"}))
    config, told = ModelConfig(family="diffusers", path=str(folder)), "attn_implementation=other/kernel"
    for call in (lambda: diffusers_pipeline.load(config, "cpu", tmp_path / "cache"), lambda: built(config, "")):
        assert told in refused(call, f"model.path={folder}")
    assert told in refused(lambda: quantlab.load(folder), f"path={folder}")


SMALL = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "embedding_size": 8, "vocab_size": 9}
ENDLESS = {
    "experts": ("SwitchTransformersModel", {"d_model": 8, "d_ff": 8, "d_kv": 8, "num_heads": 1, "num_experts": 10**8}),
    "groups": ("AlbertModel", {**SMALL, "inner_group_num": 10**8}),
    "layers of layers": ("SwinModel", {"depths": [9999] * 99, "num_heads": [1] * 99, "embed_dim": 8}),
    "blocks": ("UNet2DConditionModel", {"layers_per_block": 9999}),
}


@pytest.mark.parametrize("way", ENDLESS)
def test_settings_that_multiply_without_end(monkeypatch, way):
    monkeypatch.setattr(reading, "_MOST_PARTS", 2000)
    kind, config = ENDLESS[way]
    made = Architecture(path="x", parts={"model": Part(class_name=kind, config=config)})
    told = refused(lambda: build("model.path=x", made, "float32"), "model.path=x (model): ")
    assert "its settings make more than 2000 modules and parameters" in told


def test_a_model_of_so_many_parts_is_not_loaded_either(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_MOST_PARTS", 10)
    config = ModelConfig(family="causal_lm", path=str(llama))
    told = "its settings make more than 10 modules and parameters"
    assert told in refused(lambda: causal_lm.load(config, "cpu", tmp_path), f"model.path={llama}: ")
    assert told in refused(lambda: quantlab.load(llama), f"path={llama}: ")


def test_positions_without_end_take_no_memory():
    config = {**SMALL, "num_hidden_layers": 1, "max_position_embeddings": 10**14}
    made = Architecture(path="x", parts={"model": Part(class_name="BertModel", config=config)})
    assert len(build("model.path=x", made, "float32")["model"].embeddings.position_embeddings.weight) == 10**14


def built(config, only="model"):
    """What a plan does."""
    return build(f"model.path={config.path}", read_architecture(config, only), "float32")


def test_a_part_of_endless_layers(tmp_path):
    folder = build_tiny_flux(tmp_path / "flux")
    file = folder / "transformer" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_single_layers": 10**9}))
    config = ModelConfig(family="diffusers", path=str(folder))
    told = "says num_single_layers=1000000000, and no model has more than 10000 layers"
    for call in (lambda: diffusers_pipeline.load(config, "cpu", tmp_path / "c"), lambda: built(config, "")):
        assert told in refused(call, f"model.path={folder}")


def test_what_an_installed_package_computes_may_stand_in_a_file(monkeypatch):
    said = {"_attn_implementation": "flash_attention_2", "text_config": {"attn_implementation": "sdpa"}}
    monkeypatch.setattr(reading.importlib.util, "find_spec", lambda name: name == "flash_attn" or None)
    reading.check_settings("model.path=x", "config.json", said)
    with pytest.raises(ModelError, match="attn_implementation=flash_attention_3"):
        reading.check_settings("model.path=x", "config.json", {"attn_implementation": "flash_attention_3"})
