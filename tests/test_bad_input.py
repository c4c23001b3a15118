"""Bad requests: exit code 2, and one message that begins with the key that was typed and ends with the way out."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file, save_file

from quantlab.modules.layers import state_digest
from tests.support.shell import digits_words
from tests.support.stores import ROOT
from tests.support.tiny_pipelines import build_tiny_flux
from tests.support.tiny_text_models import save_llama


def refused(shell, *words, begins, ends):
    """The message of a refused request, checked for its form."""
    code, out, err = shell(*words, "-q")
    assert code == 2, err
    assert out == ""
    message = err.removeprefix("quantlab: ")
    assert message != err, "nothing comes before the message"
    assert "Traceback" not in err
    assert message.startswith(begins), message
    assert re.search(ends + r"\s*$", message), message
    return message


# -- refused before anything is loaded

WORDS = [
    ("backend=torchoa", "backend=torchoa: there are ", r"did you mean torchao\?"),
    ("dtype=int9 backend=torchao", "dtype=int9: there are ", r"did you mean int\d\?"),
    ("grup_size=64", "grup_size: no such key; did you mean group_size?", "--help lists the groups"),
    ("evaluation.num_sampels=3", "evaluation.num_sampels: no such key", r"did you mean num_samples\?"),
    ("evaluation.num_samples=many", "evaluation.num_samples=many: ", "a whole number is wanted"),
    ("evaluation.num_samples=0", "evaluation.num_samples=0: ", "from 1 to 1000000 is wanted"),
    ("tracking.required=perhaps", "tracking.required=perhaps: ", "true or false is wanted"),
    ("device=tpu", "device=tpu: there are auto, cpu, cuda", ""),
    ("num_threads=-1", "num_threads=-1: ", "from 0 to 512 is wanted"),
    ("backend=quanto dtype=nf4", "dtype=nf4: quanto offers ", "nf4 is offered by bitsandbytes and torchao.*"),
    ("backend=quanto group_size=64", "group_size=64: quanto chooses its own", r"read back and reported\)"),
    ("backend=gguf dtype=q4_k group_size=64", "group_size=64: gguf q4_k offers ", "auto, 32"),
    ("backend=torchao bnb_4bit_quant_type=nf4", "bnb_4bit_quant_type: no such key", "lists the groups"),
    ("backend=torchao bnb_4bit_use_double_quant=true", "quantization.bnb_4bit_use_double_quant: ", "bitsandbytes"),
    ("recipe=digits_backend", "recipe=digits_backend: no such recipe; did you mean digits_backends?", "your own"),
    ("recipe=mine.yaml", "recipe=mine.yaml: no such file; ", "shows the named ones"),
    ("backend", "backend: an override is key=value", "--help shows examples"),
    ("lsit", "lsit: an override is key=value; did you mean list?; ", "--help shows examples"),
    ("+dtype=int4", "+dtype=int4: keys are neither added nor removed; ", "write key=value"),
    ("dtype=int8,int4", "dtype=int8,int4: several values are a sweep; ", "add -m"),
    ("--multi", "--multi: no such option; did you mean --multirun?; ", "--help shows them"),
    ("list recipe", "list recipe: there are ", r"did you mean recipes\?"),
    ("list", "list: there are ", "words"),
    ("tracking.uri=file:mlruns", "tracking.uri=file:mlruns: ", "set tracking.uri=sqlite:///outputs/mlflow.db"),
]


@pytest.mark.parametrize(("words", "begins", "ends"), WORDS, ids=[w for w, _, _ in WORDS])
def test_words_that_make_no_request(shell, words, begins, ends):
    refused(shell, *words.split(), begins=begins, ends=ends)


def test_a_missing_package(shell, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
    refused(
        shell,
        "backend=gguf",
        begins="backend=gguf: the package gguf is not installed; ",
        ends=r"pip install 'quantlab-recipes\[gguf\]'",
    )


def test_no_cuda_device(shell, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(
        shell,
        "backend=quanto",
        "device=cuda",
        begins="device=cuda: this torch sees no CUDA device; pass ",
        ends="install a CUDA build of torch",
    )


@pytest.mark.parametrize("kind", ["file", "below a file"])
def test_an_output_folder_that_cannot_be_written(shell, kind):
    (shell.folder / "taken").write_text("a file")
    typed = "output_dir=taken" + ("/below" if kind != "file" else "")
    refused(
        shell, "backend=quanto", typed, begins=f"{typed}: /", ends=r"runs cannot be written \(.*set output_dir=<.*>"
    )


def test_a_traceback_is_shown_where_it_is_asked_for(shell):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "QUANTLAB_TRACEBACK": "1"}
    command = [sys.executable, "-m", "quantlab", "backend=torchoa"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=shell.folder, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("Traceback")
    assert done.stderr.strip().splitlines()[-1].startswith("quantlab.errors.ConfigError: backend=torchoa: ")


# -- refused once the model is there


def test_an_exclusion_that_matches_nothing(shell):
    words = digits_words("backend=quanto", "sweep.floors=false", "quantization.modules_to_not_convert.own=[to_q]")
    message = refused(shell, *words, begins="modules_to_not_convert.own=to_q: matches none of ", ends="of them")
    assert "*.to_q would match 1 of them" in message
    found = shell.tracked("FAILED")["quanto int8"]
    assert found["tags"]["quantlab.stage"] == "quantize"
    assert found["tags"]["quantlab.failure"].startswith("modules_to_not_convert.own=to_q: ")


def test_everything_is_excluded(shell):
    words = digits_words("backend=quanto", "sweep.floors=false", "quantization.modules_to_not_convert.own=['*']")
    refused(
        shell,
        *words,
        begins="modules_to_not_convert.own: all ",
        ends="quantization\\.layer_kinds=\\[embedding,conv\\] takes them",
    )


def test_a_component_that_is_not_there(shell):
    refused(
        shell,
        *digits_words("backend=quanto", "sweep.floors=false", "model.components=[unet]"),
        begins="model.components=unet: a model of family digits_dit has ",
        ends="transformer",
    )


@pytest.mark.parametrize("model", ["digits_dit", "diffusers", "causal_lm", "encoder"])
def test_a_model_path_that_is_not_there(shell, model, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = refused(
        shell, f"model={model}", "model.path=./nowhere", "backend=quanto", begins="model.path=./nowhere: ", ends=r".*"
    )
    assert len(message.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {"diffusers": build_tiny_flux(root / "flux"), "causal_lm": save_llama(root / "llama")}


WEIGHTS = {"diffusers": "transformer/diffusion_pytorch_model.safetensors", "causal_lm": "model.safetensors"}


def damaged(folders, family, tmp_path, damage):
    folder = shutil.copytree(folders[family], tmp_path / "damaged")
    file = folder / WEIGHTS[family]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
        return folder
    state = load_file(file)
    largest = max(state, key=lambda name: state[name].numel())
    state[largest].view(-1)[3] = float("nan")
    save_file(state, file, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("damage", ["truncated", "nan"])
@pytest.mark.parametrize("family", ["diffusers", "causal_lm"])
def test_a_damaged_checkpoint(shell, folders, family, damage, tmp_path):
    folder = damaged(folders, family, tmp_path, damage)
    text = tmp_path / "text.txt"
    text.write_text("some words " * 500)
    data = [] if family == "diffusers" else ["dataset=text", f"dataset.path={text}"]
    words = [f"model={family}", f"model.path={folder}", "device=cpu", "backend=quanto", *data]
    ends = "(again|files are complete, and, .*)" if damage == "truncated" else "use an intact checkpoint"
    message = refused(shell, *words, begins=f"model.path={folder}: ", ends=ends)
    if damage == "nan":
        assert "1 of " in message
        assert "are NaN or infinite" in message
        assert shell.tracked("FAILED")["quanto int8"]["tags"]["quantlab.stage"] == "load"
    else:
        assert not shell.tracked(None), "told before a run begins"


def test_nan_in_the_digits_model(shell):
    [file] = (shell.folder / "outputs" / "cache" / "models").glob("*/model.safetensors")
    state = load_file(file)
    state["pos_embed.proj.weight"].view(-1)[0] = float("nan")
    from safetensors import safe_open

    with safe_open(file, framework="pt") as old:
        header = old.metadata()
    save_file(state, file, metadata={**header, "weights_sha256": state_digest(state)})
    message = refused(shell, *digits_words("backend=quanto"), begins="model=digits_dit: ", ends="intact checkpoint")
    assert "pos_embed.proj.weight are NaN or infinite" in message


# -- the tracking store


def test_an_unreachable_server_is_refused_in_time_and_nothing_is_lost(shell, closed_port):
    shell.rows(*digits_words("backend=quanto", "dtype=int8"))
    begun = time.monotonic()
    uri = f"tracking.uri=http://127.0.0.1:{closed_port}"
    refused(
        shell,
        *digits_words("backend=quanto", "dtype=int4"),
        uri,
        begins=f"{uri}: no connection; ",
        ends="set tracking.required=false, or tracking.uri=sqlite:///outputs/mlflow.db",
    )
    assert time.monotonic() - begun < 15
    assert set(shell.tracked()) == {"quanto int8"}


def test_a_run_goes_on_without_its_server_and_is_pushed_later(shell, closed_port):
    uri = [f"tracking.uri=http://127.0.0.1:{closed_port}", "tracking.required=false"]
    rows = shell.rows(*digits_words("backend=quanto", "dtype=int4"), *uri)
    assert rows["quanto int4"]["run_id"].startswith("local-")
    assert shell.tracked() == {}
    shell.rows(*digits_words("backend=quanto", "dtype=int8"))
    tracked = shell.tracked()
    assert set(tracked) == {"quanto int4", "quanto int8"}
    sent = tracked["quanto int4"]["metrics"]
    numbers = {k: v for k, v in rows["quanto int4"]["metrics"].items() if "/step_" not in k}  # a curve is one metric
    assert numbers.items() <= sent.items()


def test_a_store_that_is_no_store(shell):
    (shell.folder / "outputs" / "mlflow.db").write_text("not a database, but long enough for one " * 50)
    refused(shell, "backend=quanto", begins="tracking.uri=sqlite:///", ends="or tracking.required=false")
