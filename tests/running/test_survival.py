"""What a sweep survives: a full disk, a server that goes away, another sweep on the same store at the same time."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quantlab.errors import DiskFull, QuantlabError, is_disk_full
from quantlab.models import digits_dit
from quantlab.running.attempts import ending, has_ended
from quantlab.running.engines import forking
from quantlab.running.engines.pool import Pool, SharingPool
from quantlab.running.scheduler import Scheduler
from quantlab.tracking import find_runs
from tests.support.engines import make_job
from tests.support.shell import digits_words
from tests.support.stores import ROOT, artifact, live_server
from tests.support.tiers import covering

WORDS = ("-m", *digits_words("evaluation.num_samples=10", "sweep.floors=false"))
GRID = (*WORDS, "backend=quanto,gguf")
NAMES = ("quanto int8", "gguf q8_0")


def no_room() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# -- a full disk


class Disk:
    """A disk that is full from the first write to ``last`` on, of which half still finds room."""

    def __init__(self, folder: Path, run: str, last: str, events_before: int = 0) -> None:
        self.folder, self.run, self.last, self.left = folder, run, last, events_before
        self.real, self.is_full = io.open, False

    def open(self, file, mode="r", *args, **kwargs):
        path = Path(str(file)).absolute()
        writes = set(mode) & set("wax+") and path.is_relative_to(self.folder / "outputs")
        if writes and self.run in path.as_posix() and path.name == self.last and not self.is_full:
            self.left -= 1
            if self.left < 0:
                self.is_full = True
                with self.real(path, "ab") as torn:
                    torn.write(b'{"op": "tags", "val')
        if writes and self.is_full:
            raise no_room()
        return self.real(file, mode, *args, **kwargs)


def fill(monkeypatch, shell, last, events_before=0):
    disk = Disk(shell.folder, "gguf", last, events_before)
    monkeypatch.setattr(io, "open", disk.open)  # what every Path opens with
    return disk


def but_curves(row):
    """A row's numbers; each curve is one metric of its run."""
    return {k: v for k, v in row["metrics"].items() if "/step_" not in k}


def refused_for_room(shell, *words):
    code, _, err = shell(*words, "-q")
    assert code == 1, err
    message = err[err.index("quantlab: ") :].strip()
    assert message.startswith("quantlab: output_dir=outputs: the disk is full (")
    assert message.endswith("and give the same command again: what has finished is kept")
    assert "Traceback" not in err
    return message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("last", "before"),
    [("events.jsonl", 0), ("events.jsonl", 6), ("samples.json", 0)],
    ids=["the run's first event", "a later event", "an artifact"],
)
def test_a_disk_that_fills_up_in_a_sweep(shell, monkeypatch, last, before):
    with monkeypatch.context() as patch:
        disk = fill(patch, shell, last, before)
        refused_for_room(shell, *GRID)
        assert disk.is_full
    kept = shell.tracked()
    assert set(kept) == {"quanto int8"}
    again = shell.rows(*GRID)
    assert [(n, r["resumed"]) for n, r in again.items()] == [("quanto int8", True), ("gguf q8_0", False)]
    assert but_curves(again["quanto int8"]).items() <= kept["quanto int8"]["metrics"].items()
    assert shell.tracked("RUNNING") == {}
    assert "sweep" in shell.tracked("KILLED")
    assert "full disk" in shell.tracked("KILLED")["sweep"]["tags"]["quantlab.failure"]


@pytest.mark.slow
def test_a_disk_that_is_still_full_at_the_next_start(shell, monkeypatch):
    with monkeypatch.context() as patch:
        fill(patch, shell, "samples.json")
        refused_for_room(shell, *GRID)
        refused_for_room(shell, *GRID)
    shell.rows(*GRID)
    assert shell.tracked("RUNNING") == {}


def test_a_single_run_on_a_full_disk(shell, monkeypatch):
    words = digits_words("backend=gguf", "evaluation.num_samples=10", "sweep.floors=false")
    with monkeypatch.context() as patch:
        fill(patch, shell, "report.json")
        refused_for_room(shell, *words)
    shell.rows(*words)
    assert shell.tracked("RUNNING") == {}


@pytest.mark.slow
def test_no_room_for_the_reference(shell, monkeypatch):
    import safetensors.torch
    from safetensors import SafetensorError

    shell.rows(*WORDS, "backend=quanto", "dtype=int8,int4")
    before = shell.tracked()
    cache = shell.folder / "outputs" / "cache" / "reference"
    known = set(cache.glob("*.safetensors"))

    def save(outputs, file, metadata):
        Path(file).write_bytes(b"the beginning")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", save)
        refused_for_room(shell, *WORDS, "backend=quanto", "dtype=int8,int4", "dataset.seed=5")
    assert set(cache.glob("*.safetensors")) == known
    live = cache / f"of another process.{os.getppid()}.part"
    live.touch()
    assert {n: r["run_id"] for n, r in shell.tracked().items()} == {n: r["run_id"] for n, r in before.items()}
    rows = shell.rows(*WORDS, "backend=quanto", "dtype=int8,int4", "dataset.seed=5")
    assert [r["resumed"] for r in rows.values()] == [False, False]
    assert shell.tracked("RUNNING") == {}
    assert list(cache.glob("*.part")) == [live], "what was left is gone, what another writes is not"


FULL = """
import errno, io, sys
real, full = io.open, []
def fill(file, mode="r", *args, **kwargs):
    if "quantlab.running." in " ".join(sys.orig_argv) and set(mode) & set("wax+") and "gguf" in str(file):
        full.extend([1] if str(file).endswith("samples.json") else [])
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
    return real(file, mode, *args, **kwargs)
io.open = fill
"""


@pytest.mark.slow
def test_a_job_of_its_own_process_that_finds_no_room(shell, tmp_path, monkeypatch):
    """Nothing that it writes finds room, its end neither: the sweep notes it."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(FULL)
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path / "fault"))
        code, out, err = shell(*GRID, "sweep.isolation=process", "--json")
    assert code == 1, err
    rows = {r["name"]: r for r in json.loads(out)}
    assert (rows["quanto int8"]["status"], rows["gguf q8_0"]["status"]) == ("FINISHED", "FAILED")
    assert rows["gguf q8_0"]["failed_stage"] == "track"
    assert "No space left on device" in rows["gguf q8_0"]["error"]
    assert shell.tracked("RUNNING") == {}
    assert [r["resumed"] for r in shell.rows(*GRID).values()] == [True, False]


@pytest.mark.slow
def test_a_store_without_room_loses_nothing(shell, monkeypatch, caplog):
    """SQLite itself says that it is full: its file may not grow."""
    from sqlalchemy import event
    from sqlalchemy.pool import Pool

    shell.rows(*WORDS, "backend=quanto", "dtype=int8,int4")

    most_pages = [1]  # the file may not grow

    def bound(connection, *_):
        connection.execute(f"PRAGMA max_page_count = {most_pages[0]}")

    event.listen(Pool, "checkout", bound)
    try:
        rows = shell.rows(*WORDS, "backend=quanto", "dtype=int2,float8_e4m3")
        most_pages[0] = 2**30
        again = shell.rows(*WORDS, "backend=quanto", "dtype=int2,float8_e4m3")
    finally:
        event.remove(Pool, "checkout", bound)
    said = [r.getMessage() for r in caplog.records if "store is lost" in r.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("tracking.uri=sqlite:///")
    assert "full" in said[0]
    assert said[0].endswith("or at the next start")
    assert {r["status"] for r in rows.values()} == {"FINISHED"}
    assert [r["resumed"] for r in again.values()] == [True, True]
    tracked = shell.tracked()
    assert {"quanto int2", "quanto float8_e4m3", "quanto int8", "quanto int4"} <= set(tracked)
    for name, row in rows.items():
        assert but_curves(row).items() <= tracked[name]["metrics"].items()
    assert shell.tracked("RUNNING") == {}


def test_what_is_a_full_disk():
    outer = QuantlabError("x: failed")
    outer.__cause__ = no_room()
    assert is_disk_full(outer)
    assert is_disk_full(RuntimeError("database or disk is full"))
    assert is_disk_full(OSError(errno.EDQUOT, "over quota"))
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(None)
    assert DiskFull("x").exit_code == 1


# -- a server that goes away

KILL = """
import os, signal
from quantlab.protocols import diffusion
real = diffusion.measure
def measure(candidate, *args, **kwargs):
    if any(type(m).__module__.startswith("optimum.quanto") for m in candidate.components["transformer"].modules()):
        try:
            os.killpg({pid}, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return real(candidate, *args, **kwargs)
diffusion.measure = measure
"""


@pytest.mark.slow
@pytest.mark.parametrize("isolation", ["none", "process"])
def test_a_server_that_goes_away_in_a_sweep(shell, tmp_path, closed_port, isolation):
    words = [*GRID, f"sweep.isolation={isolation}"]
    uri = f"tracking.uri=http://127.0.0.1:{closed_port}"
    with live_server(closed_port, tmp_path) as server:
        (tmp_path / "fault").mkdir()
        (tmp_path / "fault" / "sitecustomize.py").write_text(KILL.format(pid=server.pid))
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'fault'}"}
        done = subprocess.run(
            [sys.executable, "-m", "quantlab", *words, uri, "--json"],
            env=env,
            cwd=shell.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert server.wait(60) == -signal.SIGKILL
    assert done.returncode == 0, done.stderr
    rows = {r["name"]: r for r in json.loads(done.stdout)}
    assert {n: r["status"] for n, r in rows.items()} == dict.fromkeys(NAMES, "FINISHED")
    assert "the store is lost" in done.stderr
    with live_server(closed_port, tmp_path):
        code, out, err = shell(*words, uri, "--json")
        assert code == 0, err
        again = {r["name"]: r for r in json.loads(out)}
        assert [r["resumed"] for r in again.values()] == [True, True]
        assert {n: r["metrics"] for n, r in again.items()} == {n: r["metrics"] for n, r in rows.items()}
        code, out, err = shell("compare", "sweep=latest", uri, "--json")
        assert code == 0, err
        assert {r["name"] for g in json.loads(out)["groups"] for r in g["rows"]} == set(NAMES)


@pytest.mark.slow
def test_a_sweep_begun_on_a_lost_server_ends_whole_in_another_store(shell, tmp_path, closed_port):
    """The children find their parent by its record, whatever ids the server had given."""
    uri = f"tracking.uri=http://127.0.0.1:{closed_port}"
    with live_server(closed_port, tmp_path) as server:
        (tmp_path / "fault").mkdir()
        (tmp_path / "fault" / "sitecustomize.py").write_text(KILL.format(pid=server.pid))
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'fault'}"}
        command = [sys.executable, "-m", "quantlab", *GRID, "sweep.isolation=process", uri, "-q"]
        subprocess.run(command, env=env, cwd=shell.folder, check=True, capture_output=True)
    shell.rows(*digits_words("backend=none", "sweep.floors=false"))  # another start, on the store beside
    parent = shell.tracked()["sweep"]
    assert {r["name"] for r in find_runs(shell.store, {"mlflow.parentRunId": parent["run_id"]})} == set(NAMES)
    assert json.loads(artifact(shell.store, parent["run_id"], "rows.json"))["rows"]
    assert shell.tracked("RUNNING") == {}


@pytest.mark.slow
@pytest.mark.parametrize("answers_again", [True, False])
def test_a_store_that_was_away_for_a_moment_has_everything_at_the_end(shell, monkeypatch, answers_again, caplog):
    """As when a server is started anew, or a database was locked for longer than anybody waits."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    real, left = MlflowClient.log_batch, [1]

    def log_batch(self, run_id, *args, **kwargs):
        if "gguf" in (self.get_run(run_id).info.run_name or "") and left[0]:
            left[0] -= answers_again
            raise MlflowException("database is locked")
        return real(self, run_id, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", log_batch)
        rows = shell.rows(*GRID)
    assert {r["status"] for r in rows.values()} == {"FINISHED"}
    assert ("gguf q8_0" in shell.tracked()) == answers_again
    assert "the store is lost" in caplog.text
    again = shell.rows(*GRID)
    assert [r["resumed"] for r in again.values()] == [True, True]
    assert set(shell.tracked()) == {*NAMES, "sweep"}
    assert shell.tracked("RUNNING") == {}


# -- two at once

COUNT = """
import os, pathlib
from quantlab.protocols import diffusion
from tests.support.tiers import covering
real = diffusion.observe
def observe(*args, **kwargs):
    pathlib.Path("observed-%d" % os.getpid()).touch()
    return real(*args, **kwargs)
diffusion.observe = observe
"""


@pytest.mark.slow
def test_two_sweeps_at_once_on_a_fresh_store_and_cache(shell, tmp_path):
    (shell.folder / "outputs" / "mlflow.db").unlink()
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(COUNT)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'fault'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "quantlab", *WORDS, "sweep.floors=true", "--json"]
    grids = (("backend=quanto", "dtype=int8,int4,int2"), ("backend=gguf", "dtype=q8_0,q4_0,q5_k"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, *grid], cwd=shell.folder, env=env, **pipes) for grid in grids]
    for sweep in both:
        out, err = sweep.communicate(timeout=500)
        assert sweep.returncode == 0, err
        assert "locked" not in err
        assert len(json.loads(out)) == 6
        assert {r["status"] for r in json.loads(out)} == {"FINISHED"}
    assert len(list(shell.folder.glob("observed-*"))) == 1, "the reference is computed once"
    parents = [r for r in find_runs(shell.store) if r["name"] == "sweep"]
    assert len(parents) == 2
    wanted = {"quanto int8", "quanto int4", "quanto int2", "gguf q8_0", "gguf q4_0", "gguf q5_k"}
    assert wanted <= set(shell.tracked())
    assert shell.tracked("RUNNING") == {}


# -- weights


@pytest.mark.parametrize(
    ("damage", "file"),
    covering((d, file) for d in ("truncated", "gone") for file in (digits_dit.MODEL_FILE, digits_dit.JUDGE_FILE)),
)
def test_damaged_weights_in_the_cache(shell, file, damage):
    [folder] = [f for f in (shell.folder / "outputs" / "cache" / "models").iterdir() if f.is_dir()]
    weights = folder / file
    content = weights.read_bytes()
    weights.write_bytes(content[:-100]) if damage == "truncated" else weights.unlink()
    code, _, err = shell(*digits_words("backend=quanto"), "-q")
    assert code == 2
    assert err.startswith(f"quantlab: model=digits_dit: {weights} cannot be used (")
    assert err.strip().endswith(
        f"delete the folder {folder} and run again to train the model anew, or put an intact copy of the file there"
    )
    code, _, err = shell(*digits_words("backend=quanto", f"model.path={folder}"), "-q")
    assert code == 2
    assert err.startswith(f"quantlab: model.path={folder}: ")
    assert "delete" not in err, "a folder of the user's own"
    assert err.strip().endswith("or leave model.path out to train the model")


# -- a process from which no other can be begun


@pytest.mark.parametrize("name", ["pool", "sharing"])
def test_a_server_that_dies_as_it_starts_is_not_begun_without_end(tmp_path, monkeypatch, name):
    monkeypatch.setattr(forking, "_SERVER", "import sys; sys.exit(1)")
    jobs = [make_job(tmp_path / "runs", job) for job in "abc"]
    engine = Pool(2) if name == "pool" else SharingPool(2, tmp_path / "queue")
    runner = Scheduler(engine, 3, lambda folder: None)
    runner.add(jobs)
    runner.run()
    assert {has_ended(job) for job in jobs} == {"FAILED"}
    told = (
        "never reported back" if name == "pool" else "the process that begins the workers ends before one takes a job"
    )
    assert all(told in ending(job) for job in jobs)
