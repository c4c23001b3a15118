"""A sweep: what it skips, and what it does not do twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.protocols.table import PROTOCOLS
from quantlab.running import resume
from quantlab.tracking import find_runs
from tests.support.shell import digits_words
from tests.support.stores import ROOT, artifact
from tests.support.tables import BACKENDS

WORDS = ("-m", *digits_words("evaluation.num_samples=10"))
FLOORS = ["reference", "floor_bf16", "floor_batch"]


@pytest.fixture
def measured(monkeypatch):
    """How many jobs were really evaluated."""
    protocol, calls = PROTOCOLS["diffusion"], []
    real = protocol.measure
    monkeypatch.setattr(protocol, "measure", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def rows_json(shell):
    parent = shell.tracked()["sweep"]
    return parent, json.loads(artifact(shell.store, parent["run_id"], "rows.json"))["rows"]


def children(shell, parent):
    return {r["name"] for r in find_runs(shell.store, {"mlflow.parentRunId": parent["run_id"]}, status=None)}


def failing(monkeypatch, backend):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(BACKENDS[backend], "quantize", broken)


# -- which jobs there are


@pytest.mark.parametrize(
    ("word", "values"),
    [
        ("evaluation.num_inference_steps=range(4,13,4)", [4, 8, 12]),
        ("evaluation.num_inference_steps=choice(3,7)", [3, 7]),
        ("evaluation.num_inference_steps=5,2", [5, 2]),
    ],
)
def test_ranges_and_choices_of_any_key(word, values):
    jobs = plan(["backend=quanto", word], multirun=True).jobs
    assert [j.config.evaluation.num_inference_steps for j in jobs] == values


def test_a_dry_run_prints_the_jobs_and_runs_none(shell):
    code, out, err = shell(*WORDS, "backend=quanto,torchao", "dtype=int8,nf4", "sweep.dry_run=true")
    assert code == 2, "as the run itself ends"
    assert "3 jobs:" in out
    assert "quanto int8" in out
    assert "impossible: backend=quanto dtype=nf4" in out
    assert shell.tracked(None) == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.isolation=proces"], r"^sweep.isolation=proces: there are auto, none, process"),
        (["sweep.timeout_s=0"], r"^sweep.timeout_s=0: a number above 0, at most"),
        (["sweep.timeout_s=5", "sweep.isolation=none"], r"^sweep.timeout_s=5: only a process can be ended; set"),
        (["sweep.retry_faild=true"], r"^sweep.retry_faild: no such key; did you mean retry_failed"),
        (["launcher=slrm"], r"^launcher=slrm: there are .*did you mean slurm"),
    ],
)
def test_bad_settings_of_a_sweep(words, message):
    with pytest.raises(ConfigError, match=message):
        plan(["backend=quanto", *words])


def test_skipped_combinations_are_rows_with_their_reason(shell):
    words = (*WORDS, "backend=quanto,gguf", "dtype=int8,q8_0", "sweep.on_invalid=skip", "sweep.floors=false")
    code, out, err = shell(*words)
    assert code == 0, err
    assert "backend=quanto dtype=q8_0" in out
    assert "SKIPPED" in out
    assert "skipped: backend=quanto dtype=q8_0: dtype=q8_0: quanto offers " in out
    assert "2 of 4 combinations are impossible" in err
    for run in shell.tracked().values():
        assert run["tags"]["quantlab.stage"] == "done"
        assert run["tags"]["mlflow.source.name"] == " ".join(["quantlab", *words])
    row = rows_json(shell)[1][2]
    assert (row["status"], row["name"]) == ("SKIPPED", "backend=quanto dtype=q8_0")
    assert row["error"].startswith("dtype=q8_0: quanto offers int8")


# -- resume


def test_the_same_command_again_runs_nothing(shell, measured):
    words = (*WORDS, "backend=quanto,gguf")
    first = shell.rows(*words)
    old_parent = rows_json(shell)[0]
    assert len(measured) == 5
    again = shell.rows(*words)
    assert len(measured) == 5
    assert {n: r["metrics"] for n, r in again.items()} == {n: r["metrics"] for n, r in first.items()}
    assert [r["resumed"] for r in again.values()] == [True] * 5
    assert [r["run_id"] for r in again.values()] == [r["run_id"] for r in first.values()]
    assert rows_json(shell)[0]["run_id"] == old_parent["run_id"], "its answer is there"
    shell.rows(*WORDS, "backend=gguf,quanto")
    parent, rows = rows_json(shell)
    assert parent["run_id"] != old_parent["run_id"]
    assert children(shell, parent) == {*FLOORS, "quanto int8", "gguf q8_0"}
    assert [r["resumed"] for r in rows] == [True] * 5

    more = shell.rows(*WORDS, "backend=quanto,gguf,bitsandbytes")
    assert len(measured) == 6, "a larger grid runs what is new"
    assert [n for n, r in more.items() if not r["resumed"]] == ["bitsandbytes nf4"]
    assert "quality/floor_bf16/psnr_db" in more["bitsandbytes nf4"]["metrics"], "floors from the store count"
    assert "resumed: all rows" in shell(*words, "-q")[1]

    shell.rows(*words, "sweep.force=true")
    assert len(measured) == 11


@pytest.mark.slow
def test_what_changes_a_number_is_run_again(shell, measured, monkeypatch):
    words = (*WORDS, "backend=quanto", "dtype=int8,int4", "sweep.floors=false")
    shell.rows(*words)
    shell.rows(*words, "evaluation.num_bootstrap=60")
    assert len(measured) == 4
    shell.rows(*words, "quantization.modules_to_not_convert.own=[proj_out_1]")
    assert len(measured) == 6
    monkeypatch.setattr(resume, "code_digest", lambda: "another version")
    shell.rows(*words)
    assert len(measured) == 8
    monkeypatch.setattr(resume, "versions", lambda: {"optimum-quanto": "9.9"})
    shell.rows(*words)
    assert len(measured) == 10
    monkeypatch.setattr(resume, "versions", lambda: {"optimum-quanto": "9.9", "gguf": "9.9"})
    shell.rows(*words)
    assert len(measured) == 10, "another backend's version changes nothing"


@pytest.mark.slow
def test_failed_jobs_are_retried_or_kept(shell, measured, monkeypatch):
    words = (*WORDS, "backend=quanto,gguf", "sweep.floors=false")
    with monkeypatch.context() as broken:
        failing(broken, "gguf")
        assert shell(*words, "-q")[0] == 1
    assert len(measured) == 1
    code, out, err = shell(*words, "sweep.retry_failed=false", "--json")
    assert code == 1
    assert len(measured) == 1
    kept = {r["name"]: r for r in json.loads(out)}["gguf q8_0"]
    assert (kept["status"], kept["failed_stage"], kept["resumed"]) == ("FAILED", "quantize", True)
    assert kept["error"] == "RuntimeError: out of luck"
    rows = shell.rows(*words)
    assert len(measured) == 2
    assert [r["resumed"] for r in rows.values()] == [True, False]


def test_a_single_run_always_runs(shell, measured):
    words = digits_words("backend=quanto", "evaluation.num_samples=10")
    shell.rows(*words)
    shell.rows(*words)
    assert len(measured) == 5, "three floors once, the job twice"


@pytest.mark.slow
def test_a_lost_report_is_measured_again(shell, measured):
    words = (*WORDS, "backend=quanto", "dtype=int8,int4", "sweep.floors=false")
    first = shell.rows(*words)
    (shell.folder / "outputs" / "mlartifacts" / first["quanto int8"]["run_id"] / "artifacts" / "report.json").unlink()
    again = shell.rows(*words)
    assert len(measured) == 3
    assert [r["resumed"] for r in again.values()] == [False, True]


HANG = """
import pathlib, time
from quantlab.backends import gguf
gguf.quantize = lambda *_, **__: (pathlib.Path("hanging").touch(), time.sleep(600))
"""


@pytest.mark.slow
def test_a_killed_sweep_loses_no_finished_job(shell, tmp_path):
    words = [*WORDS, "backend=quanto,gguf", "sweep.floors=false"]
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(HANG)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path / 'fault'}"}
    sweep = subprocess.Popen([sys.executable, "-m", "quantlab", *words, "-q"], env=env, cwd=shell.folder)
    try:
        until = time.monotonic() + 300
        while not (shell.folder / "hanging").exists():
            assert sweep.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
    finally:
        sweep.send_signal(signal.SIGKILL)
        sweep.wait()
    assert {n for n, r in shell.tracked("RUNNING").items()} == {"sweep", "gguf q8_0"}
    rows = shell.rows(*words)
    assert [(n, r["resumed"]) for n, r in rows.items()] == [("quanto int8", True), ("gguf q8_0", False)]
    assert shell.tracked("RUNNING") == {}
    killed = shell.tracked("KILLED")
    assert set(killed) == {"sweep", "gguf q8_0"}
    assert killed["gguf q8_0"]["tags"]["quantlab.stage"] == "quantize"
    assert children(shell, shell.tracked()["sweep"]) == {"quanto int8", "gguf q8_0"}


@pytest.mark.slow
def test_an_overlapping_sweep_takes_no_row_from_an_earlier_ones_comparison(shell):
    shell.rows(*WORDS, "backend=quanto", "dtype=int8,int4")
    first = shell.tracked()["sweep"]["run_id"]
    rows = shell.rows(*WORDS, "backend=quanto", "dtype=int4,int2")
    second = shell.tracked()["sweep"]
    assert rows["quanto int4"]["resumed"]
    assert children(shell, second) == {*FLOORS, "quanto int4", "quanto int2"}
    for parent, schemes in (
        (first, {"quanto int8", "quanto int4"}),
        (second["run_id"], {"quanto int4", "quanto int2"}),
    ):
        code, out, err = shell("compare", f"sweep={parent}", "--json")
        assert code == 0, err
        (group,) = json.loads(out)["groups"]
        assert {r["name"] for r in group["rows"]} - {*FLOORS} == schemes
