"""A sweep on a cluster, from the side that submits: it loads nothing; the nodes' rows are those of a serial run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import psutil
import pytest

from quantlab.errors import ConfigError
from quantlab.planning.plan import plan
from quantlab.running import far, handing, sweep, workbench, worker
from quantlab.running.attempts import JOB
from quantlab.running.claims import Claims
from quantlab.running.known import Known
from quantlab.tracking.tags import PID, PID_STARTED
from tests.support.engines import Inline
from tests.support.shell import digits_words
from tests.support.stores import ROOT
from tests.support.tiny_pipelines import BUILDERS

WORDS = (
    "-m",
    *digits_words("backend=quanto", "dtype=int8,int4", "evaluation.num_samples=10", "tracking.save_checkpoint=false"),
)
FAR = (*WORDS, "launcher=slurm")
ROWS = ["reference", "floor_bf16", "floor_batch", "quanto int8", "quanto int4"]


@pytest.fixture
def node(monkeypatch):
    """The cluster; and whoever submits to it has no device, and may not load."""
    pytest.importorskip("submitit")
    engine = Inline()
    monkeypatch.setattr(handing, "open_engine", lambda *_: engine)
    monkeypatch.setattr(worker, "_SESSIONS", {})

    def refuse(*_):
        raise AssertionError("the submitting side loads nothing")

    monkeypatch.setattr(sweep, "workbench", refuse)
    monkeypatch.setattr(sweep, "prepare_device", refuse)
    return engine


def numbers(rows):
    """What may not depend on where a row was computed."""
    of = ("quality/", "quantization/", "memory/weights_bytes")
    return {name: {k: v for k, v in row["metrics"].items() if k.startswith(of)} for name, row in rows.items()}


@pytest.mark.slow
def test_rows_are_those_of_the_serial_run_and_are_found_again(shell, node):
    before = _serial(shell)
    rows = shell.rows(*FAR, "sweep.force=true")
    assert node.submitted == [far.NAME, "quanto int8", "quanto int4"]
    assert list(rows) == list(before) == ROWS
    assert numbers(rows) == numbers(before)
    assert not any(row["resumed"] for row in rows.values())
    tracked = shell.tracked()
    assert {tracked[name]["tags"]["mlflow.parentRunId"] for name in ROWS} == {tracked["sweep"]["run_id"]}
    assert tracked["sweep"]["tags"]["quantlab.device"] == "cpu"
    again = shell.rows(*FAR)
    assert node.submitted == [far.NAME, "quanto int8", "quanto int4"], "nothing is asked of the cluster"
    assert numbers(again) == numbers(before)
    assert all(row["resumed"] for row in again.values())
    one_more = shell.rows(*(word.replace("int8,int4", "int8,int4,int2") for word in FAR))
    assert node.submitted[3:] == ["quanto int2"], "and the reference is known"
    assert one_more["quanto int2"]["metrics"]["quality/floor_bf16/latent_rel_mse"] > 0


@pytest.mark.slow
def test_one_scheme_in_two_words_is_given_to_the_cluster_once(shell, node):
    words = ["backend=modelopt", "dtype=int4", "group_size=auto,128,64", "quantization.on_mismatch=skip"]
    model = digits_words("evaluation.num_samples=10", "tracking.save_checkpoint=false", "launcher=slurm")
    rows = shell.rows("-m", *words, *model)
    assert list(rows) == [*ROWS[:3], "modelopt int4", "modelopt int4 g64"]
    assert node.submitted == [far.NAME, "modelopt int4", "modelopt int4 g64"]


@pytest.mark.slow
def test_the_unquantized_model_comes_along_with_the_reference(shell, node):
    words = digits_words("evaluation.num_samples=10", "tracking.save_checkpoint=false")
    for num in (1, 2):
        rows = shell.rows("-m", "backend=none,quanto", *words, "launcher=slurm")
        assert list(rows) == ROWS[:4], num
    assert node.submitted == [far.NAME, "quanto int8"]
    code, out, _ = shell("-m", "backend=none", *words, "launcher=slurm", "--json")
    assert [row["name"] for row in json.loads(out)] == ROWS[:3]
    assert code == 0


def _serial(shell):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "workbench", workbench.workbench)
        patch.setattr(sweep, "prepare_device", workbench.prepare_device)
        return shell.rows(*WORDS)


@pytest.mark.slow
def test_a_sweep_that_leaves_hands_all_over_behind_the_reference(shell, node):
    rows = shell.rows(*FAR, "launcher.detach=true")
    assert [row["status"] for row in rows.values()] == ["SUBMITTED"] * 2
    assert node.submitted == [far.NAME, "quanto int8", "quanto int4"]
    assert node.after == {"i0": [], "i1": ["i0"], "i2": ["i0"]}
    node.run_one()
    node.run_one()  # one job is over when the command is given again, and one waits
    rows = shell.rows(*FAR)
    assert list(rows) == ROWS
    assert len(node.submitted) == 3, "nothing is computed twice"
    assert {row["status"] for row in rows.values()} == {"FINISHED"}
    assert rows["quanto int4"]["metrics"]["quality/floor_batch/latent_rel_mse"] >= 0


@pytest.mark.slow
def test_a_sweep_that_leaves_gives_the_cluster_no_second_job_of_the_reference(shell, node):
    model = digits_words("evaluation.num_samples=10", "tracking.save_checkpoint=false")
    words = ("-m", "backend=none,quanto", *model, "launcher=slurm")
    rows = shell.rows(*words, "launcher.detach=true")
    assert node.submitted == [far.NAME, "quanto int8"]
    assert [(row["name"], row["status"]) for row in rows.values()] == [("quanto int8", "SUBMITTED")]
    assert list(shell.rows(*words)) == ROWS[:4]
    assert node.submitted == [far.NAME, "quanto int8"]


@pytest.mark.slow
def test_a_search_asks_the_cluster_for_its_points(shell, node):
    pytest.importorskip("optuna")
    words = [word.replace("int8,int4", "int8,int4,int2") for word in FAR]
    rows = shell.rows(*words, "sweep.search.num_trials=2", "launcher.num_workers=2", "sweep.search.sampler=random")
    assert list(rows)[:3] == ROWS[:3]
    assert len(rows) == 5
    assert node.submitted[0] == far.NAME
    assert len(node.submitted) == 3
    assert {row["status"] for row in rows.values()} == {"FINISHED"}


def test_a_search_does_not_leave(shell, node):
    code, out, err = shell(*FAR, "sweep.search.num_trials=2", "launcher.num_workers=2", "launcher.detach=true")
    assert code == 2
    assert "launcher.detach=true: a search" in err
    assert node.submitted == []


def test_what_another_node_would_observe_is_refused_by_what_differs():
    here = workbench.made_by(SimpleNamespace(device="cpu"))
    known = partial(Known, protocol="", dtype="", judge_sha256="", default=(), classes={}, tags={})
    wanted = known(reference_key="a", made=here, left_out=(), is_brought=False)
    check = partial(workbench._check_same_reference, model=SimpleNamespace(device="cpu"))
    check(None, "b")
    check(wanted, "a")
    with pytest.raises(ConfigError, match=r"^model.path: .* files have changed"):
        check(wanted, "b")
    gpu = replace(wanted, made={**here, "device": "cuda"})
    with pytest.raises(ConfigError, match=r"^device=cpu: .*\(device: cuda there and cpu here\).*launcher.settings"):
        check(gpu, "b")


@pytest.mark.slow
def test_a_reference_that_another_sweep_observes_is_waited_for(shell, node):
    """That sweep ends without it, so it is asked for here; a file of the user's own is not taken for what it left."""
    (shell.folder / "reference.json").write_text('{"known": {}, "rows": {}}')
    with contextlib.chdir(shell.folder), subprocess.Popen(["sleep", "8"]) as other:
        job = plan([*FAR[1:], "sweep.floors=false"], multirun=True).jobs[0]
        claims = Claims(shell.folder / "outputs" / "claims")
        started = f"{psutil.Process(other.pid).create_time():.2f}"
        claims._me = {**claims._me, PID: str(other.pid), PID_STARTED: started}
        assert claims.take(far._claim(replace(job, name=far.NAME)), far.NAME) is None
        rows = shell.rows(*FAR, "sweep.floors=false")
        assert other.wait(0) == 0
        claims._over.set()
    assert [row["status"] for row in rows.values()] == ["FINISHED"] * 2
    assert node.submitted[0] == far.NAME


def test_a_reference_that_fails_makes_rows_that_say_so(shell, node, monkeypatch):
    monkeypatch.setattr("quantlab.running.observing.workbench", lambda *_: 1 / 0)
    code, out, err = shell(*FAR, "--json")
    assert code == 1
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["quanto int8", "quanto int4"]
    for row in rows:
        assert row["status"] == "FAILED"
        assert row["failed_stage"] == "reference"
        assert row["error"].startswith("its reference failed: ZeroDivisionError")
        assert "worker.log" in row["error"]
    assert node.submitted == [far.NAME]


@pytest.mark.slow
def test_a_node_of_another_kind_is_no_row_beside_the_others(shell, node, monkeypatch):
    """The reference came from a GPU, and the job's node has none."""

    def other_node(folder):
        data = json.loads((folder / JOB).read_text())
        if data["known"]:
            worker._SESSIONS.clear()
            data["known"]["reference_key"] = "of a GPU"
            data["known"]["made"]["device"] = "cuda"
            (folder / JOB).write_text(json.dumps(data))
        return work(folder)

    work = worker._work
    monkeypatch.setattr(worker, "_work", other_node)
    code, out, err = shell(*FAR, "sweep.floors=false", "--json")
    assert code == 1, err
    rows = json.loads(out)
    assert [row["name"] for row in rows] == ["quanto int8", "quanto int4"]
    for row in rows:
        assert row["status"] == "FAILED"
        assert "observed on another kind of node (device: cuda there and cpu here)" in row["error"]


@pytest.mark.slow
def test_a_sweep_that_ends_early_was_at_its_jobs_as_one_here_is(shell, node, monkeypatch):
    def interrupted(folder):
        if json.loads((folder / JOB).read_text())["known"]:
            raise KeyboardInterrupt
        return work(folder)

    work = worker._work
    monkeypatch.setattr(worker, "_work", interrupted)
    assert shell(*FAR, "sweep.floors=false", "-q")[0] == 130
    assert shell.tracked("FAILED")["sweep"]["tags"]["quantlab.stage"] == "jobs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "model"), [("slurm", "digits"), ("ray", "digits"), ("submitit_local", "digits"), ("slurm", "flux")]
)
def test_whoever_submits_imports_no_torch(shell, engine, model):
    """Neither to check, nor to submit, nor to watch: here to an engine that only loses all."""
    pytest.importorskip({"ray": "ray"}.get(engine, "submitit"))
    words = WORDS
    if model == "flux":
        BUILDERS["flux"](shell.folder / "flux")
        (shell.folder / "prompts.txt").write_text("a red fox\nthe blue cat\n")
        words = ("-m", "model=diffusers", "model.path=flux", "dataset.path=prompts.txt", "evaluation.num_samples=2")
        words += ("backend=quanto", "dtype=int8,int4", "device=cpu")
    code = f"""
import sys
from quantlab.cli import main
from quantlab.running import handing
from quantlab.running.attempts import END, write
from tests.support.engines import Simulated

class Nobody(Simulated):
    def submit(self, folders, after=()):
        for folder in folders:
            write(folder, END, {{"code": 1}})
        return super().submit(folders, after)

handing.open_engine = lambda *_: Nobody(0, lost=0, preempted=0, repeated=0, lazy=True)
try:
    main({[*words, f"launcher={engine}"]!r})
except SystemExit as ended:
    print("exit code", ended.code, "torch" in sys.modules)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=shell.folder, env=env, capture_output=True, text=True, check=True, timeout=280
    )
    assert "exit code 1 False" in done.stdout, done.stderr
