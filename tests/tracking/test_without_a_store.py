"""``tracking=none``: a run's folder is all there is of it; it is found, compared, repeated and resumed, without MLflow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.report.reading import FolderReader, open_reader, read_json
from quantlab.tracking import close_orphans, find_records, open_store, push_pending
from quantlab.tracking.tags import PARENT_RUN_ID
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.shell import Shell

ROOT = Path(__file__).parents[2]
NONE = TrackingConfig(uri="none")


def made(base, config=NONE):
    """A sweep and its job in ``outputs/runs``; their ids."""
    store, runs = open_store(config, base), base / "outputs" / "runs"
    with store.start_run("sweep", runs / "1-sweep", {}, {"quantlab.kind": "sweep"}) as sweep:
        parent = sweep.run_id
        run = store.start_run("a", runs / "2-a", {"x": 1}, {"quantlab.kind": "job"}, parent)
        with run:
            run.log_json({"name": "a"}, "report.json")
    return parent, run.run_id


def test_runs_are_read_from_their_folders(tmp_path):
    sweep, run = made(tmp_path)
    assert sweep.startswith("local-")
    reader = open_reader(NONE, tmp_path)
    assert isinstance(reader, FolderReader)
    [job] = reader.of_experiment("0", {PARENT_RUN_ID: sweep})
    assert (job.run_id, job.name, job.status, job.params) == (run, "a", "FINISHED", {"x": "1"})
    assert reader.of_experiment("0", {PARENT_RUN_ID: f"%{sweep[6:]}%"}) == [job]
    assert reader.by_id(["nowhere", run]) == [job]
    assert read_json(reader, job, "report.json") == {"name": "a"}
    (tmp_path / "page.html").write_text("x")
    assert reader.add_artifact(job, tmp_path / "page.html", "reports")
    assert reader.read_artifact(job, "reports/page.html") == b"x"


@pytest.mark.parametrize("command", ["compare sweep=latest", "reproduce latest", "export latest out", "status"])
def test_who_reads_is_told_of_it_as_a_run_is(command, tmp_path):
    """A run takes ``tracking=none``; those that read its store knew ``tracking.uri=none`` alone."""
    shell = Shell(tmp_path)
    said = [shell(*command.split(), word) for word in ("tracking.uri=none", "tracking=none")]
    assert said[0] == said[1]
    assert "tracking=none" not in said[1][2]


def test_a_page_is_written_over_no_file_that_a_link_leads_to(tmp_path):
    """The folder of the runs may be another person's."""
    _, run = made(tmp_path)
    reader = open_reader(NONE, tmp_path)
    [job] = reader.by_id([run])
    mine, page = tmp_path / "mine.txt", tmp_path / "page.html"
    mine.write_text("mine")
    page.write_text("x")
    place = Path(job.artifact_uri, "reports")
    place.mkdir()
    (place / "page.html").symlink_to(mine)
    assert reader.add_artifact(job, page, "reports")
    assert [file.name for file in place.iterdir()] == ["page.html"]
    assert ((place / "page.html").read_text(), mine.read_text()) == ("x", "mine")
    (place / "page.html").unlink()
    place.rmdir()
    place.write_text("a file")
    assert not reader.add_artifact(job, page, "reports")


def test_the_folders_are_read_where_the_usual_store_was_never_made(tmp_path):
    _, run = made(tmp_path)
    assert [r.run_id for r in open_reader(TrackingConfig(), tmp_path).by_id([run])] == [run]


def test_a_later_store_is_not_told(tmp_path):
    made(tmp_path)
    store = open_store(TrackingConfig(), tmp_path)
    runs = tmp_path / "outputs" / "runs"
    assert push_pending(store, runs) == []
    assert close_orphans(store, runs) == []
    assert store.run_ids("") == []
    assert len(find_records(runs, {})) == 2


def python(code, folder):
    """Run code in a process of its own that has no MLflow, and return what it prints as JSON."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    head = "import sys; sys.modules['mlflow'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", head + code], env=env, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_no_mlflow_is_needed_to_write_and_to_read(tmp_path):
    code = """
import json, pathlib
from quantlab.report.reading import open_reader
from quantlab.tracking import find_runs, open_store, push_pending
from quantlab.vocabulary.schema import TrackingConfig
config, here = TrackingConfig(uri="none"), pathlib.Path(".").absolute()
store = open_store(config, here)
with store.start_run("a", here / "outputs/runs/a", {"x": 1}, {"quantlab.kind": "job"}) as run:
    run.log_metrics({"quality/psnr_db": 3.0})
push_pending(store, here / "outputs/runs")
print(json.dumps([r.name for r in open_reader(config, here).of_experiment("0", {})]))
"""
    assert python(code, tmp_path) == ["a"]
    assert not (tmp_path / "outputs" / "mlflow.db").exists()


@pytest.mark.slow
def test_run_load_compare_reproduce_and_resume(tmp_path):
    code = """
import json, pathlib
import quantlab
from tests.support.tiny_text_models import TEXT, save_llama
save_llama(pathlib.Path("llama"))
pathlib.Path("text.txt").write_text(TEXT)
words = ["model=causal_lm", "model.path=llama", "dataset=text", "dataset.path=text.txt", "tracking=none", "device=cpu",
         "evaluation.num_samples=4", "evaluation.context_length=64", "sweep.candidates=[{backend: quanto, dtype: int8}]"]
first = quantlab.run(overrides=words, quiet=True)
again = quantlab.run(overrides=words, quiet=True)
loaded = quantlab.load()
from quantlab.commands import show_comparison
from quantlab.running.reproduce import parse_request, reproduce
show_comparison(["sweep=latest", "tracking.uri=none", "--json"])
found = reproduce(parse_request([first[-1].run_id, "tracking.uri=none", "-q"]))
print(json.dumps([[r.is_resumed for r in again], again.layers.equals(first.layers), len(loaded), len(loaded.layers),
                  "quanto" in first.compare(), "quanto" in again.compare(), str(found.verdict)]))
"""
    resumed, same_layers, num, num_layers, *compared, verdict = python(code, tmp_path)
    assert all(resumed)
    assert same_layers
    assert num == len(resumed)
    assert num_layers > 0
    assert compared == [True, True]
    assert verdict == "identical"
    assert not list(tmp_path.glob("outputs/*.db"))
