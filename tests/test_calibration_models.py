"""Calibration on pipelines, language models and encoders: tiny random ones of the real classes."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from stores import artifact
from tiny_pipelines import BUILDERS
from tiny_text_models import TEXT, load_llama, save_bert, save_llama

from quantlab.datasets import prompts, text
from quantlab.datasets.calibration import calibration_inputs
from quantlab.errors import ConfigError
from quantlab.experiment import CalibrationConfig, DatasetConfig, EvaluationConfig, ModelConfig
from quantlab.models import diffusers_pipeline
from quantlab.protocols import diffusion
from quantlab.stages.calibrate import calibration_set

OTHER = "".join(f"Line {i}: {i % 11} slow red hens sit below box {i * 3} and wait.\n" for i in range(150))
SAMPLING = EvaluationConfig(num_samples=4, num_inference_steps=3, height=32, width=32, batch_size=2, guidance_scale=3.0)
PROMPTS = CalibrationConfig(source="prompts", num_samples=4, batch_size=2)
SMALL = ["device=cpu", "evaluation.num_samples=4", "evaluation.num_inference_steps=2",
         "evaluation.num_teacher_forced=1", "evaluation.num_bootstrap=50", "evaluation.height=32",
         "evaluation.width=32", "calibration.num_samples=4", "calibration.batch_size=2", "sweep.floors=false"]
SMALL_TEXT = ["device=cpu", "evaluation.num_samples=6", "evaluation.batch_size=2", "evaluation.context_length=32",
              "evaluation.num_bootstrap=50", "calibration=text", "calibration.num_samples=8",
              "calibration.context_length=32", "sweep.floors=false"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    (root / "text.txt").write_text(TEXT)
    (root / "other.txt").write_text(OTHER)
    return {**{kind: build(root / kind) for kind, build in BUILDERS.items()}, "text": root / "text.txt",
            "other": root / "other.txt", "llama": save_llama(root / "llama", hidden_size=64, intermediate_size=256),
            "bert": save_bert(root / "bert", hidden_size=64, intermediate_size=256)}


def pipeline(folders, kind, components, tmp_path, dtype="float32"):
    config = ModelConfig(family="diffusers", path=str(folders[kind]), components=components, dtype=dtype)
    model = diffusers_pipeline.load(config, "cpu", tmp_path / "cache")
    return model, prompts.load(DatasetConfig(name="prompts"), SAMPLING, model)


def table_of(shell, name, file):
    found = shell.tracked()[name]
    table = json.loads(artifact(shell.store, found["run_id"], file))
    return [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]


def sweep(shell, candidates):
    """A recipe of these candidates, as a word."""
    (shell.folder / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump({"sweep": {
        "candidates": candidates}}))
    return "recipe=mine.yaml"


# -- pipelines


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("kind", "denoiser", "encoder", "rows", "calls"), [
    ("flux", "transformer", "text_encoder_2", 2, 4),  # guidance is an input of the network
    ("sdxl", "unet", "text_encoder", 4, 4),  # with and without the prompt; the empty one is zeros
    ("sd3", "transformer", "text_encoder_3", 4, 8),  # the empty prompt is encoded, beside each of the others
])
def test_trajectories_with_guidance_and_text_encoders(folders, tmp_path, kind, denoiser, encoder, rows, calls, dtype):
    model, seen = pipeline(folders, kind, [denoiser, encoder], tmp_path, dtype)
    found = calibration_set(model, [denoiser, encoder], PROMPTS, SAMPLING, seen, tmp_path)
    recorded = list(found.calls[denoiser])
    assert [call["step"] for call in recorded] == [0, 1, 2] * 2
    assert {call["dtype"] for call in recorded} == {dtype}
    inputs = [t for call in recorded for t in (*call["args"][:1], call["kwargs"].get("hidden_states")) if t is not None]
    assert {len(t) for t in inputs} == {rows}
    assert {t.dtype for t in inputs} == {getattr(torch, dtype)}
    assert len(found.calls[encoder]) == calls
    for name in (denoiser, encoder):
        linear = next(n for n, m in model.components[name].named_modules() if isinstance(m, torch.nn.Linear))
        ran = []
        hook = model.components[name].get_submodule(linear).register_forward_hook(lambda *_, ran=ran: ran.append(1))
        found.feed(name, model)(model.components[name])
        hook.remove()
        assert len(ran) == len(found.calls[name])


def test_text_encoders_run_however_often_their_prompts_were_encoded_before(folders, tmp_path):
    """Also after the evaluation, after another set of the same prompts, and after memory ran out half way."""
    model, seen = pipeline(folders, "flux", ["transformer", "text_encoder"], tmp_path)
    names = ["transformer", "text_encoder"]
    first = calibration_set(model, names, PROMPTS, SAMPLING, seen, tmp_path / "one")
    again = calibration_set(model, names, PROMPTS, SAMPLING, seen, tmp_path / "two")
    assert len(again.calls["text_encoder"]) == len(first.calls["text_encoder"]) == 4
    assert again.sha256 == first.sha256


def test_a_component_that_never_runs_is_named(folders, tmp_path):
    model, seen = pipeline(folders, "flux", ["transformer", "vae"], tmp_path)
    with pytest.raises(ConfigError, match=r"^model.components=vae: it never ran on the calibration data; leave it out"):
        calibration_set(model, ["transformer", "vae"], PROMPTS, SAMPLING, seen, tmp_path)
    assert not list(tmp_path.glob("calibration/*/*"))


def test_only_one_batch_is_recorded_ahead(folders, tmp_path):
    model, seen = pipeline(folders, "sd3", ["transformer"], tmp_path)
    batches, sample = [], model.sample
    counted = model.__class__(**{**vars(model), "sample": lambda m, noise, *rest: batches.append(len(noise)) or sample(
        m, noise, *rest)})
    calls = diffusion.calls(counted, seen, SAMPLING, ["transformer"])
    for num in (1, 1, 1, 2, 2, 2):
        next(calls)
        assert len(batches) == num


def test_several_components_share_a_set_between_jobs(shell, folders):
    """In bfloat16, a static and a smoothed scheme: each component's layers have their evidence."""
    candidate = {"backend": "modelopt", "dtype": "int8", "activation_dtype": "int8", "activation_scales": "static"}
    word = sweep(shell, [candidate, {**candidate, "algorithm": "smoothquant"},
                         {"backend": "quanto", "dtype": "int8", "activation_dtype": "int8"}])
    rows = shell.rows(word, "model=diffusers", f"model.path={folders['flux']}", "model.dtype=bfloat16",
                      "model.components=[transformer,text_encoder]", *SMALL)
    assert len(list((shell.folder / "outputs/cache/calibration").glob("*/set.json"))) == 1
    for name, row in rows.items():
        assert 0 < row["metrics"]["quality/latent_rel_mse"] < 0.1
        layers = table_of(shell, name, "calibration_layers.json")
        assert {r["component"] for r in layers} == {"transformer", "text_encoder"}
        assert all(r["output_sqnr_db_after"] > 10 for r in layers)
        has_plain = not name.startswith("quanto")
        assert all((r["output_sqnr_db_before"] is not None) == has_plain for r in layers)


# -- text

ANY_TEXT = [
    {"backend": "modelopt", "dtype": "int4", "group_size": 32, "algorithm": "awq_lite"},
    {"backend": "modelopt", "dtype": "int4", "group_size": 32, "algorithm": "gptq"},
    {"backend": "torchao", "dtype": "int8", "activation_dtype": "int8", "algorithm": "awq"},
    {"backend": "torchao", "dtype": "int8", "activation_dtype": "int8", "algorithm": "smoothquant"},
    {"backend": "torchao", "dtype": "int8", "activation_dtype": "int8", "activation_scales": "static"},
    {"backend": "quanto", "dtype": "int8", "activation_dtype": "int8"},
    {"backend": "gguf", "dtype": "q4_0", "algorithm": "imatrix"},
]


@pytest.mark.parametrize(("model", "kind", "metric"), [
    ("causal_lm", "llama", "kld_mean"), ("encoder", "bert", "output_rel_error")])
def test_text_models_by_every_backend(shell, folders, model, kind, metric):
    words = [f"model={model}", f"model.path={folders[kind]}", "dataset=text", f"dataset.path={folders['text']}",
             f"calibration.path={folders['other']}", "modules_to_not_convert=[]", *SMALL_TEXT]
    words.insert(0, sweep(shell, ANY_TEXT))
    rows = shell.rows(*words)
    assert len(rows) == len(ANY_TEXT)
    for name, row in rows.items():
        assert row["status"] == "FINISHED", row["error"]
        assert row["metrics"][f"quality/{metric}"] > 0
        assert row["metrics"]["calibration/num_samples"] == 8
        assert row["metrics"]["calibration/output_sqnr_db_after_mean"] > 10, name
    assert len(list((shell.folder / "outputs/cache/calibration").glob("*/set.json"))) == 1
