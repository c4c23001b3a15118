"""What several test files share: making MLflow's tables or training a model takes seconds, a copy nothing."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from quantlab.tracking import Store, connect, open_store
from quantlab.vocabulary.schema import DigitsModelConfig, TrackingConfig
from tests.support.foreign import make_apart, make_here
from tests.support.shell import TINY, Shell, make_shell


def pytest_configure(config: pytest.Config) -> None:
    """One thread a worker, also in the processes that it starts: more than there are cores wait for each other. And no
    GPU where none is asked for: the tests that are of a processor mean one on every machine."""
    if not re.search(r"(?<!not )\bgpu\b", config.option.markexpr):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which is later
    os.environ["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # a server's job runners outlive it
    os.environ.pop("COLUMNS", None)  # whoever runs the tests has a terminal; what they look at has none
    gc.disable()  # until the first test: to collect a thousand tests makes no garbage, and looking at them takes seconds


_FREEZE, _UNFREEZE = gc.freeze, gc.unfreeze
_MANY_MODULES = 20
_settled = (None, 0)


@pytest.fixture(scope="session", autouse=True)
def kept_frozen() -> Iterator[None]:
    """What quantlab sets aside and takes back is its own process' business: here each of a thousand commands would thaw
    all libraries, and the next collection look at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        yield


@pytest.fixture
def freezing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a test of that: it begins thawed, and freezes and thaws as quantlab does."""
    monkeypatch.setattr(gc, "freeze", _FREEZE)
    monkeypatch.setattr(gc, "unfreeze", _UNFREEZE)
    gc.unfreeze()


@pytest.fixture(autouse=True)
def settled(request: pytest.FixtureRequest) -> None:
    """What is alive when a file begins, or after large imports, is left out of the collections that each stage does."""
    global _settled
    file, num_modules = _settled
    if request.path != file or len(sys.modules) > num_modules + _MANY_MODULES:
        gc.enable()
        gc.collect()
        _FREEZE()
        _settled = request.path, len(sys.modules)


def made_once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` fills once for all workers of a session; nobody writes into it afterwards."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".part")
            partial.mkdir()
            make(partial)
            partial.rename(folder)
    return folder


# -- tracking stores


@pytest.fixture(scope="session", autouse=True)
def migrated_once() -> Iterator[None]:
    """MLflow makes the tables of a new store by forty migrations, 0.7 s of CPU: once a process; then they are copied.

    No store of a test outlives a crash of the machine: nothing waits until the disk has written.
    """
    connect_sqlite, tables = connect._connect_sqlite, sqlite3.connect(":memory:", check_same_thread=False)

    def make_tables(engine: Any, migrate: Callable[[Any], None]) -> None:
        if engine.dialect.name != "sqlite":
            return migrate(engine)
        with contextlib.closing(engine.raw_connection()) as connection:
            if tables.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                migrate(engine)
                connection.driver_connection.backup(tables)
            else:
                tables.backup(connection.driver_connection)

    def unwaited(connection: Any, _record: Any) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    def patched(*args: Any) -> Any:  # mlflow is imported by whoever needs it
        from mlflow.store.db import utils
        from sqlalchemy import Engine, event

        if not event.contains(Engine, "connect", unwaited):
            event.listen(Engine, "connect", unwaited)
        if utils._initialize_tables is not copied.get("make"):
            copied["make"] = partial(make_tables, migrate=utils._initialize_tables)
            utils._initialize_tables = copied["make"]
        return connect_sqlite(*args)

    copied: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connect, "_connect_sqlite", patched)
        yield


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables and no experiment of ours."""
    config = TrackingConfig(uri="sqlite:///template.db", experiment="only in the template")
    return made_once(tmp_path_factory, "template", lambda folder: open_store(config, folder)) / "template.db"


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


# -- whole runs


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the tiny digits model and its judge."""
    from quantlab.models import digits_dit, judge

    def train(cache: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(digits_dit, "train_judge", partial(judge.train_judge, num_epochs=2))
            digits_dit.load(DigitsModelConfig(**TINY), "cpu", cache)

    return made_once(tmp_path_factory, "trained", train)


@pytest.fixture
def shell(template: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.delenv("QUANTLAB_TRACEBACK", raising=False)
    return make_shell(tmp_path / "my work", template, trained)


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and checkpoints of them that other libraries made."""
    return made_once(tmp_path_factory, "foreign", make_here)


@pytest.fixture(scope="session")
def foreign_modelopt(tmp_path_factory: pytest.TempPathFactory, foreign: Path) -> Path:
    """Those that ModelOpt made of them, which takes long."""
    return made_once(tmp_path_factory, "foreign_modelopt", partial(make_apart, foreign))
