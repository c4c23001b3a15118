"""Reaching a tracking store: which addresses are accepted, how one is opened, and what is said when it cannot be."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from errno import EEXIST, ENOTDIR
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit, urlunsplit

from quantlab.errors import TrackingError
from quantlab.progress import printable, say
from quantlab.tracking.moved import bring_home
from quantlab.vocabulary.fields import checked_path
from quantlab.vocabulary.schema import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient

_T = TypeVar("_T")
_PROBE_SECONDS = 5
ANSWER_SECONDS = 15
"""A server's answer is whole by then, or it counts as lost."""
SLOWEST_BYTES_S = 100_000
"""An upload may take longer: as long as it goes on at this pace."""
_MOMENT_SECONDS = 1.0
_LOCK_MOMENT_SECONDS = 10.0  # who opens a new store on a busy machine has the lock for some seconds
_LOCK_SECONDS = 120
NO_STORE = "none"
"""Address of no store: runs have their folders alone."""
SQLITE = "sqlite:///"
_WAY_OUT = "set tracking.required=false, or tracking.uri=sqlite:///outputs/mlflow.db"
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE")
_PASSING_STATUS = (401, 403, 404, 408, 429)
"""Answers of a server that may change: a token that ran out, a proxy without its server, too much at once."""


def resolved_uri(uri: str, base_dir: Path) -> str:
    """``uri`` with a relative SQLite path made absolute from ``base_dir``; TrackingError for what is not supported, and
    ConfigError for what no file can be called."""
    if uri == NO_STORE:
        return uri
    if uri.startswith(("http://", "https://")) and urlsplit(uri).hostname:
        return uri.rstrip("/")
    if uri.startswith(SQLITE):
        path = checked_path("tracking.uri", uri.removeprefix(SQLITE))
        if not path.name or ":memory:" in uri:
            raise TrackingError(
                f"tracking.uri={uri}: runs are kept in a file; set tracking.uri=sqlite:///outputs/mlflow.db"
            )
        whole = base_dir.absolute() / path
        if set("?#") & set(str(whole)):
            raise TrackingError(f"tracking.uri={uri}: the path {whole} holds ? or #; set tracking.uri=sqlite:///<path>")
        return f"{SQLITE}{whole}"
    if "://" not in uri or uri.startswith("file:"):
        raise TrackingError(
            f"tracking.uri={uri}: MLflow's file store is in maintenance mode and not supported; "
            "set tracking.uri=sqlite:///outputs/mlflow.db"
        )
    raise TrackingError(
        f"tracking.uri={shown_uri(uri)}: not supported; set tracking.uri=sqlite:///<file>, or "
        "tracking.uri=http(s)://<host> of an MLflow server"
    )


def shown_uri(uri: str) -> str:
    """``uri`` without a user's name and password."""
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc="***@" + parts.netloc.rpartition("@")[2]))


def connect(uri: str, experiment: str, makes: bool = True) -> tuple[MlflowClient, str]:
    """A client on the store at ``uri`` and the id of ``experiment``, which is created where it is missing; without
    ``makes`` a server is only read, and the id of what it has not is "".

    Raises TrackingError within 15 s where a server does not answer, and for a database that cannot be used.
    """
    _quiet_mlflow()
    if uri.startswith(SQLITE):
        return _connect_sqlite(Path(uri.removeprefix(SQLITE)), uri, experiment)
    _probe(uri)
    for name, value in (("MAX_RETRIES", "1"), ("TIMEOUT", str(_PROBE_SECONDS)), ("BACKOFF_FACTOR", "1")):
        os.environ.setdefault(f"MLFLOW_HTTP_REQUEST_{name}", value)  # by default a dead server costs 4 minutes a call
    from mlflow import MlflowClient

    with _environment(MLFLOW_HTTP_REQUEST_MAX_RETRIES="0", MLFLOW_HTTP_REQUEST_TIMEOUT=str(_PROBE_SECONDS)):
        try:
            client = MlflowClient(tracking_uri=uri)
            slow = f"tracking.uri={shown_uri(uri)}: it takes long to answer"
            with _said_while_waiting(slow, _PROBE_SECONDS, _MOMENT_SECONDS):
                return client, within(_PROBE_SECONDS, lambda: _experiment_id(client, experiment, None, makes))
        except store_errors() as error:
            raise TrackingError(
                f"tracking.uri={shown_uri(uri)}: answers, but not as an MLflow server that takes runs "
                f"({first_line(error)}); {_WAY_OUT}"
            ) from error


def check_store(config: TrackingConfig, base_dir: Path) -> None:
    """TrackingError where a run's database could not be used, as far as that is known without MLflow: nothing is made.

    A server is not asked. Without ``config.required`` a run goes on, whatever the store says.
    """
    uri = resolved_uri(config.uri, base_dir)
    if not uri.startswith(SQLITE) or not config.required:
        return
    path = Path(uri.removeprefix(SQLITE))
    there = next(place for place in (path, *path.parents) if place.exists())
    try:
        if there == path:
            _check_sqlite(path)
        else:
            with tempfile.TemporaryFile(dir=there):  # it has no name there, and leaves nothing
                return
    except OSError as error:
        raise _unusable(uri, error) from error


def _unusable(uri: str, error: Exception) -> TrackingError:
    if "database is locked" in str(error):
        return TrackingError(f"tracking.uri={uri}: {of_a_locked(Path(uri.removeprefix(SQLITE)))}")
    return TrackingError(
        f"tracking.uri={uri}: cannot be used ({_reason(error)}); set tracking.uri=sqlite:///<another file>, or "
        "tracking.required=false"
    )


def of_a_locked(database: Path) -> str:
    """What to say of a database that another process does not let go."""
    return (
        f"another process keeps it locked; end that process (fuser {database} names it), or set "
        "tracking.uri=sqlite:///<another file>"
    )


@contextlib.contextmanager
def _said_while_waiting(text: str, most_s: float, moment_s: float) -> Iterator[None]:
    """Say that something is waited for, once that has taken a moment."""
    timer = threading.Timer(moment_s, say, [f"{text}; waiting at most {most_s:.0f} s"])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _reason(error: Exception) -> str:
    """What the system says of a file or folder, whoever asked it: not which step of ours it was."""
    number = error.errno if isinstance(error, OSError) else None
    return first_line(error) if number is None else os.strerror(ENOTDIR if number == EEXIST else number)


def store_errors() -> tuple[type[Exception], ...]:
    """What a store that fails raises: MLflow's own error, the database's, the network's and the disk's, and that of an
    answer which is JSON and not MLflow's."""
    from google.protobuf.json_format import ParseError
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError, ParseError


def is_refusal(error: Exception) -> bool:
    """Whether the store is there and will not take this, now or later."""
    status = getattr(getattr(error, "response", None), "status_code", 0)  # of an artifact's upload
    return getattr(error, "error_code", None) in _REFUSALS or (400 <= status < 500 and status not in _PASSING_STATUS)


def first_line(error: Exception) -> str:
    """The beginning of an error's text, on one line; without the advice that SQLAlchemy puts before the reason."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    reason = lines[1:] if lines[0].startswith("(raised as a result of") else ()
    return printable((reason or lines)[0], 200)


def _quiet_mlflow() -> None:
    """Before mlflow is imported: no telemetry, no hints, no addresses on stdout, no bars."""
    for name in ("MLFLOW_DISABLE_TELEMETRY", "MLFLOW_DISABLE_AGENT_HINT", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"):
        os.environ.setdefault(name, "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # One warns of every retry, the other shows a traceback of every failure; one warning of ours is enough.
    for name, level in (("urllib3.connectionpool", logging.ERROR), ("mlflow.store.db.utils", logging.CRITICAL)):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(level)


def _connect_sqlite(path: Path, uri: str, experiment: str) -> tuple[MlflowClient, str]:
    """The constructor makes some 65 tables; two processes doing that on a fresh file break it for good."""
    from filelock import FileLock, Timeout

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock, told = FileLock(f"{path}.lock", timeout=_LOCK_SECONDS), f"tracking.uri={uri}: {path}.lock is another's"
        with contextlib.ExitStack() as held:
            with _said_while_waiting(f"{told}, who opens the store", _LOCK_SECONDS, _LOCK_MOMENT_SECONDS):
                held.enter_context(lock)
            own = _own_address(path, _check_sqlite(path))
            bring_home(path, path.parent / "mlartifacts")
            from mlflow import MlflowClient

            client = MlflowClient(tracking_uri=own)
            return client, _experiment_id(client, experiment, path.parent / "mlartifacts")
    except TrackingError:
        raise
    except Timeout as error:
        raise TrackingError(
            f"tracking.uri={uri}: another process has kept {path}.lock for {_LOCK_SECONDS} s; end that process "
            f"(fuser {path}.lock names it), or set tracking.uri=sqlite:///<another file>"
        ) from error
    except store_errors() as error:
        raise _unusable(uri, error) from error


_FILES: dict[Path, list[tuple[int, int]]] = {}
"""Place of a database -> the files that this process has met there, by device and inode."""


def _own_address(path: Path, has_tables: bool) -> str:
    """The address of the file that is at ``path`` now. MLflow keeps what it opened by address, and would go on with one
    that was deleted or replaced meanwhile: each file is spelled in its own way."""
    found, known = path.stat(), _FILES.setdefault(path, [])
    file = (found.st_dev, found.st_ino)
    if not known or not has_tables or known[-1] != file:
        known.append(file)
    return f"{SQLITE}{path.parent}{'/.' * (len(known) - 1)}/{path.name}"


def _check_sqlite(path: Path) -> bool:
    """Are there tables in it? OSError where ``path`` is no database of MLflow's that can be written (MLflow itself
    would retry for an hour)."""
    import sqlite3

    try:
        with contextlib.closing(sqlite3.connect(path, timeout=_PROBE_SECONDS)) as database:
            database.execute("BEGIN IMMEDIATE")
            tables = {row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
            database.rollback()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):  # in use, so usable
            return True
        raise OSError(str(error)) from error
    except sqlite3.DatabaseError as error:
        raise OSError(str(error)) from error
    if tables and "alembic_version" not in tables:
        raise OSError("it is a database, but not one of MLflow")
    return bool(tables)


def _experiment_id(client: MlflowClient, name: str, artifacts: Path | None, makes: bool = True) -> str:
    """The id of the experiment ``name``, created by whichever process comes first."""
    found = client.get_experiment_by_name(name)
    if found is None and not makes:
        return ""
    if found is None:
        from mlflow.exceptions import MlflowException

        try:
            made: str = client.create_experiment(name, artifact_location=artifacts.as_uri() if artifacts else None)
            return made
        except MlflowException as error:
            found = client.get_experiment_by_name(name)  # another process made it meanwhile
            if found is None:
                raise TrackingError(f"tracking.experiment={name}: {first_line(error)}; choose another name") from error
    if found.lifecycle_stage == "deleted":
        raise TrackingError(
            f"tracking.experiment={name}: is deleted in this store; restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or choose another name"
        )
    experiment_id: str = found.experiment_id
    return experiment_id


def _probe(uri: str) -> None:
    """TrackingError unless something answers at ``uri``: 2 tries of 5 s, before mlflow is imported."""
    import requests

    for attempt in (1, 2):
        try:
            unheard = f"tracking.uri={shown_uri(uri)}: no answer yet"
            with _said_while_waiting(unheard, _PROBE_SECONDS * (3 - attempt), _MOMENT_SECONDS):
                within(_PROBE_SECONDS, lambda: requests.get(f"{uri}/health", timeout=_PROBE_SECONDS))
            return
        except requests.exceptions.SSLError:  # it answers; whether its certificate is trusted is MLflow's setting
            return
        except (requests.RequestException, TimeoutError) as error:
            if attempt == 2:
                mute = isinstance(error, (requests.Timeout, TimeoutError))
                why = f"no answer within {_PROBE_SECONDS} s, twice" if mute else "no connection"
                raise TrackingError(f"tracking.uri={shown_uri(uri)}: {why}; start the server, or {_WAY_OUT}") from error


def within(seconds: float, call: Callable[[], _T]) -> _T:
    """What ``call`` returns; TimeoutError where it takes longer, whatever it waits for.

    The timeouts of HTTP clients are those of a single read: a server that sends a byte a second holds them for good.
    The call goes on in a thread of its own, which ends with its connection or with the process.
    """
    done: list[_T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:  # noqa: BLE001  whatever it is, it is raised where it was called
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"no whole answer within {seconds:g} s")
    return done[0]


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Environment variables for a moment; MLflow reads them at each call."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
