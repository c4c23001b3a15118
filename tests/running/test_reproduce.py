"""A tracked run is rebuilt from the store alone and run again."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace

import pytest

from quantlab.errors import ConfigError, TrackingError
from quantlab.planning.recipe import own_paths
from quantlab.report.reading import open_reader
from quantlab.report.reproduction import (
    DIFFERENT,
    IDENTICAL,
    WITHIN,
    compare_runs,
    is_of_the_machine,
    reproduction_sheets,
    summary_lines,
)
from quantlab.report.selection import is_candidate
from quantlab.running import export
from quantlab.running.reproduce import finished_job, parse_request, rebuilt
from quantlab.tracking import find_runs, get_run
from quantlab.tracking.tags import CALIBRATION_SHA256
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.comparison_store import shared_sweep
from tests.support.shell import digits_words, make_shell
from tests.support.stores import ROOT, artifact
from tests.support.tables import BACKENDS

WORDS = digits_words("evaluation.num_samples=10")


@pytest.fixture(scope="module")
def swept(template, trained, tmp_path_factory):
    """A folder in which a sweep of two schemes has run; each test takes a copy of it."""
    shell = make_shell(tmp_path_factory.mktemp("swept") / "my work", template, trained)
    shell.rows("-m", *WORDS, "backend=quanto", "dtype=int8,int4")
    return shell


@pytest.fixture(scope="module")
def ids(swept):
    """Run ids of the sweep, by name."""
    return {name: run["run_id"] for name, run in swept.tracked().items()}


@pytest.fixture
def here(ids, swept):
    return swept


@pytest.fixture
def copy(ids, swept, tmp_path):
    """The same folder elsewhere: artifacts are found beside the database, so the store may be moved."""
    shutil.copytree(swept.folder, tmp_path / "elsewhere")
    folder = tmp_path / "elsewhere"
    with closing(sqlite3.connect(folder / "outputs" / "mlflow.db")) as database, database:
        old, new = (f / "outputs" / "mlartifacts" for f in (swept.folder, folder))
        for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
            database.execute(f"UPDATE {table} SET {column} = replace({column}, ?, ?)", (old.as_uri(), new.as_uri()))
    return replace(swept, folder=folder)


def reproduced(shell, run_id, *words):
    code, out, err = shell("reproduce", run_id, *words, "--json")
    assert code in (0, 1), err
    return code, json.loads(out)


def statuses(data):
    return {c["status"] for c in data["checks"]}


# -- the same machine and versions


@pytest.mark.parametrize(
    "name",
    ["quanto int4", *(pytest.param(f, marks=pytest.mark.slow) for f in ("reference", "floor_bf16", "floor_batch"))],
)
def test_a_run_on_the_cpu_is_reproduced_bit_by_bit(here, ids, name):
    run_id = ids[name]
    code, data = reproduced(here, run_id)
    assert code == 0
    assert data["verdict"] == IDENTICAL
    assert statuses(data) == {IDENTICAL}
    assert len(data["checks"]) > 20
    assert data["unseen"] == []
    assert {c["status"] for c in data["samples"]} == {IDENTICAL}
    assert [c for c in data["changes"] if not c["what"].startswith("code ")] == []
    assert {"perf/evaluate_s", "memory/evaluate/peak_rss_bytes"} <= {c["name"] for c in data["times"]}
    (again,) = find_runs(here.store, tags={"quantlab.reproduces": run_id})
    assert again["run_id"] == data["repeated_as"] != run_id
    assert again["tags"]["quantlab.reproduction"] == IDENTICAL
    assert again["tags"]["quantlab.key"] == get_run(here.store, run_id)["tags"]["quantlab.key"]
    assert json.loads(artifact(here.store, again["run_id"], "reproduction.json")) == data


def test_the_terminal_shows_each_number_and_the_times_apart(here, ids):
    code, out, err = here("reproduce", ids["quanto int8"], "-q")
    assert code == 0, err
    assert "quality/latent_rel_mse" in out
    assert "not judged" in out
    assert "0 different" in out
    assert re.search(r"per-sample values: (\d+) of \1 metrics identical in every sample", out)


@pytest.mark.slow
def test_another_process_reproduces_it_too(copy, ids):
    run_id = ids["quanto int4"]
    done = subprocess.run(
        [sys.executable, "-m", "quantlab", "reproduce", run_id, "--json"],
        cwd=copy.folder,
        text=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == IDENTICAL


@pytest.mark.slow
def test_the_cache_of_outputs_is_not_asked(copy, ids):
    for file in (copy.folder / "outputs" / "cache" / "reference").iterdir():
        file.write_bytes(b"nonsense")
    code, data = reproduced(copy, ids["quanto int4"])
    assert (code, data["verdict"]) == (0, IDENTICAL)


@pytest.mark.slow
def test_a_repetition_is_no_part_of_sweeps_and_comparisons(copy, ids):
    _, data = reproduced(copy, ids["quanto int4"])
    rows = copy.rows("-m", *WORDS, "backend=quanto", "dtype=int8,int4")
    assert rows["quanto int4"]["run_id"] == ids["quanto int4"]
    code, out, err = copy("compare", "experiment=quantlab", "--json")
    assert code == 0, err
    listed = [r["run_id"] for group in json.loads(out)["groups"] for r in group["rows"]]
    assert ids["quanto int4"] in listed
    assert data["repeated_as"] not in listed


@pytest.mark.slow
def test_a_run_is_reproduced_with_its_own_number_of_threads(copy):
    import torch

    before = torch.get_num_threads()
    try:
        run_id = copy.rows(*WORDS, "backend=quanto", "num_threads=2")["quanto int8"]["run_id"]
        torch.set_num_threads(1)
        code, data = reproduced(copy, run_id)
        assert torch.get_num_threads() == 1, "a run leaves them as they were"
        assert (code, data["verdict"]) == (0, IDENTICAL)
        assert "torch threads" not in {c["what"] for c in data["changes"]}
        code, data = reproduced(copy, run_id, "num_threads=1")
        assert code == 0
        assert [(c["was"], c["now"]) for c in data["changes"] if c["what"] == "torch threads"] == [("2", "1")]
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scheme", [("backend=torchao", "dtype=int8", "algorithm=awq"), ("backend=gguf", "dtype=q4_k", "algorithm=imatrix")]
)
def test_a_calibrated_run_is_reproduced_bit_by_bit(copy, scheme):
    rows = copy.rows(*WORDS, *scheme)
    code, data = reproduced(copy, [*rows.values()][-1]["run_id"])
    assert (code, statuses(data)) == (0, {IDENTICAL})


# -- weights


def test_weights_that_are_not_in_the_cache_come_from_the_store(copy, ids):
    shutil.rmtree(copy.folder / "outputs" / "cache")
    code, data = reproduced(copy, ids["quanto int4"])
    assert (code, data["verdict"]) == (0, IDENTICAL)
    (folder,) = [f for f in (copy.folder / "outputs" / "cache" / "models").iterdir() if f.is_dir()]
    assert {f.name for f in folder.iterdir()} >= {"model.safetensors", "judge.safetensors"}
    code, again = reproduced(copy, data["repeated_as"])  # a repetition can be repeated
    assert (code, again["verdict"]) == (0, IDENTICAL)


@pytest.mark.parametrize("more", ["export: {path: SOMEWHERE}", "output_dir: SOMEWHERE", "tracking: {uri: none}"])
def test_a_stores_recipe_says_nothing_of_where_things_go(copy, ids, tmp_path, monkeypatch, more):
    """The store may be another person's, and its recipe be written by hand."""
    monkeypatch.chdir(copy.folder)
    reader, run_id = open_reader(TrackingConfig(), copy.folder), ids["quanto int8"]
    [run] = reader.by_id([run_id])
    file = copy.folder / "outputs" / "mlartifacts" / run_id / "artifacts" / "recipe.yaml"
    (tmp_path / "scratch").mkdir()
    before = rebuilt({}, reader, run, {}, tmp_path / "scratch").config
    file.write_text(file.read_text() + more.replace("SOMEWHERE", str(tmp_path / "somewhere")) + "\n")
    assert rebuilt({}, reader, run, {}, tmp_path / "scratch").config == before


@pytest.mark.slow
def test_weights_in_the_cache_that_are_others_are_not_used(copy, ids):
    from safetensors.torch import save_file

    from quantlab.models.digits_dit import MODEL_FILE, _read_weights
    from quantlab.modules.layers import state_digest

    (folder,) = [f for f in (copy.folder / "outputs" / "cache" / "models").iterdir() if f.is_dir()]
    state, header = _read_weights(folder / MODEL_FILE)
    state = {k: v * 1.01 for k, v in state.items()}
    save_file(state, folder / MODEL_FILE, metadata={**header, "weights_sha256": state_digest(state)})
    code, data = reproduced(copy, ids["quanto int4"])
    assert (code, data["verdict"]) == (0, IDENTICAL)
    assert "weights_sha256" not in {c["what"] for c in data["changes"]}


def test_lost_weights_are_an_error_that_says_so(copy, ids):
    run_id = ids["quanto int4"]
    shutil.rmtree(copy.folder / "outputs" / "cache")
    for folder in (copy.folder / "outputs" / "mlartifacts").glob("*/artifacts/model"):
        shutil.rmtree(folder)
    code, _, err = copy("reproduce", run_id)
    assert code == 2
    assert f"reproduce {run_id}: the weights sha256:" in err
    assert "pass model.path=FOLDER with their model.safetensors and judge.safetensors" in err


# -- what has changed


def test_changed_numbers_and_versions_are_told(copy, ids):
    run_id = ids["quanto int4"]
    environment = copy.folder / "outputs" / "mlartifacts" / run_id / "artifacts" / "environment.json"
    data = json.loads(environment.read_text())
    data["versions"]["torch"] = "2.0.0"
    environment.write_text(json.dumps(data))
    with closing(sqlite3.connect(copy.folder / "outputs" / "mlflow.db")) as database, database:
        database.execute(
            "UPDATE latest_metrics SET value = value * 9 WHERE key LIKE 'quality/latent_rel_mse%' AND "
            "key NOT LIKE '%/n' AND run_uuid = ?",
            (run_id,),
        )
        database.execute("DELETE FROM tags WHERE key = 'quantlab.artifact_sha256' AND run_uuid = ?", (run_id,))
    code, found = reproduced(copy, ids["quanto int4"])
    assert code == 1
    assert found["verdict"] == DIFFERENT
    assert [c["name"] for c in found["checks"] if c["status"] == DIFFERENT] == ["quality/latent_rel_mse"]
    (torch,) = [c for c in found["changes"] if c["what"] == "torch"]
    assert torch["was"] == "2.0.0"
    assert torch["now"].startswith("2.")


ENVIRONMENT = {
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "git": {"sha": "a"},
    "hardware": {"torch_threads": 8},
}
BASE = {
    "quality/kld_mean": 0.5,
    "quality/kld_mean/ci_lo": 0.4,
    "quality/kld_mean/ci_hi": 0.6,
    "quality/kld_mean/n": 40.0,
    "quality/n_identical": 198.0,
    "quality/n_identical/n": 200.0,
    "quality/step_sqnr_db/0": 30.0,
    "memory/weights_bytes": 1000.0,
    "perf/evaluate_s": 5.0,
    "memory/load/peak_rss_bytes": 7.0,
    "quality/weighted_velocity_mse": 1.0,
    "quality/weighted_velocity_mse/se": 0.1,
    "quality/weighted_velocity_mse/n": 2.0,
}


def compared(environment=None, **changed):
    was = {"run_id": "a", "name": "x", "metrics": BASE, "tags": {"quantlab.weights_sha256": "1"}}
    metrics = {**BASE, **{k: v for k, v in changed.items() if v is not None}}
    now = {
        **was,
        "run_id": "b",
        "metrics": {k: v for k, v in metrics.items() if k not in changed or changed[k] is not None},
    }
    samples = {"sample_id": ["a", "b"], "kld_mean": [0.1, 0.9]}
    return compare_runs(was, now, (samples, samples), (ENVIRONMENT, environment or ENVIRONMENT))


@pytest.mark.parametrize(
    ("name", "now", "status"),
    [
        ("quality/kld_mean", 0.5, IDENTICAL),
        ("quality/kld_mean", 0.5 + 1e-16 * 2, WITHIN),
        ("quality/kld_mean", 0.6, WITHIN),
        ("quality/kld_mean", 0.61, DIFFERENT),
        ("quality/kld_mean", 0.39, DIFFERENT),
        ("quality/kld_mean", None, DIFFERENT),
        ("quality/kld_mean/n", 39.0, DIFFERENT),
        ("quality/kld_mean/ci_hi", 0.7, WITHIN),
        ("quality/n_identical", 197.0, WITHIN),
        ("quality/n_identical", 150.0, DIFFERENT),
        ("quality/step_sqnr_db/0", 30.001, WITHIN),
        ("quality/step_sqnr_db/0", 31.0, DIFFERENT),
        ("quality/weighted_velocity_mse", 1.19, WITHIN),
        ("quality/weighted_velocity_mse", 1.2, DIFFERENT),
        ("memory/weights_bytes", 1001.0, DIFFERENT),
        ("perf/evaluate_s", 500.0, IDENTICAL),
        ("memory/load/peak_rss_bytes", 9.0, IDENTICAL),
    ],
)
def test_when_a_number_counts_as_the_same(name, now, status):
    found = compared(**{name: now})
    assert found.verdict == status
    assert {c.name for c in found.times} == {"perf/evaluate_s", "memory/load/peak_rss_bytes"}
    assert sum(c.status != IDENTICAL for c in found.checks) == (status != IDENTICAL)
    rows = reproduction_sheets(found)[0].rows
    assert len(rows) >= 5
    assert {now for _, was, _, now, verdict in rows if was and verdict == IDENTICAL} == {"="}, "said once"
    assert all(now != "=" for *_, now, verdict in rows if verdict != IDENTICAL)


@pytest.mark.parametrize("name", ["memory/needed_bytes", "memory/load/baseline_rss_bytes", "perf/warm_up_s"])
def test_what_a_stage_happened_to_find_or_take_is_no_number_of_the_scheme(name):
    assert is_of_the_machine(name)


def test_versions_code_hardware_and_new_numbers_are_listed():
    now = {
        "versions": {"python": "3.12.0", "torch": "2.13.0", "gguf": "1"},
        "git": {"sha": "b"},
        "hardware": {"torch_threads": 1},
    }
    found = compared(now, **{"quality/psnr_db": 40.0})
    told = {c.what: (c.was, c.now) for c in found.changes}
    assert told == {
        "python": ("3.11.7", "3.12.0"),
        "gguf": ("-", "1"),
        "code sha": ("a", "b"),
        "torch threads": ("8", "1"),
    }
    assert found.unseen == ("quality/psnr_db",)
    assert found.verdict == IDENTICAL
    assert "changed: python: 3.11.7 -> 3.12.0" in summary_lines(found)


# -- bad requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "reproduce: no run ids given; write quantlab reproduce RUN_ID"),
        (["a", "b"], "reproduce: 2 run ids given; write quantlab reproduce"),
        (["a", "--jsn"], "--jsn: no such option of reproduce; did you mean --json?; there are --json, -q"),
        (["a", "dtype=int8"], "dtype=int8: a run is reproduced as it was; only tracking.uri, device"),
        (["a", "num_thread=1"], "did you mean num_threads"),
    ],
)
def test_bad_words(words, message):
    with pytest.raises(ConfigError) as caught:
        parse_request(words)
    assert message in str(caught.value)


@pytest.mark.parametrize("key", own_paths(["transformer"]))
def test_every_file_of_the_users_own_may_lie_elsewhere(key):
    assert parse_request(["0123abc", f"{key}=there"]).words == {key: "there"}
    assert export.parse_request(["0123abc", "out", f"{key}=there"]).words == {key: "there"}


def test_calibration_data_that_are_others_are_named():
    one, two = ({"run_id": "a", "name": "n", "metrics": {}, "tags": {CALIBRATION_SHA256: c}} for c in "12")
    (change,) = compare_runs(one, two, ({}, {}), ({}, {})).changes
    assert (change.what, change.was, change.now) == ("calibration_sha256", "1", "2")


def test_an_unknown_id_a_sweep_and_no_store(here, ids, tmp_path):
    code, _, err = here("reproduce", "0123abc")
    assert code == 2
    assert err.startswith("quantlab: reproduce 0123abc: no such run in sqlite:///")
    assert "tracking.uri=... names another store" in err
    parent = ids["sweep"]
    code, _, err = here("reproduce", parent)
    assert code == 2
    assert f"reproduce {parent}: is the whole sweep 'sweep'; give one of its jobs:" in err
    jobs = [line.split(maxsplit=1)[1].strip() for line in err.splitlines()[1:]]
    assert jobs == ["reference", "floor_bf16", "floor_batch", "quanto int8", "quanto int4"]
    code, _, err = replace(here, folder=tmp_path)("reproduce", parent)
    assert code == 2
    assert "tracking.uri=sqlite:///outputs/mlflow.db: no such file" in err


def test_a_failed_run_and_a_lost_recipe(copy, ids, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    run_id = ids["quanto int4"]
    (copy.folder / "outputs" / "mlartifacts" / run_id / "artifacts" / "recipe.yaml").unlink()
    code, _, err = copy("reproduce", run_id)
    assert code == 2
    assert f"reproduce {run_id}: its recipe.yaml is not among the store's artifacts any more" in err
    with monkeypatch.context() as patch:
        patch.setattr(BACKENDS["gguf"], "quantize", broken)
        copy(*WORDS, "backend=gguf", "sweep.floors=false", "-q")
    failed = copy.tracked("FAILED")["gguf q8_0"]["run_id"]
    code, _, err = copy("reproduce", failed)
    assert code == 2
    assert f"reproduce {failed}: 'gguf q8_0' is FAILED at quantize (RuntimeError: out of luck)" in err
    assert "quantlab recipe=FILE" in err


def test_a_repetition_that_fails_is_a_tracked_failure(copy, ids, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    run_id = ids["quanto int4"]
    monkeypatch.setattr(BACKENDS["quanto"], "quantize", broken)
    code, _, err = copy("reproduce", run_id, "-q")
    assert code == 1
    assert "quanto int4: failed with RuntimeError: out of luck" in err
    assert copy.tracked("FAILED")["quanto int4"]["tags"]["quantlab.reproduces"] == run_id


def test_latest_is_the_newest_job_that_quantized_in_this_experiment(template):
    reader = open_reader(TrackingConfig(), shared_sweep(template).folder)
    found = finished_job(reader, "latest", "reproduce", "quantlab")
    jobs = reader.of_experiment(reader.experiments()["quantlab"], {"quantlab.kind": "job"})
    assert found == next(run for run in jobs if run.status == "FINISHED" and is_candidate(run))
    with pytest.raises(TrackingError, match="tracking.experiment=other: no such experiment"):
        finished_job(reader, "latest", "reproduce", "other")
