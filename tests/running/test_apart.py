"""Jobs in processes of their own: crashes, timeouts, engines."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from quantlab.errors import MissingPackage
from quantlab.planning.plan import make_job
from quantlab.running.engines import pool, table
from quantlab.running.engines.pool import visible_gpus
from quantlab.running.engines.table import ENGINES, check_launcher
from quantlab.running.handing import runs_apart
from quantlab.tracking import find_runs
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.schema import ExperimentConfig, LauncherConfig, SweepConfig
from tests.support.shell import digits_words
from tests.support.stores import ROOT, artifact
from tests.support.tables import CAPABILITIES

WORDS = ("-m", *digits_words("evaluation.num_samples=10", "sweep.floors=false", "dtype=int8"))
FAULT = """
import os, signal, time
from quantlab.protocols import diffusion
real = diffusion.measure
def measure(candidate, *args, **kwargs):
    if any(type(m).__module__.startswith("optimum.quanto") for m in candidate.components["transformer"].modules()):
        {what}
    return real(candidate, *args, **kwargs)
diffusion.measure = measure
"""


@pytest.fixture
def fault(tmp_path, monkeypatch):
    """Code that the processes of jobs (not this one) run when they evaluate a candidate of quanto's."""

    def put(what):
        folder = tmp_path / "fault"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(FAULT.format(what=what))
        monkeypatch.setenv("PYTHONPATH", str(folder))

    return put


def rows_of(shell, *words):
    code, out, err = shell(*WORDS, *words, "--json")
    return code, {r["name"]: r for r in json.loads(out)}, err


@pytest.mark.slow
def test_a_job_that_crashes_its_process_is_a_failed_row(shell, fault):
    fault("os.kill(os.getpid(), signal.SIGSEGV)")
    code, rows, err = rows_of(shell, "backend=quanto,torchao", "sweep.isolation=process")
    assert code == 1
    row = rows["quanto int8"]
    assert (row["status"], row["failed_stage"]) == ("FAILED", "evaluate")
    assert row["error"].startswith("SIGSEGV: the job's process ended (a segmentation fault in a library); see worker")
    assert row["metrics"]["memory/weights_bytes"] > 0, "what was measured before"
    assert "failed: quanto int8 at evaluate: SIGSEGV" in err
    assert rows["torchao int8"]["status"] == "FINISHED"
    assert rows["torchao int8"]["metrics"]["quality/psnr_db"] > 20

    run = shell.tracked("FAILED")["quanto int8"]
    parent = shell.tracked()["sweep"]
    assert {r["name"] for r in find_runs(shell.store, {"mlflow.parentRunId": parent["run_id"]}, status=None)} == set(
        rows
    )
    assert run["run_id"] == row["run_id"]
    assert run["tags"]["quantlab.failure"] == row["error"]
    assert run["tags"]["quantlab.stage"] == "evaluate"
    assert b"Segmentation fault" in artifact(shell.store, run["run_id"], "worker.log")
    assert shell.tracked("RUNNING") == {}


ENDS = {
    "os.kill(os.getpid(), signal.SIGKILL)": "SIGKILL: the job's process ended (killed from outside",
    "os.abort()": "SIGABRT: the job's process ended (a library gave up)",
    "os._exit(3)": "exit code 3: the process said nothing",
    "raise MemoryError('no room')": "MemoryError: no room",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", ENDS)
def test_other_ends_of_a_process(shell, fault, what):
    fault(what)
    code, rows, _ = rows_of(shell, "backend=quanto", "dtype=int8,int4", "sweep.isolation=process")
    assert code == 1
    assert [(r["status"], r["failed_stage"]) for r in rows.values()] == [("FAILED", "evaluate")] * 2
    assert all(r["error"].startswith(ENDS[what]) for r in rows.values())


@pytest.mark.slow
def test_a_job_that_takes_too_long(shell, fault):
    fault("time.sleep(600)")
    code, rows, _ = rows_of(shell, "backend=quanto,torchao", "sweep.timeout_s=60")
    assert code == 1
    assert (rows["quanto int8"]["error"], rows["quanto int8"]["failed_stage"]) == (
        "timeout: longer than sweep.timeout_s=60",
        "evaluate",
    )
    assert rows["torchao int8"]["status"] == "FINISHED"


@pytest.mark.slow
def test_a_process_that_never_begins_its_run(shell, fault):
    fault("")
    folder = shell.folder.parent / "fault"
    (folder / "sitecustomize.py").write_text("from quantlab.running import worker\nworker.main = lambda words: 7\n")
    code, rows, _ = rows_of(shell, "backend=quanto", "dtype=int8,int4", "sweep.isolation=process")
    assert code == 1
    ends = {(r["error"], r["failed_stage"]) for r in rows.values()}
    assert ends == {("exit code 7: the process said nothing", "start")}
    assert set(shell.tracked("FAILED")) == set(rows)


@pytest.mark.slow
def test_a_process_measures_the_same_numbers(shell):
    words = ("backend=quanto,gguf", "dtype=auto")
    here = rows_of(shell, *words)[1]
    apart = rows_of(shell, *words, "sweep.isolation=process", "sweep.force=true")[1]
    for name, row in here.items():
        same = [k for k in row["metrics"] if k.startswith(("quality/", "quantization/", "memory/weights"))]
        assert {k: apart[name]["metrics"][k] for k in same} == {k: row["metrics"][k] for k in same}
        assert apart[name]["params"]["quantization"] == row["params"]["quantization"]
    assert all(r["resumed"] for r in rows_of(shell, *words)[1].values())


@pytest.mark.parametrize("backend", CAPABILITIES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_known_to_crash_runs_apart(backend, device):
    """The default follows the table; whoever says ``none`` gets none."""
    for dtype, row in CAPABILITIES[backend].items():
        config = ExperimentConfig(quantization=QuantizationAxes(backend=backend, dtype=dtype))
        job = make_job(config)
        assert runs_apart(job, device) == (device in row.may_crash_on)
        for is_apart, sweep in (
            (True, {"timeout_s": 5.0}),
            (True, {"isolation": "process"}),
            (False, {"isolation": "none"}),
        ):
            asked = dataclasses.replace(config, sweep=SweepConfig(**sweep))
            assert runs_apart(dataclasses.replace(job, config=asked), device) == is_apart
    assert not runs_apart(make_job(ExperimentConfig(quantization=QuantizationAxes(backend="none"))), device)


@pytest.mark.slow
def test_one_scheme_runs_apart_and_the_others_share_the_model(shell, monkeypatch):
    row = CAPABILITIES["quanto"]["int8"]
    monkeypatch.setitem(CAPABILITIES["quanto"], "int8", dataclasses.replace(row, may_crash_on=("cpu",)))
    code, rows, err = rows_of(shell, "backend=quanto,torchao")
    assert code == 0, err
    pids = {name: run["tags"]["quantlab.pid"] for name, run in shell.tracked().items()}
    assert pids["torchao int8"] == pids["sweep"] != pids["quanto int8"]
    assert list(rows) == ["quanto int8", "torchao int8"], "the order asked for"


@pytest.mark.slow
def test_a_process_ends_with_its_sweep(shell, fault):
    """A killed sweep leaves no worker behind that goes on computing."""
    import psutil

    fault("time.sleep(600)")
    words = [*WORDS, "backend=quanto", "dtype=int8,int4", "sweep.isolation=process", "-q"]
    env = {**os.environ, "PYTHONPATH": f"{os.environ['PYTHONPATH']}{os.pathsep}{ROOT}"}
    sweep = subprocess.Popen([sys.executable, "-m", "quantlab", *words], env=env, cwd=shell.folder)
    runs = shell.folder / "outputs" / "runs"

    def stage():
        found = [json.loads(f.read_text()) for f in runs.glob("*quanto*/run.json")]
        return found[0]["stage"] or found[0]["tags"].get("quantlab.stage") if found else ""

    while stage() != "evaluate":
        assert sweep.poll() is None
    workers = psutil.Process(sweep.pid).children()
    assert workers
    sweep.kill()
    sweep.wait()
    assert not psutil.wait_procs(workers, timeout=30)[1]


# -- engines


@pytest.mark.parametrize("engine", [e for e, (module, _) in ENGINES.items() if module])
def test_an_engine_that_is_not_installed_names_its_extra(engine, monkeypatch):
    module, extra = ENGINES[engine]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match=rf"^launcher={engine}: .*{module}.*\[{extra}\]"):
        check_launcher(LauncherConfig(engine=engine))


LAUNCHED = [
    ("pool", ["launcher=pool", "launcher.num_workers=2"]),
    ("pool", ["launcher=pool", "launcher.num_workers=2", "sweep.isolation=none"]),
    ("submitit_local", ["launcher=submitit_local"]),
    ("ray", ["launcher=ray"]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "words"), LAUNCHED, ids=lambda v: v if isinstance(v, str) else " ".join(v))
def test_an_engine_runs_the_jobs(shell, engine, words):
    if ENGINES[engine][0] and importlib.util.find_spec(ENGINES[engine][0]) is None:
        pytest.skip(f"{ENGINES[engine][0]} is not installed")
    code, rows, err = rows_of(shell, "backend=quanto,torchao", *words)
    assert code == 0, err
    assert [(n, r["status"]) for n, r in rows.items()] == [("quanto int8", "FINISHED"), ("torchao int8", "FINISHED")]
    parent = shell.tracked()["sweep"]
    found = find_runs(shell.store, {"mlflow.parentRunId": parent["run_id"]})
    assert {r["name"] for r in found} == set(rows)
    assert len({r["tags"]["quantlab.pid"] for r in [*found, parent]}) == 3, "three processes"
    again = rows_of(shell, "backend=quanto,torchao")[1]
    assert all(r["resumed"] for r in again.values())


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_each_job_of_a_pool_sees_a_gpu_of_its_own(shell, fault, monkeypatch, isolation):
    """Two jobs at once on two devices: each is measured with the other still running."""
    seen = shell.folder / "seen"
    seen.mkdir()
    fault("pass")
    monkeypatch.setenv("QUANTLAB_TEST_SEEN", str(seen))
    (shell.folder.parent / "fault" / "sitecustomize.py").write_text(SEES)
    monkeypatch.setattr(table, "visible_gpus", lambda: ["GPU-a", "GPU-b"])
    words = ("launcher=pool", "launcher.num_workers=2", f"sweep.isolation={isolation}")
    code, _, err = rows_of(shell, "backend=quanto,torchao", *words)
    assert code == 0, err
    assert {f.read_text() for f in seen.iterdir()} == {"GPU-a", "GPU-b"}


SEES = """
import os, time
from pathlib import Path
from quantlab.protocols import diffusion
real, seen = diffusion.measure, Path(os.environ["QUANTLAB_TEST_SEEN"])
def measure(*args, **kwargs):
    (seen / str(os.getpid())).write_text(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    began = time.monotonic()
    while len(list(seen.iterdir())) < 2 and time.monotonic() < began + 60:
        time.sleep(0.1)
    return real(*args, **kwargs)
diffusion.measure = measure
"""


@pytest.mark.slow
def test_a_crash_in_a_pool_costs_one_job(shell, fault):
    fault("os.kill(os.getpid(), signal.SIGSEGV)")
    code, rows, _ = rows_of(shell, "backend=quanto,torchao", "launcher=pool", "launcher.num_workers=2")
    assert code == 1
    assert rows["quanto int8"]["error"].startswith("SIGSEGV")
    assert rows["torchao int8"]["status"] == "FINISHED"


VISIBLE = {
    None: ["0", "1", "2", "3"],
    "": [],
    "-1": [],
    "2": ["2"],
    "2, 0": ["2", "0"],
    "0,-1,1": ["0"],
    "0,4,1": ["0"],
    "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6,GPU-1d": ["GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "GPU-1d"],
    "MIG-GPU-8932f937/1/2,MIG-3f": ["MIG-GPU-8932f937/1/2", "MIG-3f"],
    "0,,1": ["0"],
}


@pytest.mark.parametrize("chosen", VISIBLE)
def test_gpus_are_counted_and_named_as_cuda_reads_the_list(chosen, monkeypatch):
    names = VISIBLE[chosen]
    monkeypatch.setattr(pool, "num_gpus", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert visible_gpus() == names
