"""Files of weights that are cut off, or not there: told before weights load, by a run and its dry run alike."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from quantlab.errors import ModelError
from quantlab.models.headers import check_whole
from quantlab.vocabulary.schema import ModelConfig
from tests.support.shell import Shell
from tests.support.tiny_pipelines import build_tiny_flux
from tests.support.tiny_text_models import TEXT, save_llama


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """A model in several files."""
    from transformers import AutoModelForCausalLM

    folder = save_llama(tmp_path_factory.mktemp("headers") / "model")
    whole = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    whole.save_pretrained(folder, max_shard_size="20KB")
    return folder


def cut(file):
    os.truncate(file, file.stat().st_size - 3)


SPOILT = {
    "is damaged or cut off": cut,
    "which is not there": lambda file: file.unlink(),
    "damaged or cut off (unpack requires": lambda file: file.write_bytes(b"abc"),
    "its header says": lambda file: file.write_bytes(file.read_bytes() + b"x"),
}


@pytest.mark.parametrize("said", SPOILT)
def test_a_run_and_its_dry_run_say_it_in_the_same_words(shards, tmp_path, said):
    shutil.copytree(shards, tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    SPOILT[said](sorted((tmp_path / "model").glob("*.safetensors"))[1])
    words = ("model=causal_lm", "model.path=model", "dataset=text", "dataset.path=text.txt", "backend=quanto")
    told = {Shell(tmp_path)(*words, "dtype=int8", *more)[::2] for more in ((), ("sweep.dry_run=true",))}
    [(code, err)] = told
    assert code == 2
    assert err.startswith("quantlab: model.path=model: ")
    assert said in err
    assert err.rstrip().endswith("copy or download it again")
    assert not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize("said", SPOILT)
def test_a_checkpoint_is_told_by_the_dry_run_too(shards, tmp_path, said):
    for name in ("model", "checkpoint"):
        shutil.copytree(shards, tmp_path / name)
    (tmp_path / "text.txt").write_text(TEXT)
    SPOILT[said](sorted((tmp_path / "checkpoint").glob("*.safetensors"))[1])
    words = ("model=causal_lm", "model.path=model", "dataset=text", "dataset.path=text.txt", "checkpoint=checkpoint")
    told = []
    for more in ((), ("sweep.dry_run=true",)):
        code, out, err = Shell(tmp_path)(*words, "sweep.floors=false", *more)
        assert code
        told.append(next(line[line.index("checkpoint=") :] for line in (out + err).splitlines() if said in line))
    assert told[0].split(";")[0] == told[1].split(";")[0]


def test_what_is_not_read_is_not_looked_at(shards, tmp_path):
    shutil.copytree(shards, tmp_path / "model")
    for name in ("consolidated.safetensors", "model.fp16.safetensors"):
        (tmp_path / "model" / name).write_bytes(b"abc")
    check_whole(ModelConfig(path=str(tmp_path / "model")))
    check_whole(ModelConfig(path="owner/name"))
    with pytest.raises(ModelError, match=r"model\.fp16\.safetensors is damaged"):
        check_whole(ModelConfig(path=str(tmp_path / "model"), variant="fp16"))


def test_a_part_of_a_pipeline(tmp_path):
    build_tiny_flux(tmp_path / "flux")
    parts = {name for name in json.loads((tmp_path / "flux" / "model_index.json").read_text()) if name[0] != "_"}
    assert {"transformer", "vae"} <= parts
    asked = ModelConfig(family="diffusers", path=str(tmp_path / "flux"))
    check_whole(asked)
    cut(tmp_path / "flux" / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(
        ModelError, match=r"^model\.path=\S+: vae/diffusion_pytorch_model\.safetensors is damaged or cut"
    ):
        check_whole(asked)
