"""``quantlab status``: where the jobs of a sweep are, from what lies in the folders."""

from __future__ import annotations

import json

import pytest

from quantlab.cli import main
from quantlab.errors import ConfigError
from quantlab.running.attempts import LOG, begin, write
from quantlab.running.handing import JOBS
from quantlab.running.status import status
from quantlab.tracking.tags import HOST, PID, PID_STARTED
from quantlab.tracking.values import this_process


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of five jobs: one waits, one runs, one finished at its second attempt, one failed, one is lost."""
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "outputs" / "runs"
    folder = runs / "20260101-sweep-a"
    folder.mkdir(parents=True)
    write(folder, "run.json", {"record": "s", "tags": {"quantlab.kind": "sweep"}, "status": "RUNNING"})
    lines = []
    for name in ("waits", "runs", "finished", "failed", "lost"):
        job = runs / f"20260101-{name}"
        job.mkdir()
        lines.append({"name": name, "folder": str(job), "engine": "slurm", "id": "7_0"})
        run = {"name": name, "tags": this_process(), "start_ms": 1000, "end_ms": 61000, "parent_record": "s"}
        if name == "waits":
            continue
        begin(job)
        if name == "finished":
            begin(job)
        (job / LOG).touch()
        status_ = {"finished": "FINISHED", "failed": "FAILED"}.get(name, "RUNNING")
        if name == "lost":
            gone = {"attempt": 1, HOST: this_process()[HOST], PID: "999999999", PID_STARTED: "1.0"}
            write(job, "attempt.json", gone)
            run["tags"] = {}
        write(job, "run.json", {**run, "status": status_, "error": ""})
    (folder / JOBS).write_text("\n".join(map(json.dumps, lines)) + "\n")
    here = runs / "20260101-here"
    here.mkdir()
    write(here, "run.json", {**run, "name": "here", "status": "FINISHED"})
    rows = [{"name": name, "status": "FINISHED"} for name in ("finished", "found")]
    write(folder, "rows.json", {"rows": rows})
    return folder


def test_each_job_is_where_it_is(sweep):
    found = {job.name: (job.state, job.attempt, job.job_id) for job in status([])}
    assert found == {
        "waits": ("queued", 0, "7_0"),
        "runs": ("running", 1, "7_0"),
        "finished": ("finished", 2, "7_0"),
        "failed": ("failed", 1, "7_0"),
        "lost": ("lost", 1, "7_0"),
        "here": ("finished", 1, ""),
        "found": ("finished", 0, ""),
    }
    (finished,) = [job for job in status(["20260101-sweep"]) if job.name == "finished"]
    assert (finished.elapsed_s, finished.node) == (60.0, this_process()[HOST])
    assert finished.log.endswith("finished/worker.log")


@pytest.mark.parametrize("words", [["--json"], []])
def test_the_command(sweep, capsys, words):
    with pytest.raises(SystemExit) as ended:
        main(["status", *words])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert (json.loads(out)[0]["state"] == "queued") if words else ("waits" in out and "running" in out)


@pytest.mark.parametrize("words", [["latest"], ["sweep=latest"], ["local-s"], ["sweep=local-s"], ["sweep-a"]])
def test_a_sweep_is_named_as_for_the_other_commands(sweep, words):
    told = ["tracking.uri=none", "tracking.experiment=mine", "output_dir=outputs"]
    assert status([*words, *told]) == status([])
    (sweep / "tracking").mkdir()
    write(sweep / "tracking", "sent.json", {"uri": "u", "experiment": "e", "run_id": "0abc"})
    assert len(status(["0abc"])) == len(status([]))


@pytest.mark.parametrize("words", [["nothing"], ["sweep=x"], ["sweeep=x"], ["--jsn"]])
def test_what_is_no_sweep_is_refused_with_the_way_out(sweep, words):
    with pytest.raises(ConfigError, match=r"there are 20260101-sweep-a|quantlab status \[SWEEP\]"):
        status(words)
