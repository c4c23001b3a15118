"""What a model's shapes refuse, its dry run says too: the run's words, the run's exit code, and no weights read."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from torch import nn

import quantlab
from quantlab import commands
from quantlab.commands import WITH_ALL
from quantlab.errors import ConfigError, DoesNotFit, ModelError
from quantlab.models.outline import Outline
from quantlab.planning.plan import plan
from quantlab.running import outlined
from quantlab.running.forecast import forecast
from quantlab.running.outlined import LacksPackages, refused_by_shape
from tests.support.fake_cuda import fake_cuda
from tests.support.shell import Shell, digits_words, pipeline_words, text_words
from tests.support.tiers import default_of
from tests.support.tiny_pipelines import build_tiny_sd3
from tests.support.tiny_text_models import save_bert, save_llama, save_llama_and_texts

DRY = "sweep.dry_run=true"
INT8, QUANTO, Q8 = ["backend=torchao", "dtype=int8"], ["backend=quanto", "dtype=int8"], ["backend=gguf", "dtype=q8_0"]
FLOAT8 = ["backend=torchao", "dtype=float8_e4m3", "activation_dtype=float8_e4m3"]
OWN = "quantization.modules_to_not_convert.own"
KINDS = "quantization.layer_kinds"
AWQ = "{backend: modelopt, dtype: int4, algorithm: awq_lite, group_size: 4096}"
OF_DIGITS = {
    "a group size that divides no layer": [*INT8, "group_size=512"],
    "a group size of a component's own": ["components.transformer={backend: torchao, dtype: int8, group_size: 512}"],
    "a block that a convolution has not": ["backend=gguf", "dtype=q6_k", f"{KINDS}=[linear,conv]"],
    "a fallback that fits neither": ["backend=gguf", "dtype=q6_k", f"{KINDS}=[conv]", "quantization.on_mismatch=q4_k"],
    "an exclusion that matches nothing": [*QUANTO, f"{OWN}=[nothing_here]"],
    "exclusions of every layer": [*QUANTO, f"{OWN}=['re:.*']"],
    "a dtype that it does not compute in": ["backend=torchao", "dtype=mxfp8"],
    "activations that a CPU does not multiply": [*FLOAT8, "quantization.on_mismatch=skip"],
    "a kind of which it has no layer": [*QUANTO, f"{KINDS}=[expert]"],
    "a device that one layer fills": [*QUANTO, "memory.device_gib=0.001"],
    "an export that nobody would load": [*Q8, "export.path=fresh"],
}
OF_A_TEXT_MODEL = {
    "a group size": [*INT8, "group_size=128"],
    "a group size of what is calibrated": [f"components.model={AWQ.replace('4096', '256')}"],
    "a rank as high as a layer's": ["backend=modelopt", "dtype=int4", "group_size=32", "algorithm=svdquant"],
    "an exclusion": [*INT8, f"{OWN}=[nothing_here]"],
    "a device that one layer fills, streamed": [*INT8, "memory.device_gib=0.00001", "memory.placement=streamed"],
    "data of a streamed model": [
        *("backend=modelopt", "dtype=int4", "group_size=32", "algorithm=awq_lite", "memory.placement=group_offload"),
    ],
    "an export of embeddings": [*INT8, f"{KINDS}=[linear,embedding]", "export.path=fresh"],
    "an export of a fallback": [*INT8, "group_size=128", "quantization.on_mismatch=bfloat16", "export.path=fresh"],
    "an export that computes otherwise": [*INT8, "compute_dtype=bfloat16", "export.path=fresh"],
    "a checkpoint of another model": ["checkpoint=BERT"],
    "a file of another model": ["checkpoint=QWEN"],
    "windows that are longer than the model takes": [*INT8, "evaluation.context_length=5000"],
    "a protocol of longer windows": [*INT8, "evaluation.perplexity_protocol=ppl/gptq2048", "model.path=SHORT"],
    "calibration on windows that are too long": [
        *("backend=modelopt", "dtype=int4", "group_size=32", "algorithm=awq_lite", "calibration.context_length=5000"),
    ],
    "windows of the unquantized model alone": ["backend=none", "dtype=bfloat16", "evaluation.context_length=5000"],
    "a text of too few tokens": [*INT8, "evaluation.num_samples=100000"],
    "a protocol of whole windows of too few tokens": [
        *(*INT8, "evaluation.perplexity_protocol=ppl/v1", "evaluation.num_samples=5000"),
    ],
    "a variant that it has not": [*INT8, "model.variant=fp16"],
    "devices that one block fills": [
        *(*INT8, "memory.placement=spread", "memory.devices=2", "memory.device_gib=0.00001"),
    ],
}
OF_A_PIPELINE = {
    "a group size": [*INT8, "group_size=512"],
    "of two components the one that is calibrated": [*INT8, "group_size=512", f"components.text_encoder={AWQ}"],
    "a component of its own": [*QUANTO, "components.text_encoder={backend: torchao, dtype: int8, group_size: 256}"],
    "a language model's file": ["checkpoint=QWEN"],
    "an export of a text encoder": [*QUANTO, "model.components=[text_encoder]", "export.path=fresh"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_llama_and_texts(folder)
    save_bert(folder / "bert")
    save_llama(folder / "short")
    config = json.loads((folder / "short" / "config.json").read_text())
    (folder / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 1024}))
    writer = gguf.GGUFWriter(folder / "qwen3.gguf", "qwen3")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float32))
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    build_tiny_sd3(folder / "sd3")
    return folder


def last(err: str) -> str:
    """What a command ends with, without the warnings and the progress before it."""
    return " ".join(err.split()).rpartition("quantlab: ")[2]


def check_refused(shell: Shell, words: list[str]) -> None:
    before = sorted(p.name for p in shell.folder.iterdir())
    code, out, err = shell(*words, DRY)
    assert sorted(p.name for p in shell.folder.iterdir()) == before, "a dry run makes nothing"
    run = shell(*words)
    assert (code, run[0]) == (2, 2), (err, run)
    assert last(err) == last(run[2]) != ""
    assert out == ""


def text_model(models: Path, *words: str) -> list[str]:
    files = [f"model.path={models}/model", f"dataset.path={models}/text.txt", f"calibration.path={models}/other.txt"]
    return text_words("cpu", "model=causal_lm", "dataset=text", *files, *words)


@pytest.mark.parametrize("what", default_of(OF_DIGITS, *[*OF_DIGITS][::3]))
def test_shapes_of_a_trained_model(what, shell):
    check_refused(shell, digits_words("device=cpu", *OF_DIGITS[what]))


@pytest.mark.parametrize("what", default_of(OF_A_TEXT_MODEL, *[*OF_A_TEXT_MODEL][1::3]))
def test_shapes_of_a_folder(what, shell, models):
    there = {"BERT": models / "bert", "QWEN": models / "qwen3.gguf", "SHORT": models / "short"}
    words = OF_A_TEXT_MODEL[what]
    for name, place in there.items():
        words = [word.replace(name, str(place)) for word in words]
    check_refused(shell, text_model(models, *words))


def test_settings_of_a_checkpoint_by_which_it_computes_otherwise_are_told(shell, models, tmp_path):
    shutil.copytree(models / "model", tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "rms_norm_eps": 0.25}))
    code, out, err = shell(*text_model(models, f"checkpoint={file.parent}"), DRY)
    assert code == 0, err
    assert "its config.json says rms_norm_eps=0.25 (the model's: 1e-06)" in " ".join(out.split())


@pytest.mark.parametrize(
    "what",
    ["group_size=128", f"{OWN}=[nothing_here]", "evaluation.context_length=500", "evaluation.num_samples=100000"],
)
def test_shapes_of_an_encoder(what, shell, models):
    words = ["device=cpu", "model=encoder", f"model.path={models}/bert", "dataset=text"]
    words += [f"dataset.path={models}/text.txt", "evaluation.num_samples=2"]
    check_refused(shell, [*words, "sweep.floors=false", *INT8, what])


@pytest.mark.parametrize("what", default_of(OF_A_PIPELINE, "a component of its own"))
def test_shapes_of_a_pipeline(what, shell, models):
    more = [word.replace("QWEN", str(models / "qwen3.gguf")) for word in OF_A_PIPELINE[what]]
    words = pipeline_words("cpu", "model=diffusers", f"model.path={models}/sd3", *more)
    check_refused(shell, words)


@pytest.mark.parametrize("instead", default_of(["skip", "int8", "bfloat16"], "int8"))
def test_what_need_not_fit_is_refused_by_neither(instead, shell):
    words = digits_words("backend=gguf" if instead == "skip" else "backend=torchao", "device=cpu")
    words += ["dtype=q6_k", f"{KINDS}=[linear,conv]"] if instead == "skip" else ["dtype=int4", f"{KINDS}=[linear,conv]"]
    words += [f"quantization.on_mismatch={instead}"]
    assert shell(*words, DRY)[0] == 0
    assert shell(*words)[0] == 0


# -- of several


MANY = ["-m", *INT8, "group_size=128,512", "device=cpu"]


def test_a_job_of_a_sweep_is_told_and_ends_it_as_the_run_ends(shell):
    words = digits_words(*MANY)
    code, out, err = shell(*words, DRY)
    [told] = re.findall(r"fails here: (.*?) quantlab", " ".join([*out.split(), "quantlab"]))
    assert told.startswith("group_size=512: 10 layers of transformer cannot be stored as torchao int8")
    assert err == "quantlab: 1 job of 2 would fail here\n"
    ran, _, said = shell(*words)
    assert (code, ran) == (1, 1)
    assert told[:80] in " ".join(said.split())


@pytest.mark.parametrize(("trials", "code"), [(1, 0), (2, 1)])
def test_a_search_may_choose_the_others(trials, code, shell):
    assert shell(*digits_words(*MANY, f"sweep.search.num_trials={trials}"), DRY)[0] == code


def test_candidates_of_a_recipe(shell):
    lines = ["# @package _global_", "defaults:", "  - override /model: digits_dit", "sweep:", "  candidates:"]
    lines += ["    - {backend: torchao, dtype: int8}", "    - {backend: torchao, dtype: int8, group_size: 512}"]
    (shell.folder / "mine.yaml").write_text("\n".join(lines))
    code, out, _ = shell("recipe=mine.yaml", "device=cpu", DRY)
    assert (code, out.count("fails here: group_size=512")) == (1, 1)


def test_from_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DoesNotFit, match="^group_size=512: 26 layers of transformer cannot be stored"):
        quantlab.run(overrides=[*INT8, "group_size=512", "device=cpu", DRY])
    assert list(tmp_path.iterdir()) == []


def test_a_job_that_has_finished_is_not_asked_again(shell, monkeypatch):
    words = digits_words("-m", *INT8, "group_size=128", "device=cpu")
    assert shell(*words)[0] == 0
    monkeypatch.setattr(outlined, "outline", lambda *_: pytest.fail("there was nothing to look at"))
    assert shell(*words, DRY)[0] == 0


def test_a_strangers_model_is_not_looked_at_before_anybody_agrees(shell, models, monkeypatch):
    lines = ["# @package _global_", "defaults:", "  - override /model: causal_lm", "  - override /dataset: text"]
    lines += ["model:", f"  path: {models}/model", "dataset:", f"  path: {models}/text.txt", "sweep:", "  candidates:"]
    lines += ["    - {backend: torchao, dtype: int8, group_size: 128}"]
    (shell.folder / "theirs.yaml").write_text("\n".join(lines))
    monkeypatch.setattr("quantlab.planning.trust.is_trusted", lambda _: False)
    monkeypatch.setattr("quantlab.running.dry_run.is_trusted", lambda _: False)
    monkeypatch.setattr("quantlab.running.dry_run.refused_by_shape", lambda *_: pytest.fail("it was looked at"))
    assert shell("recipe=theirs.yaml", "device=cpu", DRY)[0] in (0, 2)


# -- where computed


def of(*words: str) -> dict[str, ConfigError]:
    return refused_by_shape(plan(list(words)).jobs, is_far=False)


def test_what_a_gpu_multiplies_is_asked_where_one_is(monkeypatch):
    assert of("model=smollm2_135m", *INT8) == of(*INT8) == {}, "libraries are imported as on this machine"
    fake_cuda(monkeypatch)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (9, 0))
    assert of("model=smollm2_135m", *FLOAT8) == {}, "all its shapes divide by 16"
    [error] = of(*FLOAT8).values()
    assert re.match(
        r"activation_dtype=float8_e4m3: \d+ features do not divide by 16 \(layer \S+, .* exclude it",
        str(error),
    )
    monkeypatch.undo()  # a plan is for a GPU that may be elsewhere
    [price] = forecast(plan(FLOAT8))
    assert price.why_refused == (str(error),), "and quantlab plan says so"


def test_on_nodes_whose_devices_are_not_known_only_shapes_are_asked():
    jobs = plan(["-m", "backend=modelopt", "dtype=nvfp4", "launcher=slurm"][1:], multirun=True).jobs
    assert refused_by_shape(jobs, is_far=True) == {}
    jobs = plan([*INT8, "group_size=512", "launcher=slurm"], multirun=True).jobs
    assert list(refused_by_shape(jobs, is_far=True)) == ["torchao int8 g512"]


# -- no outline, no word


def test_the_hub_is_not_asked(monkeypatch, shell):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("it was asked"))
    words = ["model=causal_lm", "model.path=nobody/nothing", "dataset=wiki_extracts", *INT8]
    assert of(*words) == {}
    code, out, _ = shell(*words, DRY)
    assert code == 0
    assert "model.path=nobody/nothing: it is not on this disk" in " ".join(out.split())
    assert "nobody/nothing: it is not" in json.loads(shell(*words, DRY, "--json")[1])["told"][-1]
    [error] = of("model=llama_3_8b", *INT8, f"{OWN}=[nothing_here]").values()
    assert str(error).startswith("modules_to_not_convert.own=nothing_here: matches none")


def test_of_the_hubs_cache_configurations_are_read(models, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda path, name, revision: str(models / "model" / name)
    )
    words = ["model=causal_lm", "model.path=somebody/llama", "dataset=wiki_extracts"]
    assert list(of(*words, *INT8, "group_size=128")) == ["torchao int8 g128"]


@pytest.mark.parametrize("raised", [ModelError("model.path: of its own files"), RuntimeError("a library's")])
def test_a_model_that_cannot_be_outlined_is_told_and_left_to_the_run(raised, monkeypatch, capsys):
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr(outlined, "outline", fail)
    assert of(*INT8, "group_size=512") == {}
    told = " ".join("".join(capsys.readouterr()).split())
    assert told.startswith(("model.path: of its own", "model.family=digits_dit: it cannot be built from its config"))
    assert str(raised) in told
    monkeypatch.setenv("QUANTLAB_TRACEBACK", "1")
    with pytest.raises(type(raised), match=str(raised)):
        of(*INT8, "group_size=512")
    with pytest.raises(LacksPackages):
        refused_by_shape(plan([*INT8, "group_size=512"]).jobs, is_far=False, is_spared=True)


def test_another_process_has_all_packages(shell, monkeypatch):
    asked = []

    def run(command: list[str], env: dict[str, str], check: bool) -> object:
        asked.append((command, env[WITH_ALL]))
        return type("Done", (), {"returncode": 2})

    def lack(*_: object) -> None:
        raise LacksPackages

    monkeypatch.setattr(commands.subprocess, "run", run)
    monkeypatch.setattr("quantlab.running.dry_run.refused_by_shape", lack)
    with contextlib.chdir(shell.folder):
        assert commands.show_dry_run(plan([*QUANTO, DRY]), set(), is_last=True) == 2
    assert asked == [([sys.executable, *sys.orig_argv[1:]], "1")]
    assert WITH_ALL not in os.environ


class Reading(nn.Module):
    """Whose code reads a weight that no run may come to."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(64, 64, device="meta")

    def forward(self, x: object) -> object:
        return self.proj.weight


def test_what_depends_on_the_weights_that_a_run_reads_is_left_to_it(monkeypatch):
    """By its code the weight is read, and bitsandbytes' int8 takes none that is; a run sees whether."""
    [job] = plan(["backend=bitsandbytes", "dtype=int8"]).jobs
    made = Outline(components={"transformer": Reading()}, quantized=("transformer",), dtype="float32")
    monkeypatch.setattr(outlined, "outline", lambda *_: made)
    assert outlined.read_by_code(made.components["transformer"]) == ("proj",)
    assert refused_by_shape([job], is_far=False) == {}


@pytest.mark.parametrize(
    "recipe",
    default_of(
        ["flux_dev_svdquant", "sd35_medium_int4", "sdxl_w8a8_smoothquant", "digits_backends"], "digits_backends"
    ),
)
def test_no_fault_of_ours_is_hidden_in_the_recipes(recipe, monkeypatch):
    """Whatever a library raises of a module without values is left to the run, unless errors are to be shown."""
    monkeypatch.setenv("QUANTLAB_TRACEBACK", "1")
    jobs = plan([f"recipe={recipe}", "device=cpu"]).jobs
    assert len(jobs) > 1
    assert all(isinstance(error, ConfigError) for error in refused_by_shape(jobs, False).values())


def test_what_is_left_to_the_run_is_shown_on_request(monkeypatch):
    def broken(*_):
        raise RuntimeError("a library's")

    jobs = plan(["backend=quanto", "dtype=int8", "device=cpu"]).jobs
    monkeypatch.setattr(outlined, "_check", broken)
    assert refused_by_shape(jobs, False) == {}
    monkeypatch.setenv("QUANTLAB_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="a library's"):
        refused_by_shape(jobs, False)
