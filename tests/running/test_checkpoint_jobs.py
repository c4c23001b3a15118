"""Checkpoints that other libraries made as rows of a comparison: scored beside our own, found again, refused in words."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml

from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.planning.trust import require_trust
from quantlab.report.table import said_beside
from tests.support.foreign import LANGUAGE
from tests.support.shell import text_words
from tests.support.stores import artifact
from tests.support.tiny_text_models import TEXT


@pytest.fixture
def words(shell, foreign):
    """A short run on the tiny Llama, in a folder with its checkpoints."""
    (shell.folder / "text.txt").write_text(TEXT)
    for file in ("llama", *(name for name in LANGUAGE if "modelopt" not in name)):
        (shell.folder / file).symlink_to(foreign / file)
    return [
        "model=causal_lm",
        "model.path=llama",
        "dataset=text",
        "dataset.path=text.txt",
        *(w for w in text_words("cpu") if not w.startswith("calibration")),
    ]


def candidates(*entries):
    listed = ",".join("{" + ",".join(f"{k}:{v}" for k, v in entry.items()) + "}" for entry in entries)
    return f"sweep.candidates=[{listed}]"


def quality(row):
    return {k: v for k, v in row["metrics"].items() if k.startswith("quality/")}


@pytest.mark.slow
def test_five_checkpoints_of_others_beside_our_own(shell, words, foreign_modelopt):
    """One that quantizes the same layers by the same library has the same numbers, to the last digit."""
    (shell.folder / "modelopt_int8").symlink_to(foreign_modelopt / "modelopt_int8")
    asked = candidates(*({"checkpoint": name} for name in LANGUAGE), {"backend": "torchao", "dtype": "int8"})
    rows = shell.rows("-m", *words, asked)
    assert set(rows) == {*LANGUAGE, "torchao int8"}
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    ours, theirs = rows["torchao int8"], rows["torchao_int8"]
    assert quality(ours) == quality(theirs)
    for name in ("memory/weights_bytes", "memory/bits_per_weight_quantized", "quantization/coverage"):
        assert ours["metrics"][name] == theirs["metrics"][name]
    assert rows["bnb_int8"]["metrics"]["quality/other_batch/kld_mean"] > 0
    assert len({row["metrics"]["quality/kld_mean"] for row in rows.values()}) == len(rows) - 1
    run = shell.tracked()["q8_0.gguf"]
    assert run["params"]["checkpoint"] == "q8_0.gguf"
    assert run["params"]["resolved.checkpoint_method"] == "gguf"
    assert run["params"]["resolved.checkpoint_sha256"].startswith("sha256:")
    assert run["metrics"]["memory/disk_bytes_model"] == (shell.folder / "q8_0.gguf").stat().st_size
    layers = json.loads(artifact(shell.store, run["run_id"], "layers.json"))
    assert {row[layers["columns"].index("dtype")] for row in layers["data"]} == {"q8_0"}
    again = shell.rows("-m", *words, asked)
    assert all(row["resumed"] for row in again.values())
    for found in (rows, again):  # whether measured here or read back
        assert found["q8_0.gguf"]["params"]["resolved"] == {"checkpoint_method": "gguf"}
        assert any(text.startswith("gguf:") for text in said_beside(found.values()))
        assert not said_beside([row for name, row in found.items() if name != "q8_0.gguf"])


def test_one_alone_whose_files_change(shell, words):
    """The digest of its files is in the key, wherever they lie; and what it was is told to whoever repeats it."""
    rows = shell.rows(*words, "checkpoint=torchao_int8")
    assert set(rows) == {"torchao_int8"}
    first = shell.tracked()["torchao_int8"]
    recipe = yaml.safe_load(artifact(shell.store, first["run_id"], "recipe.yaml"))
    assert recipe["checkpoint"] == "torchao_int8"
    shutil.copytree(shell.folder / "torchao_int8", shell.folder / "elsewhere")
    shell.rows(*words, "checkpoint=elsewhere", "name=torchao_int8")
    (shell.folder / "elsewhere" / "generation_config.json").write_text("{}")
    shell.rows(*words, "checkpoint=elsewhere", "name=changed")
    runs = shell.tracked()
    assert runs["torchao_int8"]["metrics"]["quality/kld_mean"] == first["metrics"]["quality/kld_mean"]
    digests = {n: run["params"]["resolved.checkpoint_sha256"] for n, run in runs.items()}
    assert digests["torchao_int8"] == first["params"]["resolved.checkpoint_sha256"] != digests["changed"]


def test_a_row_whose_files_have_moved_is_reproduced_where_they_are_now(shell, words, foreign):
    """And files that are others are named as what changed."""
    shell.rows(*words, "checkpoint=torchao_int8", "sweep.floors=false")
    run_id = shell.tracked()["torchao_int8"]["run_id"]
    (shell.folder / "torchao_int8").rename(shell.folder / "moved")
    (shell.folder / "text.txt").rename(shell.folder / "moved.txt")
    code, _, err = shell("reproduce", run_id, "dataset.path=moved.txt")
    assert code == 2
    assert "checkpoint=torchao_int8: there is no such file or folder" in err
    where = ["dataset.path=moved.txt", "--json"]
    code, out, err = shell("reproduce", run_id, "checkpoint=moved", *where)
    assert (code, json.loads(out)["verdict"]) == (0, "identical"), err
    code, out, err = shell("reproduce", run_id, "checkpoint=bnb_int8", *where)
    assert (code, json.loads(out)["verdict"]) == (1, "different"), err
    assert "checkpoint_sha256" in {change["what"] for change in json.loads(out)["changes"]}


def test_a_checkpoint_of_another_model_is_a_failed_row(shell, words):
    (shell.folder / "broken.gguf").write_bytes(b"GGUF")
    code, out, _ = shell("-m", *words, candidates({"checkpoint": "broken.gguf"}, {"checkpoint": "bnb_nf4"}), "--json")
    assert code == 1
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["bnb_nf4"]["status"] == "FINISHED"
    assert rows["broken.gguf"]["status"] == "FAILED"
    assert "checkpoint=broken.gguf: not a readable GGUF file" in rows["broken.gguf"]["error"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["dtype=int8"], "checkpoint=bnb_nf4: it is quantized already, and dtype=int8 has nothing to choose"),
        (["backend=quanto"], "it is quantized already, and backend=quanto has nothing"),
        (["quantization.algorithm=hqq"], "it is quantized already, and quantization.algorithm=hqq"),
        (["checkpoint=nowhere/at/all"], "checkpoint=nowhere/at/all: there is no such file or folder"),
        (["checkpoint=./gone"], "checkpoint=./gone: there is no such file or folder"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(shell, words, more, told):
    code, _, err = shell(*words, *([] if more[0].startswith("checkpoint") else ["checkpoint=bnb_nf4"]), *more)
    assert code == 2
    assert told in err
    assert not list((shell.folder / "outputs").glob("runs/*"))


def test_a_recipe_of_others_asks_before_it_reads_a_checkpoint(shell, tmp_path):
    file = tmp_path / "theirs.yaml"
    file.write_text("# @package _global_\ncheckpoint: ~/theirs.gguf\n")
    made = plan([f"recipe={file}"])
    assert made.asked_for["checkpoint"] == "~/theirs.gguf"
    with pytest.raises(ConfigError, match="checkpoint = ~/theirs"):
        require_trust(made, False)


def test_an_absolute_path_is_left_open_in_what_a_run_writes(foreign):
    (job,) = plan(["model=causal_lm", "model.path=llama", f"checkpoint={foreign}/bnb_nf4"]).jobs
    assert "checkpoint: ???" in job.recipe_yaml
    assert str(foreign) not in job.recipe_yaml
    assert f"checkpoint: {foreign}/bnb_nf4" in job.whole_yaml


def test_a_plan_of_bytes_says_what_it_does_not_know(shell, words):
    code, out, _ = shell("plan", *words, "checkpoint=bnb_nf4")
    assert code == 2
    assert "checkpoint=bnb_nf4: its bytes are those of its files" in " ".join(out.split())
