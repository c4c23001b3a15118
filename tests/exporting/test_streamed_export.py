"""An export whose candidate is made from the model's files, layer by layer: the same files as beside the whole model."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json

import pytest
import torch
from gguf import GGUFReader

from quantlab.backends.torchao.storage import flattened
from quantlab.errors import ConfigError
from quantlab.models.exported import DIGESTS, MANIFEST
from quantlab.models.reading import HOLLOW
from quantlab.models.table import family_of
from quantlab.running import winner
from quantlab.vocabulary.schema import ModelConfig
from tests.exporting.test_export import OTHER, TEXT, in_process, language_words  # noqa: F401
from tests.support.copies import quantized
from tests.support.shell import make_shell
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import save_bert, save_llama

SCHEMES = [("bitsandbytes", "nf4"), ("torchao", "int8"), ("quanto", "int8"), ("modelopt", "int8"), ("gguf", "q8_0")]


def digests(folder):
    """Name -> sha256 of each file; of safetensors the metadata in order, which the library writes in any, and so without
    the manifest's own digests."""
    found = {}
    for file in sorted(file for file in folder.rglob("*") if file.is_file()):
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            end = 8 + int.from_bytes(data[:8], "little")
            data = json.dumps(json.loads(data[8:end]), sort_keys=True).encode() + data[end:]
        if file.name == MANIFEST:
            data = json.dumps({key: said for key, said in json.loads(data).items() if key != DIGESTS}).encode()
        found[str(file.relative_to(folder))] = hashlib.sha256(data).hexdigest()
    return found


@contextlib.contextmanager
def refusing(monkeypatch, name, error):
    def refuse(*_):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(winner, name, refuse)
        yield


def both_ways(shell, monkeypatch, run_id):
    """The files of a run's export, made from its files, and beside the whole model."""
    with refusing(monkeypatch, "workbench", AssertionError("the whole model")):
        code, _, err = shell("export", run_id, "streamed", "-q")
        assert code == 0, err
    with refusing(monkeypatch, "hollow", ConfigError("model.path: not from files")):
        code, _, err = shell("export", run_id, "whole", "-q")
        assert code == 0, err
    return digests(shell.folder / "streamed"), digests(shell.folder / "whole")


@pytest.fixture(scope="module")
def measured(template, trained, tmp_path_factory):
    """A shell with a run of each backend on one tiny Llama; backend -> the run's id."""
    shell = make_shell(tmp_path_factory.mktemp("measured"), template, trained)
    listed = ",".join(f"{{backend:{backend},dtype:{dtype}}}" for backend, dtype in SCHEMES)
    shell.rows("-m", *language_words(shell.folder, f"sweep.candidates=[{listed}]"))
    runs = shell.tracked()
    return shell, {backend: runs[f"{backend} {dtype}"]["run_id"] for backend, dtype in SCHEMES}


@pytest.mark.slow
@pytest.mark.parametrize("backend", [backend for backend, _ in SCHEMES if backend != "quanto"])
def test_a_language_models_files_are_the_same(measured, monkeypatch, in_process, backend):  # noqa: F811
    shell, runs = measured
    streamed, whole = both_ways(shell, monkeypatch, runs[backend])
    assert streamed == whole
    assert any(name.endswith((".safetensors", ".gguf")) for name in whole)


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param(scheme, marks=[] if scheme[0] == "gguf" else pytest.mark.slow, id=scheme[0])
        for scheme in SCHEMES
        if scheme[0] != "quanto"  # transformers loads none
    ],
)
def test_a_tied_head_is_the_embedding(shell, in_process, scheme):  # noqa: F811
    """Of a model without values every tensor lay at address 0, and the head was taken for the first of them."""
    save_llama(shell.folder / "llama", hidden_size=64, intermediate_size=128, tie_word_embeddings=True)
    (shell.folder / "text.txt").write_text(TEXT)
    (shell.folder / "other.txt").write_text(OTHER)
    backend, dtype = scheme
    rows = shell.rows(*language_words(shell.folder, f"backend={backend}", f"dtype={dtype}", "sweep.floors=false"))
    assert rows[f"{backend} {dtype}"]["status"] == "FINISHED"
    code, _, err = shell("export", "latest", "out", "-q")
    assert code == 0, err
    assert "output.weight" not in _gguf_names(shell.folder / "out")


def _gguf_names(folder):
    return [t.name for file in folder.rglob("*.gguf") for t in GGUFReader(file).tensors]


@pytest.mark.slow
def test_a_pipelines_files_are_the_same(shell, monkeypatch, in_process):  # noqa: F811
    BUILDERS["flux"](shell.folder / "flux")
    (shell.folder / "prompts.txt").write_text("a red fox\nthe blue cat\n")
    words = ["model=diffusers", f"model.path={shell.folder / 'flux'}", "dataset.path=prompts.txt", "device=cpu"]
    sizes = [f"evaluation.{key}" for key in ("num_samples=2", "num_inference_steps=2", "height=32", "width=32")]
    more = ["evaluation.num_teacher_forced=1", "sweep.floors=false", "evaluation.num_bootstrap=50"]
    everything = ["model.components=[transformer]", "quantization.replace_default_exclusions=true"]
    rows = shell.rows(*words, *sizes, *more, "backend=quanto", "dtype=int8", *everything)
    assert rows["quanto int8"]["status"] == "FINISHED"
    streamed, whole = both_ways(shell, monkeypatch, shell.tracked()["quanto int8"]["run_id"])
    assert streamed == whole
    assert any(name.startswith("vae/") for name in whole)


@pytest.mark.parametrize(("family", "save"), [("causal_lm", save_llama), ("encoder", save_bert)])
def test_a_model_without_values_is_the_same_model(tmp_path, family, save):
    """Its digest is that of the weights, tensor by tensor from the files; nothing has values."""
    config = ModelConfig(family=family, path=str(save(tmp_path / "model")), dtype="bfloat16")
    load = family_of(config).load
    hollow, whole = load(config, HOLLOW, tmp_path / "one", None), load(config, "cpu", tmp_path / "two", None)
    assert {p.device.type for p in hollow.components["model"].parameters()} == {"meta"}
    assert hollow.weights_sha256 == whole.weights_sha256
    assert (hollow.dtype, hollow.default_exclusions) == (whole.dtype, whole.default_exclusions)
    assert all(isinstance(p, torch.Tensor) for p in whole.components["model"].parameters())


def test_torchaos_flattening_without_its_copies():
    """Tensors and metadata are the library's; what lies alone in memory is not copied, what shares memory is."""
    support = importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    module = torch.nn.ModuleDict(
        {"a": torch.nn.Linear(64, 32), "b": torch.nn.Linear(64, 32), "c": torch.nn.LayerNorm(8)}
    )
    made, _ = quantized(module, "torchao", "int8")
    state = made.state_dict()
    state["tied.weight"] = state["a.weight"]
    wanted, told = support.flatten_tensor_state_dict(state)
    found, said = flattened(state, "diffusers")
    assert said == told
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    codes = {name: tensor.data_ptr() for name, tensor in found.items() if name.endswith("_qdata")}
    assert codes["b._weight_qdata"] == made["b"].weight.qdata.data_ptr()
    assert len(set(codes.values())) == len(codes) == 3


@pytest.mark.parametrize("library", ["transformers", "diffusers"])
def test_a_tensor_of_the_model_itself_does_not_keep_a_loader_from_the_others(library):
    """Marian's final_logits_bias: torchao reads back no listed name without a dot, and transformers hands it all; to
    Diffusers, what is not listed is not there."""
    support = importlib.import_module("torchao.prototype.safetensors.safetensors_support")
    made, _ = quantized(torch.nn.ModuleDict({"a": torch.nn.Linear(64, 32)}), "torchao", "int8")
    state = {"final_logits_bias": torch.zeros(1, 8), **made.state_dict()}
    found, said = flattened(state, library)
    assert torch.equal(found["final_logits_bias"], state["final_logits_bias"])
    assert ("final_logits_bias" in json.loads(said["tensor_names"])) == (library == "diffusers")
    if library == "transformers":
        codes = {name: tensor for name, tensor in found.items() if name.startswith("a._weight_")}
        again, left = support.unflatten_tensor_state_dict(codes, said)
        assert not left
        assert torch.equal(again["a.weight"].qdata, made["a"].weight.qdata)
