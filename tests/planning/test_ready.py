"""What can be known is refused before weights load, also by a dry run, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError
from quantlab.models.table import FAMILIES
from quantlab.planning.plan import plan
from quantlab.running.sweep import run_plan
from quantlab.tracking.connect import resolved_uri
from tests.support.shell import Shell, digits_words
from tests.support.stores import ROOT

AT_ONCE = {
    "evaluation.num_samples=12": "digits_classes has 10 classes of equal share; take a multiple of 10, such as 10 or 20",
    "evaluation.num_samples=5": "such as 10",
    "evaluation.guidance_scale=nan": "a number from 0 to",
    "evaluation.perplexity_protocol=ppl/v9": "there are ppl/v2",
    "model.dtype=float8": "there are auto, float32",
    "model.num_layers=0": "from 1 to",
    "evaluation.height=0": "from 8 to",
}
TEXT = ["model=smollm2_135m", "dataset=text"]
FROM_DISK = {
    "a data set's file": [*TEXT, "dataset.path=nowhere.txt"],
    "no pictures": ["model=flux_schnell", "dataset=image_prompts", "dataset.path=."],
    "no file": [*TEXT, "dataset.path=null"],
    "a folder for a file": [*TEXT, "dataset.path=."],
    "prompts": ["model=flux_schnell", "dataset.path=nowhere.txt"],
    "a pipeline": ["model=diffusers", "model.path=./nowhere"],
    "a language model": ["model=causal_lm", "model.path=~/nowhere/at/all"],
    "no path": ["model=causal_lm"],
    "no pipeline": ["model=diffusers"],
    "weights of digits": ["model.path=/nowhere"],
}


@pytest.mark.parametrize("word", AT_ONCE)
def test_what_no_file_is_needed_for_is_refused_by_the_plan(word):
    with pytest.raises(ConfigError) as caught:
        plan(["backend=quanto", word])
    key = word.partition("=")[0]
    assert str(caught.value).startswith(f"{key}=")
    assert AT_ONCE[word] in str(caught.value)


def test_a_calibration_sets_number_too():
    with pytest.raises(ConfigError, match=r"^calibration.num_samples=12: digits_classes has 10 classes"):
        plan(["backend=gguf", "dtype=q4_k", "algorithm=imatrix", "calibration.num_samples=12"])


def test_a_grid_lists_the_numbers_that_cannot_be():
    with pytest.raises(ConfigError, match=r"(?s)^1 of 2 combinations are impossible.*num_samples=12\n"):
        plan(["backend=quanto", "evaluation.num_samples=12,20"], multirun=True)


@pytest.mark.parametrize("what", FROM_DISK)
def test_what_lies_nowhere_is_refused_by_the_dry_run_and_by_the_run(tmp_path, what):
    shell = Shell(tmp_path)
    words = ["backend=quanto", *FROM_DISK[what]]
    plan(words)  # a config may be written before its files are there
    for more in (["sweep.dry_run=true"], ["-m", "dtype=int8,int4"]):
        code, _, err = shell(*words, *more)
        assert code == 2
        assert err.startswith(("quantlab: model.path=", "quantlab: dataset.path=")), err
        assert len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


ALSO_OF_THE_RUN = {
    "a store": ["tracking.uri=htp://x"],
    "a folder that is a file": ["output_dir=file.txt/outputs"],
    "a reference": ["reference.path=nowhere"],
    "an importance matrix": ["backend=gguf", "dtype=q4_k", "algorithm=imatrix", "quantization.imatrix_file=nowhere"],
    "a folder without a model": ["model=causal_lm", "model.path=."],
}


@pytest.mark.parametrize("what", ALSO_OF_THE_RUN)
def test_a_dry_run_is_refused_as_its_run_is(tmp_path, what):
    (tmp_path / "file.txt").touch()
    words = ALSO_OF_THE_RUN[what]
    ended = [Shell(tmp_path)("backend=quanto", *words, *more) for more in (["sweep.dry_run=true"], [])]
    assert [code for code, _, _ in ended] == [2, 2]
    assert ended[0][2] == ended[1][2]
    assert ended[0][2].startswith(f"quantlab: {words[-1].partition('=')[0]}"), ended[0][2]


LONG = "x" * 3000
ODD = [
    "recipe=\0.yaml",
    f"recipe={LONG}.yaml",
    "recipe=~no_such_user/x.yaml",
    f"model.path=/{LONG}",
    "model.path=~no_such_user/x",
    f"dataset.path={LONG}",
    "dataset.path=~no_such_user/x",
    f"calibration.path={LONG}",
    "output_dir=~no_such_user/x",
    f"output_dir=a/{LONG}",
    f"quantization.imatrix_file={LONG}",
    "quantization.imatrix_file=~no_such_user/x",
    "output_dir=" + "a/" * 3000,
]


@pytest.mark.parametrize("word", ODD, ids=lambda w: ascii(w)[:30])
def test_a_path_that_no_file_has_is_refused_in_words(word):
    with pytest.raises(ConfigError) as caught:
        plan(["backend=gguf", "dtype=q4_k", word])
    assert str(caught.value).startswith(word[:12])
    assert "no file can be called so" in str(caught.value) or "no such home folder" in str(caught.value)


LONG_NAME = "x" * 252
"""That of a file, until an ending comes to it."""


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("model=auto", f"model.path={LONG}", "backend=quanto"), r"^model\.path=x+\.\.\.: no file can be called so"),
        ((f"backend={LONG_NAME}",), r"^backend=x.*: there are "),
    ],
)
def test_a_name_that_no_file_has_is_refused_in_words(words, message):
    with pytest.raises(ConfigError, match=message):
        plan(words)


def test_a_store_that_no_file_can_be_is_refused_in_words(tmp_path):
    with pytest.raises(ConfigError, match=r"^tracking\.uri=x+\.\.\.: no file can be called so"):
        resolved_uri(f"sqlite:///{LONG}.db", tmp_path)


def test_a_refused_sweep_leaves_no_run(tmp_path):
    code, _, err = Shell(tmp_path)(
        "-m", *digits_words("backend=quanto", "dtype=int8,int4", "evaluation.num_samples=12")
    )
    assert code == 2
    assert "evaluation.num_samples=12" in err
    assert list(tmp_path.iterdir()) == []


def test_every_family_and_data_set_says_what_it_needs():
    assert {name for name, row in FAMILIES.items() if row.needs_path} == {
        "diffusers", "causal_lm", "seq2seq", "vision",
    }  # fmt: skip
    assert {name for name, row in DATASETS.items() if row.read_file} == {
        "prompts", "text", "image_prompts", "pairs", "images",
    }  # fmt: skip


def test_each_place_is_looked_at_once(monkeypatch):
    looked = []
    monkeypatch.setattr("quantlab.planning.ready.check_path", lambda config: looked.append(config.path))
    monkeypatch.setattr(
        "quantlab.running.sweep.open_session", lambda *args, **more: (_ for _ in ()).throw(ConfigError("begun"))
    )
    with pytest.raises(ConfigError, match="begun"):
        run_plan(plan(["backend=quanto", "dtype=int8,int4", "dataset.seed=1,2"], multirun=True))
    assert len(looked) == 2


SUBMITS = """
import sys
from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.planning.ready import check_ready
def told(*words):
    try:
        check_ready(plan(["model=diffusers", "model.path=pipe", "dataset.path=prompts.txt", "dtype=int8", *words]).jobs, True)
        return "ready"
    except ConfigError as error:
        return str(error).partition(":")[0]
print(told("backend=quanto"), told("backend=quanto", "model.components=[prior]"), "torch" in sys.modules)
"""


def test_who_submits_a_pipelines_jobs_reads_its_files_and_imports_no_torch(tmp_path):
    (tmp_path / "pipe" / "unet").mkdir(parents=True)
    (tmp_path / "pipe" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x02" + b"\0" * 7 + b"{}")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    (tmp_path / "pipe" / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "prompts.txt").write_text("\n".join(f"fox {i}" for i in range(300)))
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", SUBMITS], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "ready model.components=prior False", done.stdout + done.stderr
