"""Stores that are there, unreachable, lost and found again: real SQLite files, real processes, real sockets."""

from __future__ import annotations

import contextlib
import http.server
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from quantlab.errors import TrackingError
from quantlab.report.reading import open_reader
from quantlab.tracking import (
    Store,
    close_orphans,
    connect,
    find_records,
    find_runs,
    get_run,
    open_store,
    push_pending,
)
from quantlab.tracking.connect import first_line
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.stores import Unplugged, artifact, python, tracking_at

# -- addresses


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("file:///var/mlruns", "maintenance mode"),
        ("file:mlruns", "maintenance mode"),
        ("mlruns", "maintenance mode"),
        ("./outputs/mlruns", "maintenance mode"),
        ("", "maintenance mode"),
        ("sqlite:///", "kept in a file"),
        ("sqlite:///:memory:", "kept in a file"),
        ("sqlite:///a.db?mode=ro", r"holds \? or #"),
        ("databricks://x", "not supported"),
        ("postgresql://me:secret@host/db", r"postgresql://\*\*\*@host/db: not supported"),
    ],
)
@pytest.mark.parametrize("required", [True, False])
def test_addresses_that_are_refused(uri: str, why: str, required: bool, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=rf"^tracking\.uri=.*{why}.*tracking\.uri=") as raised:
        open_store(tracking_at(uri, required), tmp_path)
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
        open_store(tracking_at(), tmp_path)
    assert time.monotonic() - begun < 15
    assert open_store(tracking_at(required=False), tmp_path).is_reached is False
    assert len(caplog.records) == 1
    if kind == "foreign":
        assert (tmp_path / "outputs" / "mlflow.db").stat().st_size < 20_000, "MLflow's tables were written into it"


def test_deleted_experiment(store: Store, base: Path) -> None:
    store.client.delete_experiment(store.experiment_id)
    with pytest.raises(TrackingError, match=r"^tracking\.experiment=quantlab: is deleted .* choose another name$"):
        open_store(tracking_at(), base)


# -- several processes


@pytest.mark.slow
def test_two_sweeps_on_one_store_at_once(store: Store, runs: Path, base: Path) -> None:
    code = (
        "store = open_store(TrackingConfig(), base)\nname = sys.argv[2]\n"
        "with store.start_run(name, runs / name, {}, {}) as parent:\n"
        "    for i in range(8):\n"
        "        with store.start_run(f'{name}{i}', runs / f'{name}{i}', {'i': i}, {}, parent.run_id) as run:\n"
        "            run.log_metrics({'m': i})\n            run.log_json({'i': i}, 'i.json')\n"
    )
    sweeps = [python(code, str(base), name) for name in "ab"]
    for sweep in sweeps:
        out, err = sweep.communicate(timeout=120)
        assert (sweep.returncode, out, err) == (0, "", "")  # and no noise
    parents = {r["name"]: r["run_id"] for r in find_runs(store) if r["name"] in "ab"}
    for name in "ab":
        children = find_runs(store, {"mlflow.parentRunId": parents[name]})
        assert sorted((r["name"], r["metrics"]["m"]) for r in children) == [(f"{name}{i}", float(i)) for i in range(8)]


@pytest.mark.slow
def test_four_processes_open_a_fresh_store(tmp_path: Path) -> None:
    code = (
        "with open_store(TrackingConfig(), base).start_run('r', runs / sys.argv[2], {}, {}) as run:\n"
        "    run.log_metrics({'m': 1})\n"
    )
    started = [python(code, str(tmp_path), f"r{i}") for i in range(4)]
    for process in started:
        out, err = process.communicate(timeout=180)
        assert (process.returncode, out, err) == (0, "", "")
    store = open_store(tracking_at(), tmp_path)
    assert [r["metrics"] for r in find_runs(store)] == [{"m": 1.0}] * 4


def test_mlflow_is_imported_when_a_store_is_opened() -> None:
    code = (
        "import quantlab.tracking.provenance\nprint([m for m in ('mlflow', 'torch', 'sqlalchemy') if m in sys.modules])"
    )
    assert python(code, ".").communicate()[0].strip() == "[]"


# -- servers


def test_closed_port_is_refused_at_once(closed_port: int, tmp_path: Path) -> None:
    begun = time.monotonic()
    wanted = (
        rf"^tracking\.uri=http://127\.0\.0\.1:{closed_port}: no connection; start the server, "
        r"or set tracking\.required=false, or tracking\.uri=sqlite:///outputs/mlflow\.db$"
    )
    with pytest.raises(TrackingError, match=wanted):
        open_store(tracking_at(f"http://127.0.0.1:{closed_port}"), tmp_path)
    assert time.monotonic() - begun < 15  # on a busy machine; by default a dead server costs minutes


@pytest.mark.parametrize("seconds", [0.3, pytest.param(5, marks=pytest.mark.slow)])
def test_mute_server_is_refused_in_time(
    mute_port: int, tmp_path: Path, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert connect._PROBE_SECONDS == 5
    monkeypatch.setattr(connect, "_PROBE_SECONDS", seconds)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "7")  # the user's own settings do not prolong the probe
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r": no answer within .* s, twice; start the server, or set tracking\."):
        open_store(tracking_at(f"http://127.0.0.1:{mute_port}"), tmp_path)
    assert 2 * seconds <= time.monotonic() - begun < 2 * seconds + 15


def test_something_else_answers(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(TrackingError, match=r"^tracking\.uri=http://.*: answers, but not as an MLflow server"):
            open_store(tracking_at(f"http://127.0.0.1:{server.server_port}"), tmp_path)
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("answer", ['{"runs": "x"}', '{"runs": [{"info": {"start_time": "yesterday"}}]}'])
def test_an_answer_that_is_no_mlflows(tmp_path: Path, answer: str) -> None:
    """It is JSON, and MLflow's client raises what protobuf does."""

    class Other(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.do_GET(answer)

        def do_GET(self, text: str = '{"experiment": {"experiment_id": "1", "lifecycle_stage": "active"}}') -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        store = open_store(tracking_at(f"http://127.0.0.1:{server.server_port}"), tmp_path)
        with pytest.raises(TrackingError, match=r"^tracking\.uri=http://.*: cannot be read \(Failed to parse runs"):
            find_runs(store)
    finally:
        server.shutdown()
        server.server_close()


def test_unreached_store_is_filled_later(
    closed_port: int, store: Store, runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        away = open_store(tracking_at(f"http://127.0.0.1:{closed_port}", required=False), tmp_path)
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
    [job] = find_runs(store, {"quantlab.key": "k"})
    [sweep] = [r for r in find_runs(store) if r["name"] == "sweep"]
    assert job["tags"]["mlflow.parentRunId"] == sweep["run_id"]
    assert (job["params"], job["metrics"]) == ({"a": "1"}, {"m": 2.5})
    assert job["start_ms"] == json.loads((runs / "aa" / "run.json").read_text())["start_ms"]
    assert json.loads(artifact(store, job["run_id"], "layers.json"))["columns"] == ["x"]


def test_store_lost_in_the_middle_of_a_run(store: Store, runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    plugged, unplugged = store._client, Unplugged()
    with store.start_run("sweep", runs / "sweep", {}, {}) as parent:
        with store.start_run("before", runs / "before", {}, {}, parent.run_id) as run:
            run.log_metrics({"m": 1})
            store._client = unplugged
            run.log_metrics({"n": 2})
            run.log_json({"x": 1}, "x.json")
        with store.start_run("after", runs / "after", {}, {}, parent.run_id) as late:
            late.log_metrics({"m": 4})
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert unplugged.calls == 1, "a store that is gone must not cost time at each call"

    store._client = plugged
    assert get_run(store, run.run_id)["status"] == "RUNNING"
    again = Store(store.uri, plugged, store.experiment_id)  # the next start
    assert push_pending(again, runs) == ["sweep", "before", "after"]
    assert push_pending(again, runs) == []
    assert close_orphans(again, runs) == []
    found = {r["name"]: r for r in find_runs(again)}
    assert set(found) == {"sweep", "before", "after"}
    assert found["before"]["metrics"] == {"m": 1.0, "n": 2.0}
    assert found["after"]["tags"]["mlflow.parentRunId"] == parent.run_id == found["sweep"]["run_id"]
    assert json.loads(artifact(again, run.run_id, "x.json")) == {"x": 1}


def test_store_that_answers_again_gets_everything(store: Store, runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.tracking.store._FIRST_PAUSE_S", 0.0)
    store._pause = 0.0
    plugged = store._client
    with store.start_run("r", runs / "r", {}, {}) as run:
        store._client = Unplugged()
        run.log_metrics({"m": 1})
        store._client = plugged
        run.log_metrics({"n": 2})
        assert get_run(store, run.run_id)["metrics"] == {"m": 1.0, "n": 2.0}


def test_another_store_gets_all_of_an_unfinished_record(store: Store, runs: Path, base: Path, template: Path) -> None:
    """Begun in one store, lost there, pushed to another: all of it, under the parent's new id, and only once."""
    parent = store.start_run("sweep", runs / "sweep", {"p": 1}, {})
    child = store.start_run("job", runs / "job", {"a": 1}, {}, parent.run_id)
    child.log_metrics({"m": 1})
    old_id = parent.run_id
    store._client = Unplugged()
    child.finish("FINISHED")
    parent.finish("FINISHED")
    shutil.copyfile(template, base / "other.db")
    other = open_store(tracking_at("sqlite:///other.db"), base)
    assert push_pending(other, runs) == ["sweep", "job"]
    sent = runs / "job" / "tracking" / "sent.json"
    sent.write_text(json.dumps({**json.loads(sent.read_text()), "run_id": None, "offset": 0, "done": False}))
    assert push_pending(other, runs) == ["job"]  # as if the note of the first push was lost
    found = {r["name"]: r for r in find_runs(other)}
    assert len(find_runs(other)) == 2
    assert found["job"]["tags"]["mlflow.parentRunId"] == found["sweep"]["run_id"] != old_id
    assert found["job"]["params"] == {"a": "1"}
    assert found["job"]["metrics"] == {"m": 1.0}


def test_store_made_anew_under_the_same_address(store: Store, runs: Path, base: Path, template: Path) -> None:
    run = store.start_run("r", runs / "r", {"a": 1}, {})
    run.log_metrics({"m": 1})
    store._client = Unplugged()
    run.finish("FINISHED")
    shutil.copyfile(template, base / "new.db")
    new = open_store(tracking_at("sqlite:///new.db"), base)
    new.uri = store.uri
    assert push_pending(new, runs) == ["r"]
    assert [r["metrics"] for r in find_runs(new)] == [{"m": 1.0}]


@pytest.mark.parametrize("way", ["deleted", "replaced"])
def test_a_file_that_went_while_the_process_lives(way: str, store: Store, base: Path, template: Path) -> None:
    """MLflow keeps its connections by address: the next run would be written into the file that is gone."""
    store.start_run("before", base / "before", {}, {}).finish("FINISHED")
    if way == "deleted":
        shutil.rmtree(base / "outputs")
    else:
        shutil.copyfile(template, base / "another.db")
        (base / "another.db").replace(base / "outputs" / "mlflow.db")
    for name in ("first", "second"):
        new = open_store(tracking_at(), base)
        new.start_run(name, base / name, {}, {}).finish("FINISHED")
        assert not new.was_lost
    reader = open_reader(tracking_at(), base)
    runs = reader.of_experiment(reader.experiments()["quantlab"], {})
    assert {run.name for run in runs} == {"first", "second"} == {run["name"] for run in find_runs(new)}


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
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--port",
        str(closed_port),
        "--workers",
        "1",
        "--backend-store-uri",
        f"sqlite:///{tmp_path}/s.db",
        "--artifacts-destination",
        str(tmp_path / "art"),
    ]
    with (tmp_path / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=tmp_path)
    try:
        for _ in range(120):
            with contextlib.suppress(TrackingError):
                remote = open_store(tracking_at(uri), tmp_path)
                break
            time.sleep(1)
        with remote.start_run("sweep", runs / "sweep", {"p": 1}, {}) as parent:
            with remote.start_run("job", runs / "job", {"a": 1}, {"quantlab.key": "k"}, parent.run_id) as run:
                run.log_json({"x": 1}, "x.json")
                run.log_metrics({"m": 1})
                assert get_run(remote, run.run_id)["metrics"] == {"m": 1.0}
                assert json.loads(artifact(remote, run.run_id, "x.json")) == {"x": 1}
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
    [job] = find_runs(store, {"quantlab.key": "k"})
    assert job["metrics"] == {"m": 1.0, "n": 2.0}
    assert json.loads(artifact(store, job["run_id"], "x.json")) == {"x": 1}


class _Drip(http.server.BaseHTTPRequestHandler):
    """Answers with one byte at a time, and never comes to an end."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(200):
                self.wfile.write(b"{")
                self.wfile.flush()
                time.sleep(0.05)

    do_POST = do_GET

    def log_message(self, *args: object) -> None:
        """No noise."""


@pytest.fixture
def dripping() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Drip)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_server_that_drips_is_refused_in_time(dripping: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connect, "_PROBE_SECONDS", 0.4)
    begun = time.monotonic()
    with pytest.raises(TrackingError, match=r": no answer within 0\.4 s, twice; start the server"):
        open_store(tracking_at(dripping), tmp_path)
    assert time.monotonic() - begun < 8  # it drips for 10 s


def test_a_server_that_begins_to_drip_is_lost_and_the_run_goes_on(
    dripping: str, store: Store, runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    from quantlab.tracking import store as store_module

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(store_module, "ANSWER_SECONDS", 0.5)
    with store.start_run("dripped on", runs / "20260101-000000-drip", {}, {}) as run:
        known = run.record.sent()
        assert known is not None
        monkeypatch.setattr(store, "uri", dripping)
        run.record.save_sent(replace(known, uri=dripping))
        monkeypatch.setattr(store, "_client", MlflowClient(tracking_uri=dripping))
        begun = time.monotonic()
        run.log_metrics({"m": 1.0})
        assert time.monotonic() - begun < 8
        assert store.is_lost
    assert run.record.summary["metrics"] == {"m": 1.0}
    assert sum("the store is lost (no whole answer within" in r.getMessage() for r in caplog.records) == 1


def test_what_a_call_raises_is_raised_where_it_was_called() -> None:
    assert connect.within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        connect.within(5, lambda: {}["x"])
    with pytest.raises(TimeoutError, match=r"^no whole answer within 0\.1 s$"):
        connect.within(0.1, lambda: time.sleep(5))


def test_the_reason_of_a_databases_error_is_told_and_not_the_advice_before_it():
    advice = "(raised as a result of Query-invoked autoflush; consider using a session.no_autoflush block)"
    assert first_line(ValueError(f"{advice}\n(sqlite3.OperationalError) disk is full\n[SQL: x]")).endswith(
        "disk is full"
    )
    assert first_line(ValueError(advice)) == advice
    assert first_line(ValueError("")) == "ValueError"


def test_who_only_reads_a_server_makes_no_experiment(tmp_path, monkeypatch, template):
    """Neither a dry run nor a comparison whose experiment is mistyped."""
    from mlflow import MlflowClient

    shutil.copyfile(template, tmp_path / "here.db")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/here.db")
    monkeypatch.setattr("quantlab.tracking.connect._probe", lambda uri: None)
    monkeypatch.setattr("mlflow.MlflowClient", lambda tracking_uri: client)
    config = TrackingConfig(uri="http://127.0.0.1:9", experiment="nobody")
    reader = open_reader(config, tmp_path)
    assert "nobody" not in reader.experiments()
    assert open_store(config, tmp_path).experiment_id == reader.experiments()["nobody"], "a run makes it"
