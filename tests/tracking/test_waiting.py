"""What is waited for is said at once, and a store that never comes free is told with the way out."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from quantlab import progress
from quantlab.errors import TrackingError
from quantlab.report.reading import open_reader
from quantlab.tracking import Store, connect, open_store
from tests.support.stores import tracking_at

WAY_OUT = r"; end that process \(fuser .*mlflow\.db(\.lock)? names it\), or set tracking\.uri=sqlite:///<another file>$"


@pytest.fixture(autouse=True)
def _shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "console", Console(stderr=True, markup=False, emoji=False, width=300))


@contextlib.contextmanager
def held(database: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield


def test_a_database_that_another_process_keeps_locked(
    store: Store, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def locked(*_: object) -> None:
        raise OSError("(sqlite3.OperationalError) database is locked")

    with held(base / "outputs" / "mlflow.db"), monkeypatch.context() as quick:
        quick.setattr(connect, "_PROBE_SECONDS", 0.1)
        quick.setattr(connect, "bring_home", locked)  # MLflow itself tries for a while before it says so
        with pytest.raises(TrackingError, match=rf"^tracking\.uri=.*: another process keeps it locked{WAY_OUT}"):
            open_store(tracking_at(), base)
        real = sqlite3.connect
        quick.setattr(sqlite3, "connect", lambda *args, **kwargs: real(*args, **{**kwargs, "timeout": 0.1}))
        with pytest.raises(TrackingError, match=rf"^tracking\.uri=.*: another process keeps it locked{WAY_OUT}"):
            open_reader(tracking_at(), base).experiments()


def test_a_lock_that_another_process_holds_is_said_while_it_is_waited_for(
    store: Store, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connect, "_LOCK_SECONDS", 0.5)
    monkeypatch.setattr(connect, "_LOCK_MOMENT_SECONDS", 0.1)
    refused = pytest.raises(TrackingError, match=rf"has kept .*mlflow\.db\.lock for 0\.5 s{WAY_OUT}")
    with FileLock(base / "outputs" / "mlflow.db.lock", thread_local=False), refused:
        open_store(tracking_at(), base)
    assert "waiting at most 0 s" in capsys.readouterr().err
    assert open_store(tracking_at(), base).is_reached
    assert capsys.readouterr().err == ""


def test_a_mute_server_is_said_before_it_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(connect, "_PROBE_SECONDS", 0.5)
    monkeypatch.setattr(connect, "_MOMENT_SECONDS", 0.1)
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as mute:
        uri = f"http://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(TrackingError, match="no answer within"):
            open_store(tracking_at(uri), tmp_path)
    said = capsys.readouterr().err
    assert f"tracking.uri={uri}: no answer yet; waiting at most 1 s" in said
    assert len(said.splitlines()) <= 2
