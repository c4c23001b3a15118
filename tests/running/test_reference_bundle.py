"""A reference that was made elsewhere: the same numbers, checked before it is believed, and named in the row."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantlab
from quantlab import cli
from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError
from quantlab.models.beforehand import differing, stored_configs
from quantlab.models.diffusers_pipeline import load
from quantlab.modules.kept import read_json, read_tree, write_json, write_tree
from quantlab.planning.plan import plan
from quantlab.running.dry_run import show_jobs
from quantlab.stages import bundle
from quantlab.vocabulary.files import sha256_of
from quantlab.vocabulary.schema import ModelConfig
from tests.support.tiny_pipelines import BUILDERS
from tests.support.tiny_text_models import TEXT, save_llama

SMALL = ["device=cpu", "evaluation.num_samples=3", "evaluation.num_bootstrap=50", "evaluation.context_length=32"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(words of a request, the folder of its reference)."""
    home = tmp_path_factory.mktemp("elsewhere")
    (home / "text.txt").write_text(TEXT)
    save_llama(home / "model", hidden_size=64, intermediate_size=128)
    words = [
        *("model=causal_lm", f"model.path={home / 'model'}", "dataset=text", f"dataset.path={home / 'text.txt'}"),
        *("evaluation.batch_size=2", "evaluation.floor_batch_size=3", *SMALL),
    ]
    out = home / "bundle"
    assert cli.dispatch(["reference", "export", str(out), *words, f"output_dir={home / 'outputs'}", "-q"]) == 0
    return words, out


@pytest.fixture
def here(exported, tmp_path, monkeypatch):
    """A copy of the bundle, in a folder where nothing is cached."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(exported[1], tmp_path / "bundle")
    return exported[0], tmp_path / "bundle"


def rows_of(words, *more):
    return quantlab.run(overrides=[*words, "backend=quanto", "dtype=int8", *more])


def resaid(folder, change):
    said = read_json(folder / bundle.SAID)
    change(said)
    said["outputs_sha256"] = sha256_of(folder / bundle.OUTPUTS)
    write_json(said, folder / bundle.SAID)


def test_numbers_are_those_of_a_reference_that_is_observed_here(here, monkeypatch):
    words, folder = here
    own = rows_of(words, "sweep.floors=false")[-1]
    monkeypatch.setattr("quantlab.running.workbench.observe", None)  # not asked
    brought = rows_of(words, "sweep.floors=false", f"reference.path={folder}")[-1]
    assert brought.quality == own.quality
    assert "(cpu), float32, torch" in brought.params["reference_made_on"]
    assert brought.run_id != own.run_id


def test_a_reference_of_another_device_is_named_and_what_it_changes_is_a_floor(here, capsys):
    words, folder = here
    outputs = read_tree(folder / bundle.OUTPUTS)
    moved = {k: v * 1.001 if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in outputs.items()}
    write_tree(moved, folder / bundle.OUTPUTS)

    def on_a_gpu(said):
        said["made"]["device"] = "cuda"
        said["made"]["arithmetic"] = {"name": "NVIDIA H100 80GB HBM3"}

    resaid(folder, on_a_gpu)
    *floors, row = rows_of(words, f"reference.path={folder}")
    assert row.params["reference_made_on"].startswith("NVIDIA H100 80GB HBM3 (cuda), float32")
    reference = next(r for r in floors if r.name == "reference")
    assert row.floors["floor_device"] == reference.quality
    assert any(v.value for v in reference.quality.values())
    assert "reference.path: made on NVIDIA H100" in capsys.readouterr().err


def cut(folder):
    data = (folder / bundle.OUTPUTS).read_bytes()
    (folder / bundle.OUTPUTS).write_bytes(data[: len(data) // 2])


def one_bit(folder):
    data = bytearray((folder / bundle.OUTPUTS).read_bytes())
    data[-3] ^= 1
    (folder / bundle.OUTPUTS).write_bytes(bytes(data))


BEFORE_WEIGHTS = {
    "no folder": (lambda folder: shutil.rmtree(folder), [], "holds no reference.json"),
    "no outputs": (lambda folder: (folder / bundle.OUTPUTS).unlink(), [], "holds no outputs.safetensors"),
    "cut off": (cut, [], "is damaged"),
    "one bit": (one_bit, [], "is damaged"),
    "other JSON": (lambda folder: (folder / bundle.SAID).write_text("{}"), [], "is damaged"),
    "changed by hand": (
        lambda folder: (folder / bundle.SAID).write_text((folder / bundle.SAID).read_text().replace("cpu", "gpu")),
        [],
        "is damaged",
    ),
    "not whole": (lambda folder: resaid(folder, lambda said: said["made"].pop("hardware")), [], "is damaged"),
    "other form": (lambda folder: resaid(folder, lambda said: said["asked"].update(format=1)), [], "another version"),
    "other settings": (None, ["evaluation.context_length=16"], "evaluation.context_length=32 there and 16 here"),
    "other dtype": (None, ["model.dtype=bfloat16"], "float32 there and bfloat16 here"),
}


@pytest.mark.parametrize("case", BEFORE_WEIGHTS)
def test_what_cannot_be_believed_is_refused_before_weights_load(here, case, monkeypatch):
    words, folder = here
    change, more, message = BEFORE_WEIGHTS[case]
    if change is not None:
        change(folder)
    monkeypatch.setattr("quantlab.running.placement.family_of", lambda config: pytest.fail("weights were loaded"))
    with pytest.raises(ConfigError, match=f"^reference.path: .*{message}") as refused:
        rows_of(words, *more, f"reference.path={folder}")
    assert "\n" not in str(refused.value)
    dry = plan([*words, "backend=quanto", "dtype=int8", *more, f"reference.path={folder}"])
    with pytest.raises(ConfigError) as told:
        show_jobs(dry, trust=True)
    assert str(told.value) == str(refused.value), "the dry run says otherwise"


def changed_config(folder, file="config.json", **values):
    said = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**said, **values}))


def one_value(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][-1] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def without_weights(monkeypatch):
    monkeypatch.setattr("quantlab.running.placement.family_of", lambda config: pytest.fail("weights were loaded"))


def test_another_model_and_other_inputs_are_refused_before_weights_load(here, tmp_path, monkeypatch):
    words, folder = here
    without_weights(monkeypatch)
    save_llama(tmp_path / "other", hidden_size=32, intermediate_size=64)
    with pytest.raises(ConfigError, match=r"^reference.path: .* is of another model \(.*: \[.* there and \[.* here"):
        rows_of(words, f"model.path={tmp_path / 'other'}", f"reference.path={folder}")
    shutil.copytree(words[1].partition("=")[2], tmp_path / "tuned")
    one_value(tmp_path / "tuned")
    with pytest.raises(ConfigError, match=r"^reference.path: .* is of another model \(model.norm.weight: "):
        rows_of(words, f"model.path={tmp_path / 'tuned'}", f"reference.path={folder}")
    (tmp_path / "other.txt").write_text(TEXT[::-1])
    with pytest.raises(ConfigError, match=r"^reference.path: .* is of other inputs \(text "):
        rows_of(words, f"dataset.path={tmp_path / 'other.txt'}", f"reference.path={folder}")


def test_the_same_model_in_other_files_is_believed_and_another_configuration_is_not(here, tmp_path):
    words, folder = here
    shutil.copytree(words[1].partition("=")[2], tmp_path / "same")
    in_shards(tmp_path / "same")
    config = plan([*words, f"model.path={tmp_path / 'same'}", f"reference.path={folder}"]).jobs[0].config
    assert bundle.read_bundle(config) is not None
    changed_config(tmp_path / "same", transformers_version="4.0.0", dtype="bfloat16", unheard_of=3)
    assert bundle.read_bundle(config) is not None  # what only one says is known when it is loaded
    with pytest.raises(ConfigError, match=r"^reference.path: .* is of another model \(model.config: "):
        rows_of(words, f"model.path={tmp_path / 'same'}", f"reference.path={folder}")


CHANGED = {
    "rms_norm_eps": ("config.json", 0.1),
    "rope_parameters": ("config.json", {"rope_theta": 5.0, "rope_type": "default"}),
    "hidden_act": ("config.json", "gelu"),
    "eos_token_id": ("generation_config.json", 3),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_configuration_is_refused_before_weights_load(here, tmp_path, monkeypatch, name):
    words, folder = here
    without_weights(monkeypatch)
    file, value = CHANGED[name]
    shutil.copytree(words[1].partition("=")[2], tmp_path / "other")
    changed_config(tmp_path / "other", file, **{name: value})
    with pytest.raises(ConfigError, match=rf"^reference.path: .* is of another model \({file}: {name}: .* there and "):
        rows_of(words, f"model.path={tmp_path / 'other'}", f"reference.path={folder}")


def test_of_a_pipeline_the_configurations_of_its_parts_are_known(tmp_path):
    """Of the parts that are loaded, and what both say: not where it lies, nor which library wrote it."""
    folder = BUILDERS["flux"](tmp_path / "flux")
    model = ModelConfig(family="diffusers", path=str(folder))
    was = stored_configs(model)
    changed_config(folder, "model_index.json", _diffusers_version="0.1")
    changed_config(folder / "vae", _name_or_path="elsewhere", dtype="float16")
    assert differing(was, stored_configs(model)) == ""
    for file, name, value in (
        ("vae/config.json", "scaling_factor", 0.5),
        ("scheduler/scheduler_config.json", "shift", 7.0),
        ("text_encoder_2/config.json", "num_heads", 8),
    ):
        before = stored_configs(model)
        changed_config(folder, file, **{name: value})
        assert differing(before, stored_configs(model)) == f"{file}: {name}"
    without = ModelConfig(family="diffusers", path=str(folder), without=["text_encoder_2"])
    assert not [name for name in stored_configs(without) if name.startswith("text_encoder_2/")]
    assert stored_configs(ModelConfig(family="diffusers", path=str(tmp_path / "none"))) == {}


@pytest.mark.slow
def test_a_pipelines_prompts_are_known_before_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    BUILDERS["flux"](tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a red fox\nthe blue cat\n")
    words = [
        *("model=diffusers", "model.path=flux", "dataset.path=prompts.txt", "device=cpu", "evaluation.num_samples=2"),
        *("evaluation.height=32", "evaluation.width=32", "evaluation.num_inference_steps=2", "output_dir=out"),
    ]
    config = plan(words).jobs[0].config
    model = load(config.model, "cpu", tmp_path / "cache")
    inputs = DATASETS["prompts"].load(config.dataset, config.evaluation, model)
    bundle.write_bundle(tmp_path / "bundle", model, inputs, config, {"latents": torch.zeros(2)})
    brought = [*words, "reference.path=bundle"]
    found = bundle.read_bundle(plan(brought).jobs[0].config)
    assert found is not None
    bundle.check_bundle(found, model, inputs, config.evaluation)
    for other in ("evaluation.num_samples=1", "dataset.seed=9"):
        told = "other settings" if other.startswith("evaluation") else "other inputs"
        with pytest.raises(ConfigError, match=f"^reference.path: .* is of {told}"):
            bundle.read_bundle(plan([*brought, other]).jobs[0].config)
    (tmp_path / "prompts.txt").write_text("a red fox\nthe green cat\n")
    with pytest.raises(ConfigError, match="^reference.path: .* is of other inputs"):
        bundle.read_bundle(plan(brought).jobs[0].config)
    (tmp_path / "prompts.txt").write_text("a red fox\nthe blue cat\n")
    weights = tmp_path / "flux" / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    for tensor in tensors.values():
        tensor += 0.5
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"^reference.path: .* is of another model \(transformer/"):
        bundle.read_bundle(plan(brought).jobs[0].config)


@pytest.mark.slow
def test_a_bundle_without_samples_is_checked_after_loading(here, tmp_path):
    words, folder = here
    resaid(folder, lambda said: said.pop("before"))
    save_llama(tmp_path / "other", hidden_size=32, intermediate_size=64)
    with pytest.raises(ConfigError, match=r"^reference.path: .* is of another model \(weights: "):
        rows_of(words, f"model.path={tmp_path / 'other'}", f"reference.path={folder}")


@pytest.mark.parametrize("words", [[], ["export"], ["export", "model=digits_dit"], ["import", "x"]])
def test_what_is_no_export_is_refused(words):
    with pytest.raises(ConfigError, match="^reference: write quantlab reference export DIR"):
        cli.dispatch(["reference", *words])


def test_a_folder_with_other_files_is_not_written_to(here, tmp_path):
    words, _ = here
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match="^reference export .*thesis.tex"):
        cli.dispatch(["reference", "export", str(tmp_path / "mine"), *words, "-q"])
    assert json.dumps([f.name for f in (tmp_path / "mine").iterdir()]) == '["thesis.tex"]'
