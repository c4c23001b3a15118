"""The tracking store as users meet it: real SQLite files, real processes, real sockets."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from quantlab import provenance
from quantlab.errors import MetricUndefined, TrackingError
from quantlab.experiment import TrackingConfig
from quantlab.tracking import (
    Store,
    close_orphans,
    connect,
    find_records,
    find_runs,
    flatten,
    get_artifact,
    get_curve,
    get_run,
    open_store,
    push_pending,
)

_ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables and no experiment of ours: making them takes seconds, copying them nothing."""
    folder = tmp_path_factory.mktemp("template")
    open_store(TrackingConfig(uri="sqlite:///template.db", experiment="only in the template"), folder)
    return folder / "template.db"


@pytest.fixture
def base(template: Path, tmp_path: Path) -> Path:
    """A folder with a space in its name and a fresh store under the default address."""
    base = tmp_path / "my work"
    (base / "outputs" / "runs").mkdir(parents=True)
    shutil.copyfile(template, base / "outputs" / "mlflow.db")
    return base


@pytest.fixture
def store(base: Path) -> Store:
    return open_store(TrackingConfig(), base)


@pytest.fixture
def runs(base: Path) -> Path:
    return base / "outputs" / "runs"


def _tracking(uri: str = "sqlite:///outputs/mlflow.db", required: bool = True) -> TrackingConfig:
    return TrackingConfig(uri=uri, required=required)


def _artifact(store: Store, run_id: str, name: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return get_artifact(store, run_id, name, Path(folder)).read_bytes()


def _python(code: str, *words: str) -> subprocess.Popen[str]:
    """A process of its own that runs ``code`` with the names of this API at hand."""
    begin = ("import os, signal, sys, time\nfrom pathlib import Path\nfrom quantlab.experiment import TrackingConfig\n"
             "from quantlab.tracking import *\nbase = Path(sys.argv[1])\nruns = base / 'outputs' / 'runs'\n")
    env = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", begin + code, *words], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def _await_line(process: subprocess.Popen[str], wanted: str) -> str:
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    assert line.startswith(wanted), (line, process.communicate()[1])
    return line.removeprefix(wanted).strip()


# -- what is written is what is read


def test_everything_comes_back(store: Store, runs: Path, base: Path) -> None:
    parent = store.start_run("sweep", runs / "sweep", {}, {"quantlab.kind": "sweep"})
    params = {"quantization": {"backend": "torchao", "group_size": 64, "layers": ["a", "b"]}, "seed": 0, "path": None}
    with store.start_run("int4", runs / "int4", params, {"quantlab.key": "k1"}, parent.run_id) as run:
        run.stage = "evaluate"
        run.log_metrics({"quality/kld_mean": np.float32(0.25), "quality/kld_mean/n": 10, "memory/absent": None})
        run.log_curve("step_sqnr_db", np.array([30.0, 20.5, 10.25]))
        run.log_json({"a": [1, {"b": "ü"}]}, "recipe.json")
        run.log_table({"name": ["x", "y"], "bits": [4.5, 16.0]}, "layers.json")
        run.log_image_grid(np.arange(2 * 3 * 8 * 8, dtype=np.uint8).reshape(2, 3, 8, 8, 1))
        (base / "notes.txt").write_text("from outside")
        run.log_artifact(base / "notes.txt", "texts")
    parent.finish("FINISHED")

    found = get_run(store, run.run_id)
    assert found["name"] == "int4"
    assert found["status"] == "FINISHED"
    assert found["params"] == {"quantization.backend": "torchao", "quantization.group_size": "64", "seed": "0",
                               "quantization.layers": '["a", "b"]', "path": "null"}
    assert found["metrics"] == {"quality/kld_mean": 0.25, "quality/kld_mean/n": 10.0, "step_sqnr_db": 10.25}
    assert found["tags"]["mlflow.parentRunId"] == parent.run_id
    assert found["tags"]["quantlab.stage"] == "evaluate"
    assert json.loads(found["tags"]["mlflow.loggedArtifacts"]) == [{"path": "layers.json", "type": "table"}]
    assert get_curve(store, run.run_id, "step_sqnr_db") == [30.0, 20.5, 10.25]
    assert json.loads(_artifact(store, run.run_id, "recipe.json")) == {"a": [1, {"b": "ü"}]}
    assert json.loads(_artifact(store, run.run_id, "layers.json")) == {
        "columns": ["name", "bits"], "data": [["x", 4.5], ["y", 16.0]]
    }
    assert _artifact(store, run.run_id, "texts/notes.txt") == b"from outside"
    kept = base / "outputs" / "mlartifacts" / run.run_id / "artifacts"
    assert {p.relative_to(kept).as_posix() for p in kept.rglob("*.*")} == {
        "recipe.json", "layers.json", "images/samples.png", "texts/notes.txt"
    }
    with pytest.raises(TrackingError, match=r"^absent\.json: run .* has no such artifact"):
        get_artifact(store, run.run_id, "absent.json", base)
    assert [r["run_id"] for r in find_runs(store, parent_run_id=parent.run_id)] == [run.run_id]

    record = json.loads((runs / "int4" / "run.json").read_text())
    assert record["status"] == "FINISHED"
    assert record["params"] == found["params"]
    assert record["curves"] == {"step_sqnr_db": [30.0, 20.5, 10.25]}
    assert record["metrics"] == {"quality/kld_mean": 0.25, "quality/kld_mean/n": 10.0}
    assert record["artifacts"] == ["recipe.json", "layers.json", "images/samples.png", "texts/notes.txt"]


def test_image_grid_keeps_every_pixel(store: Store, runs: Path) -> None:
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 16, 3), dtype=np.uint8)
    with store.start_run("images", runs / "images", {}, {}) as run:
        run.log_image_grid(images)
        with pytest.raises(TrackingError, match=r"uint8 of shape \(rows"):
            run.log_image_grid(images.astype(np.float32), "other.png")
        with pytest.raises(TrackingError, match="no such file"):
            run.log_image_grid(runs / "absent.png")
        run.log_image_grid(runs / "images" / "images" / "samples.png", "images/again.png")
    picture = np.asarray(Image.open(io.BytesIO(_artifact(store, run.run_id, "images/again.png"))))
    assert picture.shape == (2 * (64 + 2), 3 * (128 + 2), 3)
    tile = picture[66 + 1 : 66 + 65, 2 * 130 + 1 : 2 * 130 + 129]
    assert np.array_equal(tile[::8, ::8], images[1, 2])


def test_only_finished_runs_with_the_key_are_found(store: Store, runs: Path) -> None:
    ids = {}
    for number, (key, status) in enumerate([("k", "FINISHED"), ("k", "FAILED"), ("other", "FINISHED"), ("k", None)]):
        run = store.start_run(f"r{number}", runs / f"r{number}", {}, {"quantlab.key": key})
        ids[number] = run.run_id
        if status:
            run.finish(status)
    assert [r["run_id"] for r in find_runs(store, key="k")] == [ids[0]]
    assert {r["run_id"] for r in find_runs(store, key="k", status=None)} == {ids[0], ids[1], ids[3]}
    assert [r["name"] for r in find_records(runs, {"quantlab.key": "k"})] == ["r0"]
    with pytest.raises(TrackingError, match="quote"):
        find_runs(store, key="' or 1 = 1")


def test_unknown_run(store: Store) -> None:
    for run_id in ("0" * 32, "no such/id"):
        with pytest.raises(TrackingError, match=rf"^run_id={run_id}: no such run .*tracking.uri=\.\.\.$"):
            get_run(store, run_id)


def test_flatten() -> None:
    nested = {"a": {"b": {"c": 1, "d": {}}, "e": [1, {"f": True}]}, "g": None, "h": True, "i": "text", "j": 1e-5}
    assert flatten(nested) == {
        "a.b.c": "1", "a.b.d": "{}", "a.e": '[1, {"f": true}]', "g": "null", "h": "true", "i": "text", "j": "1e-05"
    }


# -- what cannot be written


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -np.inf, np.float32("nan")])
def test_undefined_metric_is_named_and_nothing_is_logged(store: Store, runs: Path, bad: float) -> None:
    run = store.start_run("r", runs / "r", {}, {})
    with pytest.raises(MetricUndefined, match="^quality/kld_mean="):
        run.log_metrics({"quality/psnr_db": 1.0, "quality/kld_mean": bad})
    with pytest.raises(MetricUndefined, match=r"^curve\[1\]="):
        run.log_curve("curve", [1.0, bad])
    run.finish("FAILED")
    assert get_run(store, run.run_id)["metrics"] == {}


@pytest.mark.parametrize("key", ["a b*", "a[0]", "k=v", "a//b", "../x", "/x", "x/", "", ".", "ü", "k" * 251])
def test_names_the_store_would_refuse(store: Store, runs: Path, key: str) -> None:
    run = store.start_run("r", runs / "r", {}, {})
    with pytest.raises(TrackingError, match="^metric "):
        run.log_metrics({key: 1.0})
    with pytest.raises(TrackingError, match="^parameter "):
        run.log_params({key: 1})
    with pytest.raises(TrackingError, match="^tag "):
        run.set_tags({key: "x"})
    with pytest.raises(TrackingError, match="^tag "):
        store.start_run("s", runs / "s", {}, {key: "x"})
    run.finish("FINISHED")
    assert get_run(store, run.run_id)["metrics"] == {}


def test_large_batches_and_long_values(store: Store, runs: Path) -> None:
    text = "x" * 6001
    with store.start_run("r", runs / "r", {f"p{i}": i for i in range(250)}, {f"t{i}": i for i in range(150)}) as run:
        run.log_params({"long": text, "exact": "y" * 6000})
        run.log_metrics({f"m{i}": i for i in range(2001)})
        run.log_curve("curve", range(1001))
        run.set_tags({"long": "z" * 9000})
    found = get_run(store, run.run_id)
    assert len(found["params"]) == 252
    assert len(found["metrics"]) == 2002
    assert found["params"]["exact"] == "y" * 6000
    assert found["params"]["long"].endswith("x ... (6001 characters; whole in params/long.txt)")
    assert len(found["params"]["long"]) == 6000
    assert _artifact(store, run.run_id, "params/long.txt").decode() == text
    assert get_curve(store, run.run_id, "curve") == list(range(1001))
    assert len(found["tags"]["long"]) == 5000
    assert found["tags"]["t149"] == "149"


def test_misuse_is_told(store: Store, runs: Path) -> None:
    run = store.start_run("r", runs / "r", {"a": 1}, {})
    run.log_params({"a": 1})
    with pytest.raises(TrackingError, match=r"^parameter 'a': is '1' already, not '2'"):
        run.log_params({"a": 2})
    with pytest.raises(TrackingError, match="different lengths"):
        run.log_table({"a": [1], "b": []}, "t.json")
    with pytest.raises(TrackingError, match="name it t.txt.json"):
        run.log_table({"a": [1]}, "t.txt")
    with pytest.raises(TrackingError, match="taken by the run's own record"):
        run.log_json({}, "run.json")
    with pytest.raises(TrackingError, match="is not a number"):
        run.log_metrics({"m": "fast"})
    with pytest.raises(TrackingError, match="no such file"):
        run.log_artifact(runs / "absent.bin")
    with pytest.raises(TrackingError, match="give each run a folder of its own$"):
        store.start_run("again", runs / "r", {}, {})
    with pytest.raises(TrackingError, match="^status=DONE"):
        run.finish("DONE")
    run.finish("FINISHED")
    with pytest.raises(TrackingError, match="has ended"):
        run.log_metrics({"m": 1})


# -- how a run ends


def test_exception_fails_the_run_with_its_stage(store: Store, runs: Path) -> None:
    run = store.start_run("r", runs / "r", {}, {})

    def job() -> None:
        with run:
            run.stage = "quantize"
            raise ValueError("boom " * 2000)

    with pytest.raises(ValueError, match="boom"):
        job()
    found = get_run(store, run.run_id)
    assert found["status"] == "FAILED"
    assert found["tags"]["quantlab.stage"] == "quantize"
    assert found["tags"]["quantlab.failure"].startswith("ValueError: boom")
    assert len(found["tags"]["quantlab.failure"]) == 5000
    assert "raise ValueError(" in _artifact(store, run.run_id, "failure.txt").decode()
    record = json.loads((runs / "r" / "run.json").read_text())
    assert (record["status"], record["stage"], record["error"][:10]) == ("FAILED", "quantize", "ValueError")


def test_sigterm_fails_parent_and_child(store: Store, runs: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    parent = store.start_run("p", runs / "p", {}, {})
    child = store.start_run("c", runs / "c", {}, {}, parent.run_id)

    def job() -> None:
        with parent, child:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)  # the signal arrives here

    with pytest.raises(SystemExit) as ended:
        job()
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert get_run(store, child.run_id)["status"] == get_run(store, parent.run_id)["status"] == "FAILED"
    assert get_run(store, parent.run_id)["tags"]["quantlab.failure"].startswith("SIGTERM")


def test_a_thread_may_run_a_job(store: Store, runs: Path) -> None:
    ids = []

    def job() -> None:
        with store.start_run("r", runs / "r", {}, {}) as run:
            ids.append(run.run_id)

    thread = threading.Thread(target=job)
    thread.start()
    thread.join()
    assert get_run(store, ids[0])["status"] == "FINISHED"


def test_killed_and_live_processes(store: Store, runs: Path, base: Path) -> None:
    """SIGKILL leaves RUNNING; the next start closes that run, and neither a live process's nor another host's."""
    code = ("run = open_store(TrackingConfig(), base).start_run('job', runs / sys.argv[2], {}, {})\n"
            "run.stage = 'load'\nprint('run', run.run_id, flush=True)\ntime.sleep(60)\n")
    dead, live = _python(code, str(base), "dead"), _python(code, str(base), "live")
    dead_id, live_id = _await_line(dead, "run"), _await_line(live, "run")
    mine = store.start_run("mine", runs / "mine", {}, {})
    lost = store.start_run("lost", runs / "lost", {}, {})
    far = store.start_run("far", runs / "far", {}, {})
    lost_id, far_id = lost.run_id, far.run_id
    store.client.set_tag(lost_id, "quantlab.pid_started", "1.0")  # the pid was given to another process since
    store.client.set_tag(far_id, "quantlab.host", "elsewhere")
    store.client.set_tag(far_id, "quantlab.pid_started", "1.0")
    shutil.rmtree(runs / "lost")
    shutil.rmtree(runs / "far")
    dead.kill()
    dead.communicate()

    assert sorted(close_orphans(store, runs)) == ["job", "lost"]
    try:
        found = get_run(store, dead_id)
        assert found["status"] == get_run(store, lost_id)["status"] == "KILLED"
        assert found["tags"]["quantlab.failure"].startswith("the process ended")
        assert found["end_ms"] is not None
        for run_id in (live_id, mine.run_id, far_id):
            assert get_run(store, run_id)["status"] == "RUNNING"
        record = json.loads((runs / "dead" / "run.json").read_text())
        assert (record["status"], record["stage"]) == ("KILLED", "load")
        assert close_orphans(store, runs) == []
        assert push_pending(store, runs) == []
    finally:
        live.kill()
        live.communicate()


def test_a_torn_last_line_is_survived(store: Store, runs: Path) -> None:
    process = _python("run = Store('sqlite:///nowhere', None, '').start_run('r', runs / 'r', {'a': 1}, {})\n"
                      "run.log_metrics({'m': 1})\n", str(runs.parents[1]))
    assert process.wait() == 0, process.communicate()
    events = runs / "r" / "tracking" / "events.jsonl"
    with events.open("ab") as file:
        file.write(b'{"op": "metrics", "val')
    assert close_orphans(store, runs) == ["r"]
    found = find_runs(store, status="KILLED")
    assert [(r["name"], r["params"], r["metrics"]) for r in found] == [("r", {"a": "1"}, {"m": 1.0})]
    assert push_pending(store, runs) == []


# -- addresses


@pytest.mark.parametrize(("uri", "why"), [
    ("file:///tmp/mlruns", "maintenance mode"),
    ("file:mlruns", "maintenance mode"),
    ("mlruns", "maintenance mode"),
    ("./outputs/mlruns", "maintenance mode"),
    ("", "maintenance mode"),
    ("sqlite:///", "kept in a file"),
    ("sqlite:///:memory:", "kept in a file"),
    ("sqlite:///a.db?mode=ro", r"holds \? or #"),
    ("databricks://x", "not supported"),
    ("postgresql://me:secret@host/db", r"postgresql://\*\*\*@host/db: not supported"),
])
@pytest.mark.parametrize("required", [True, False])
def test_addresses_that_are_refused(uri: str, why: str, required: bool, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=rf"^tracking\.uri=.*{why}.*tracking\.uri=") as raised:
        open_store(_tracking(uri, required), tmp_path)
    assert "secret" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def _spoil(kind: str, folder: Path) -> None:
    database = folder / "outputs" / "mlflow.db"
    if kind == "blocked":
        (folder / "outputs").write_text("a file where a folder should be")
        return
    database.parent.mkdir()
    if kind == "text":
        database.write_text("not a database, but long enough to be taken for one " * 50)
    elif kind == "folder":
        database.mkdir()
    elif kind == "foreign":
        import sqlite3

        with contextlib.closing(sqlite3.connect(database)) as db:
            db.execute("CREATE TABLE customers (name TEXT)")
            db.commit()
    elif kind == "read-only":
        os.chmod(database.parent, 0o500)


@pytest.mark.parametrize("kind", ["blocked", "text", "folder", "foreign", "read-only"])
def test_sqlite_files_that_cannot_be_used(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    if kind == "read-only" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    _spoil(kind, tmp_path)
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r"^tracking\.uri=sqlite:///.*cannot be used \(.+\); set tracking\.uri="):
        open_store(_tracking(), tmp_path)
    assert time.monotonic() - begun < 15
    assert open_store(_tracking(required=False), tmp_path).client is None
    assert len(caplog.records) == 1
    if kind == "foreign":
        assert (tmp_path / "outputs" / "mlflow.db").stat().st_size < 20_000, "MLflow's tables were written into it"


def test_deleted_experiment(store: Store, base: Path) -> None:
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(TrackingError, match=r"^tracking\.experiment=quantlab: is deleted .* choose another name$"):
        open_store(_tracking(), base)


# -- several processes


@pytest.mark.slow
def test_two_sweeps_on_one_store_at_once(store: Store, runs: Path, base: Path) -> None:
    code = ("store = open_store(TrackingConfig(), base)\nname = sys.argv[2]\n"
            "with store.start_run(name, runs / name, {}, {}) as parent:\n"
            "    for i in range(8):\n"
            "        with store.start_run(f'{name}{i}', runs / f'{name}{i}', {'i': i}, {}, parent.run_id) as run:\n"
            "            run.log_metrics({'m': i})\n            run.log_json({'i': i}, 'i.json')\n")
    sweeps = [_python(code, str(base), name) for name in "ab"]
    for sweep in sweeps:
        out, err = sweep.communicate(timeout=120)
        assert (sweep.returncode, out, err) == (0, "", "")  # and no noise
    parents = {r["name"]: r["run_id"] for r in find_runs(store) if r["name"] in "ab"}
    for name in "ab":
        children = find_runs(store, parent_run_id=parents[name])
        assert sorted((r["name"], r["metrics"]["m"]) for r in children) == [(f"{name}{i}", float(i)) for i in range(8)]


@pytest.mark.slow
def test_four_processes_open_a_fresh_store(tmp_path: Path) -> None:
    code = ("with open_store(TrackingConfig(), base).start_run('r', runs / sys.argv[2], {}, {}) as run:\n"
            "    run.log_metrics({'m': 1})\n")
    started = [_python(code, str(tmp_path), f"r{i}") for i in range(4)]
    for process in started:
        out, err = process.communicate(timeout=180)
        assert (process.returncode, out, err) == (0, "", "")
    store = open_store(_tracking(), tmp_path)
    assert [r["metrics"] for r in find_runs(store)] == [{"m": 1.0}] * 4


def test_mlflow_is_imported_when_a_store_is_opened() -> None:
    code = "import quantlab.provenance\nprint([m for m in ('mlflow', 'torch', 'sqlalchemy') if m in sys.modules])"
    assert _python(code, ".").communicate()[0].strip() == "[]"


# -- servers


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@pytest.fixture
def mute_port() -> Iterator[int]:
    """A socket that accepts and never answers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(8)
        yield s.getsockname()[1]


def test_closed_port_is_refused_at_once(closed_port: int, tmp_path: Path) -> None:
    begun = time.monotonic()
    wanted = (rf"^tracking\.uri=http://127\.0\.0\.1:{closed_port}: no connection; start the server, "
              r"or set tracking\.required=false, or tracking\.uri=sqlite:///outputs/mlflow\.db$")
    with pytest.raises(TrackingError, match=wanted):
        open_store(_tracking(f"http://127.0.0.1:{closed_port}"), tmp_path)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("seconds", [0.3, pytest.param(5, marks=pytest.mark.slow)])
def test_mute_server_is_refused_in_time(
    mute_port: int, tmp_path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connect._PROBE_SECONDS == 5
    monkeypatch.setattr(connect, "_PROBE_SECONDS", seconds)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # the user's own settings do not prolong the probe
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r": no answer within .* s, twice; start the server, or set tracking\."):
        open_store(_tracking(f"http://127.0.0.1:{mute_port}"), tmp_path)
    assert 2 * seconds <= time.monotonic() - begun < 2 * seconds + 5


def test_something_else_answers(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(TrackingError, match=r"^tracking\.uri=http://.*: answers, but not as an MLflow server"):
            open_store(_tracking(f"http://127.0.0.1:{server.server_port}"), tmp_path)
    finally:
        server.shutdown()
        server.server_close()


def test_unreached_store_is_filled_later(
    closed_port: int, store: Store, runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        away = open_store(_tracking(f"http://127.0.0.1:{closed_port}", required=False), tmp_path)
    assert len(caplog.records) == 1
    with away.start_run("sweep", runs / "zz", {}, {"quantlab.kind": "sweep"}) as parent:
        assert parent.run_id.startswith("local-")
        with away.start_run("job", runs / "aa", {"a": 1}, {"quantlab.key": "k"}, parent.run_id) as run:
            run.log_metrics({"m": 2.5})
            run.log_table({"x": [1]}, "layers.json")
    assert len(caplog.records) == 1
    assert find_runs(away) == []
    assert push_pending(away, runs) == []
    assert [r["metrics"] for r in find_records(runs, {"quantlab.key": "k"})] == [{"m": 2.5}]

    assert push_pending(store, runs) == ["sweep", "job"]  # the parent first
    assert push_pending(store, runs) == []
    [job] = find_runs(store, key="k")
    [sweep] = [r for r in find_runs(store) if r["name"] == "sweep"]
    assert job["tags"]["mlflow.parentRunId"] == sweep["run_id"]
    assert (job["params"], job["metrics"]) == ({"a": "1"}, {"m": 2.5})
    assert job["start_ms"] == json.loads((runs / "aa" / "run.json").read_text())["start_ms"]
    assert json.loads(_artifact(store, job["run_id"], "layers.json"))["columns"] == ["x"]


class _Unplugged:
    """A client whose every call fails as MLflow's does when the server is gone; ``calls`` counts them."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> object:
        from mlflow.exceptions import MlflowException

        def fail(*_: object, **__: object) -> None:
            self.calls += 1
            raise MlflowException("API request failed: Max retries exceeded")

        return fail


def test_store_lost_in_the_middle_of_a_run(store: Store, runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugged, unplugged = store.client, _Unplugged()
    with store.start_run("sweep", runs / "sweep", {}, {}) as parent:
        with store.start_run("before", runs / "before", {}, {}, parent.run_id) as run:
            run.log_metrics({"m": 1})
            store.client = unplugged
            run.log_metrics({"n": 2})
            run.log_curve("curve", [3.0, 2.0])
            run.log_json({"x": 1}, "x.json")
        with store.start_run("after", runs / "after", {}, {}, parent.run_id) as late:
            late.log_metrics({"m": 4})
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert unplugged.calls == 1, "a store that is gone must not cost time at each call"

    store.client = plugged
    assert get_run(store, run.run_id)["status"] == "RUNNING"
    again = Store(store.uri, plugged, store.experiment_id)  # the next start
    assert push_pending(again, runs) == ["sweep", "before", "after"]
    assert push_pending(again, runs) == []
    assert close_orphans(again, runs) == []
    found = {r["name"]: r for r in find_runs(again)}
    assert set(found) == {"sweep", "before", "after"}
    assert found["before"]["metrics"] == {"m": 1.0, "n": 2.0, "curve": 2.0}
    assert get_curve(again, run.run_id, "curve") == [3.0, 2.0]
    assert found["after"]["tags"]["mlflow.parentRunId"] == parent.run_id == found["sweep"]["run_id"]
    assert json.loads(_artifact(again, run.run_id, "x.json")) == {"x": 1}


def test_store_that_answers_again_gets_everything(store: Store, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.tracking.store._FIRST_PAUSE_S", 0.0)
    store._pause = 0.0
    plugged = store.client
    with store.start_run("r", runs / "r", {}, {}) as run:
        store.client = _Unplugged()
        run.log_metrics({"m": 1})
        store.client = plugged
        run.log_metrics({"n": 2})
        assert get_run(store, run.run_id)["metrics"] == {"m": 1.0, "n": 2.0}


def test_another_store_gets_all_of_an_unfinished_record(store: Store, runs: Path, base: Path, template: Path) -> None:
    """Begun in one store, lost there, pushed to another: all of it, under the parent's new id, and only once."""
    parent = store.start_run("sweep", runs / "sweep", {"p": 1}, {})
    child = store.start_run("job", runs / "job", {"a": 1}, {}, parent.run_id)
    child.log_metrics({"m": 1})
    child.log_curve("curve", [1.0, 2.0])
    old_id = parent.run_id
    store.client = _Unplugged()
    child.finish("FINISHED")
    parent.finish("FINISHED")
    shutil.copyfile(template, base / "other.db")
    other = open_store(_tracking("sqlite:///other.db"), base)
    assert push_pending(other, runs) == ["sweep", "job"]
    sent = runs / "job" / "tracking" / "sent.json"
    sent.write_text(json.dumps({**json.loads(sent.read_text()), "run_id": None, "offset": 0, "done": False}))
    assert push_pending(other, runs) == ["job"]  # as if the note of the first push was lost
    found = {r["name"]: r for r in find_runs(other)}
    assert len(find_runs(other)) == 2
    assert found["job"]["tags"]["mlflow.parentRunId"] == found["sweep"]["run_id"] != old_id
    assert found["job"]["params"] == {"a": "1"}
    assert get_curve(other, found["job"]["run_id"], "curve") == [1.0, 2.0]


def test_store_made_anew_under_the_same_address(store: Store, runs: Path, base: Path, template: Path) -> None:
    run = store.start_run("r", runs / "r", {"a": 1}, {})
    run.log_metrics({"m": 1})
    store.client = _Unplugged()
    run.finish("FINISHED")
    shutil.copyfile(template, base / "new.db")
    new = open_store(_tracking("sqlite:///new.db"), base)
    new.uri = store.uri
    assert push_pending(new, runs) == ["r"]
    assert [r["metrics"] for r in find_runs(new)] == [{"m": 1.0}]


def test_what_the_store_refuses_does_not_hold_up_the_rest(
    store: Store, runs: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with store.start_run("r", runs / "r", {}, {}) as run:
        store.client.log_param(run.run_id, "a", "set by somebody else")
        run.log_params({"a": 1})
        run.log_metrics({"m": 1})
    found = get_run(store, run.run_id)
    assert (found["status"], found["metrics"]) == ("FINISHED", {"m": 1.0})
    assert [("refuses params" in r.getMessage()) for r in caplog.records] == [True]
    assert json.loads((runs / "r" / "tracking" / "sent.json").read_text())["refused"][0].startswith("params: ")


@pytest.mark.slow
def test_a_real_server_dies_in_the_middle(store: Store, runs: Path, closed_port: int, tmp_path: Path) -> None:
    uri = f"http://127.0.0.1:{closed_port}"
    command = [sys.executable, "-m", "mlflow", "server", "--port", str(closed_port), "--workers", "1",
               "--backend-store-uri", f"sqlite:///{tmp_path}/s.db", "--artifacts-destination", str(tmp_path / "art")]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        for _ in range(120):
            with contextlib.suppress(TrackingError):
                remote = open_store(_tracking(uri), tmp_path)
                break
            time.sleep(1)
        with remote.start_run("sweep", runs / "sweep", {"p": 1}, {}) as parent:
            with remote.start_run("job", runs / "job", {"a": 1}, {"quantlab.key": "k"}, parent.run_id) as run:
                run.log_json({"x": 1}, "x.json")
                run.log_metrics({"m": 1})
                assert get_run(remote, run.run_id)["metrics"] == {"m": 1.0}
                assert json.loads(_artifact(remote, run.run_id, "x.json")) == {"x": 1}
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
                begun = time.monotonic()
                run.log_metrics({"n": 2})
                run.log_json({"y": 1}, "y.json")
            assert time.monotonic() - begun < 15
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    assert push_pending(store, runs) == ["sweep", "job"]
    [job] = find_runs(store, key="k")
    assert job["metrics"] == {"m": 1.0, "n": 2.0}
    assert json.loads(_artifact(store, job["run_id"], "x.json")) == {"x": 1}


# -- provenance


def test_git_state(tmp_path: Path) -> None:
    assert provenance.git_state(tmp_path) is None
    assert provenance.git_state(tmp_path / "absent") is None

    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True)

    git("init")
    (tmp_path / "unknown").mkdir()
    assert provenance.git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a").write_text("1\n")
    git("add", "a")
    git("commit", "-m", "one")
    clean = provenance.git_state(tmp_path)
    assert clean is not None
    assert (len(clean["sha"]), clean["dirty"], clean["diff_sha256"]) == (40, False, None)
    assert provenance.git_state(tmp_path / "unknown") is None  # in the checkout's folder, and not of it
    digests = set()
    for text in ("2\n", "3\n", "2\n"):
        (tmp_path / "a").write_text(text)
        state = provenance.git_state(tmp_path)
        assert state is not None
        assert (state["sha"], state["dirty"]) == (clean["sha"], True)
        digests.add(state["diff_sha256"])
    assert len(digests) == 2
    (tmp_path / "a").write_text("1\n")
    (tmp_path / "new").write_text("")
    assert (provenance.git_state(tmp_path) or {})["dirty"] is True


def test_environment_is_plain_and_names_no_host(tmp_path: Path) -> None:
    import mlflow
    import torch

    environment = provenance.environment(tmp_path)
    assert set(environment) == {"versions", "git", "hardware"}
    assert environment["versions"]["torch"] == torch.__version__
    assert environment["versions"]["mlflow"] == mlflow.__version__
    assert environment["hardware"]["torch_threads"] == torch.get_num_threads()
    assert len(environment["hardware"]["gpus"]) == torch.cuda.device_count()
    assert socket.gethostname() not in json.dumps(environment)
