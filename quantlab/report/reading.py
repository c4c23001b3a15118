"""Reading many runs at once: a SQLite store directly, a server through MLflow's client.

MLflow's own reader builds an object for every metric, parameter and tag: 9 s for 1,000 runs, where four queries take
half a second. The tables that are read (``runs``, ``latest_metrics``, ``params``, ``tags``) are MLflow's schema since
1.0; a database that lacks them is refused.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote, unquote, urlsplit

from quantlab.errors import TrackingError, nearest
from quantlab.progress import say
from quantlab.tracking import (
    RunData,
    Store,
    experiment_runs,
    experiments,
    find_records,
    get_artifact,
    get_run,
    newest_run,
    open_store,
)
from quantlab.tracking.connect import NO_STORE, of_a_locked, resolved_uri, store_errors
from quantlab.tracking.record import folders_with_records
from quantlab.tracking.tags import KIND
from quantlab.tracking.values import is_as_written
from quantlab.vocabulary.schema import TrackingConfig

SQLITE = "sqlite:///"
_BATCH = 500  # variables in one SQL statement


@dataclass(frozen=True, kw_only=True)
class StoredRun:
    """One run as the store has it; params and tags are text, metrics the last values."""

    run_id: str
    name: str
    status: str
    start_ms: int
    experiment_id: str
    artifact_uri: str
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


class Reader(Protocol):
    """A store that is read: runs come newest first, deleted ones not at all."""

    @property
    def uri(self) -> str:
        """The store's address."""

    def experiments(self) -> dict[str, str]:
        """Experiment name -> id."""

    def by_id(self, run_ids: Sequence[str]) -> list[StoredRun]:
        """Those of the runs that exist, in the given order."""

    def of_experiment(self, experiment_id: str, tags: Mapping[str, str]) -> list[StoredRun]:
        """The experiment's runs that have all of ``tags``; in a value, ``%`` stands for any text."""

    def newest_sweep(self, experiment_ids: Sequence[str]) -> StoredRun | None:
        """The newest finished sweep of these experiments."""

    def read_artifact(self, run: StoredRun, name: str) -> bytes | None:
        """An artifact's bytes; None where the run has no such artifact or it cannot be reached."""

    def add_artifact(self, run: StoredRun, path: Path, folder: str) -> bool:
        """Put a file into ``folder`` of a run's artifacts, ended or not; False where the store does not take it."""


def open_reader(config: TrackingConfig, base_dir: Path, output_dir: str = "outputs") -> Reader:
    """A reader of the store at ``config.uri``; a relative SQLite path starts at ``base_dir``.

    Of no store (``none``), and where the usual one was never made, the runs' own folders in ``output_dir`` are read.
    Raises TrackingError for an address that is not supported, a file that does not exist or is no database of MLflow's,
    and a server that does not answer.
    """
    uri = resolved_uri(config.uri, base_dir)
    runs_dir = base_dir / Path(output_dir).expanduser() / "runs"
    if uri == NO_STORE:
        return FolderReader(runs_dir, config.experiment)
    if not uri.startswith(SQLITE):
        return ServerReader(open_store(config, base_dir, makes=False))
    database = Path(uri.removeprefix(SQLITE))
    if not database.is_file():
        if config.uri == TrackingConfig().uri and folders_with_records(runs_dir):
            return FolderReader(runs_dir, config.experiment)
        raise TrackingError(
            f"tracking.uri={config.uri}: no such file: nothing was run here yet; start where the runs were made, name "
            "the store with tracking.uri=sqlite:///<path>/mlflow.db, or run something first, as quantlab "
            "recipe=digits_backends"
        )
    reader = DatabaseReader(database, uri)
    reader.experiments()
    return reader


def reader_of(store: Store) -> Reader:
    """A reader of a store that is open; TrackingError for one that was not reached."""
    if not store.uri.startswith(SQLITE):
        return ServerReader(store)
    return DatabaseReader(Path(store.uri.removeprefix(SQLITE)), store.uri)


def experiment_id(reader: Reader, name: str, typed: str) -> str:
    """The id of an experiment; TrackingError beginning with ``typed`` where there is none of that name."""
    known = reader.experiments()
    if name not in known:
        have = ", ".join(sorted(known)) or "none"
        raise TrackingError(f"{typed}: no such experiment in {reader.uri}{nearest(name, known)}; it has {have}")
    return known[name]


def tell_of_newer(reader: Reader, experiment: str, shown: StoredRun, typed: str) -> None:
    """A line where ``latest`` is not the latest: only the usual experiment is looked into, and a recipe may name its
    own. Whoever names another experiment means it."""
    others = {number: name for name, number in reader.experiments().items() if name != experiment}
    if experiment != TrackingConfig().experiment or not others:
        return
    newer = reader.newest_sweep(list(others))
    if newer and newer.start_ms > shown.start_ms:
        name = others[newer.experiment_id]
        say(f"{typed}: a newer sweep is in experiment {name}: {newer.name}; its id is {newer.run_id}", "warning")


def read_json(reader: Reader, run: StoredRun, name: str) -> dict[str, Any]:
    """An artifact that is a JSON object; empty where the run has none such, and, with a word, where it was changed."""
    content = reader.read_artifact(run, name) or b""
    if content and not is_as_written(run.tags, name, content):
        if (run.run_id, name) not in _TOLD:
            _TOLD.add((run.run_id, name))
            told = f"{run.name} ({run.run_id}): {name} is not what the run wrote; it is left out, run the job again"
            say(told, "warning")
        return {}
    return json_object(content)


_TOLD: set[tuple[str, str]] = set()
"""Changed artifacts that were named already."""


def json_object(text: str | bytes) -> dict[str, Any]:
    """The JSON object in ``text``; empty for anything else."""
    try:
        data = json.loads(text)
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


@dataclass(frozen=True)
class DatabaseReader:
    """An SQLite store: its tables by SQL, its artifacts as files."""

    database: Path
    uri: str

    def experiments(self) -> dict[str, str]:
        """Experiment name -> id."""
        rows = self._rows("SELECT name, experiment_id FROM experiments WHERE lifecycle_stage = 'active'")
        return {name: str(number) for name, number in rows}

    def by_id(self, run_ids: Sequence[str]) -> list[StoredRun]:
        """Those of the runs that exist, in the given order."""
        found: dict[str, StoredRun] = {}
        for i in range(0, len(run_ids), _BATCH):
            some = run_ids[i : i + _BATCH]
            found |= {r.run_id: r for r in self._runs(f"run_uuid IN ({','.join('?' * len(some))})", some)}
        return [found[i] for i in run_ids if i in found]

    def of_experiment(self, experiment_id: str, tags: Mapping[str, str]) -> list[StoredRun]:
        """The experiment's runs that have all of ``tags``."""
        where, values = "experiment_id = ?", [experiment_id]
        for key, value in tags.items():
            match = "LIKE" if "%" in value else "="
            where += f" AND run_uuid IN (SELECT run_uuid FROM tags WHERE key = ? AND value {match} ?)"
            values += [key, value]
        return self._runs(where, values)

    def newest_sweep(self, experiment_ids: Sequence[str]) -> StoredRun | None:
        """The newest finished sweep of these experiments."""
        found = self._rows(
            "SELECT r.run_uuid FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = ? AND t.value = 'sweep' "
            "WHERE r.status = 'FINISHED' AND r.lifecycle_stage = 'active' "
            f"AND r.experiment_id IN ({','.join(experiment_ids)}) ORDER BY r.start_time DESC LIMIT 1",
            [KIND],
        )
        return next(iter(self.by_id([run_id for (run_id,) in found])), None)

    def read_artifact(self, run: StoredRun, name: str) -> bytes | None:
        """An artifact's bytes; None where the run has no such file."""
        with contextlib.suppress(OSError):
            return _bytes_of(self._folder(run) / name)
        return None

    def add_artifact(self, run: StoredRun, path: Path, folder: str) -> bool:
        """Copy a file into ``folder`` of a run's artifacts; False where that cannot be written, or is not beside the
        database: a store may be another's, and say any place."""
        beside = self.database.parent
        return _copied(path, self._folder(run) / folder, beside, beside / "mlartifacts")  # which may be on another disk

    def _folder(self, run: StoredRun) -> Path:
        """Where a run's artifacts are: beside the database, so that a store may be moved, else where the run says."""
        beside = self.database.parent / "mlartifacts" / run.run_id / "artifacts"
        parts = urlsplit(run.artifact_uri)
        return beside if beside.is_dir() else Path(unquote(parts.path) if parts.scheme == "file" else run.artifact_uri)

    def _runs(self, where: str, values: Sequence[str]) -> list[StoredRun]:
        where += " AND lifecycle_stage = 'active'"
        columns = "run_uuid, name, status, start_time, experiment_id, artifact_uri"
        rows = self._rows(f"SELECT {columns} FROM runs WHERE {where} ORDER BY start_time DESC, run_uuid", values)
        runs = {
            row[0]: StoredRun(
                run_id=row[0],
                name=row[1] or "",
                status=row[2],
                start_ms=row[3] or 0,
                experiment_id=str(row[4]),
                artifact_uri=row[5] or "",
            )
            for row in rows
        }
        chosen = f"run_uuid IN (SELECT run_uuid FROM runs WHERE {where})"
        for table, kind in (("params", "params"), ("tags", "tags"), ("latest_metrics", "metrics")):
            for run_id, key, value in self._rows(f"SELECT run_uuid, key, value FROM {table} WHERE {chosen}", values):
                getattr(runs[run_id], kind)[key] = value
        return list(runs.values())

    def _rows(self, query: str, values: Sequence[str] = ()) -> list[tuple[Any, ...]]:
        try:
            with contextlib.closing(sqlite3.connect(f"file:{quote(str(self.database))}?mode=ro", uri=True)) as database:
                return database.execute(query, values).fetchall()
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise TrackingError(f"tracking.uri={self.uri}: {of_a_locked(self.database)}") from error
            raise TrackingError(
                f"tracking.uri={self.uri}: cannot be read as an MLflow database ({error}); name another with "
                "tracking.uri=sqlite:///<path>/mlflow.db"
            ) from error


@dataclass(frozen=True)
class FolderReader:
    """No store: the runs' own folders. They are of one experiment, whatever it is called."""

    runs_dir: Path
    experiment: str

    @property
    def uri(self) -> str:
        """The folder of the runs."""
        return str(self.runs_dir)

    def experiments(self) -> dict[str, str]:
        """The one that there is."""
        return {self.experiment: "0"}

    def by_id(self, run_ids: Sequence[str]) -> list[StoredRun]:
        """Those of the runs that exist, in the given order."""
        found = {run.run_id: run for run in self._runs}
        return [found[i] for i in run_ids if i in found]

    def of_experiment(self, experiment_id: str, tags: Mapping[str, str]) -> list[StoredRun]:
        """The runs that have all of ``tags``."""
        return [run for run in self._runs if all(_is_like(run.tags.get(key), value) for key, value in tags.items())]

    def newest_sweep(self, experiment_ids: Sequence[str]) -> StoredRun | None:
        """The newest finished sweep."""
        return next((run for run in self._runs if run.tags.get(KIND) == "sweep" and run.status == "FINISHED"), None)

    def read_artifact(self, run: StoredRun, name: str) -> bytes | None:
        """The bytes of a file of the run's folder; None where it has no such file."""
        with contextlib.suppress(OSError):
            return _bytes_of(Path(run.artifact_uri) / name)
        return None

    def add_artifact(self, run: StoredRun, path: Path, folder: str) -> bool:
        """Copy a file into ``folder`` of the run's folder; False where that cannot be written."""
        return _copied(path, Path(run.artifact_uri) / folder, self.runs_dir)

    @cached_property
    def _runs(self) -> list[StoredRun]:
        return [
            StoredRun(
                run_id=run["run_id"],
                name=run["name"],
                status=run["status"],
                start_ms=run["start_ms"],
                experiment_id="0",
                artifact_uri=run["folder"],
                params=run["params"],
                tags=run["tags"],
                metrics=run["metrics"],
            )
            for run in find_records(self.runs_dir, {}, status=None)
        ]


def _is_like(value: str | None, wanted: str) -> bool:
    """SQL's ``LIKE``, as far as it is used: ``%`` stands for any text."""
    pattern = ".*".join(map(re.escape, wanted.split("%")))
    return value is not None and re.fullmatch(pattern, value, re.DOTALL) is not None


def _bytes_of(file: Path) -> bytes | None:
    """Of a file; None of a pipe or a device, which has no end."""
    return file.read_bytes() if file.is_file() else None


def _copied(path: Path, target: Path, *homes: Path) -> bool:
    if not any(target.resolve().is_relative_to(home.resolve()) for home in homes):
        return False
    draft = target / f".{path.name[:100]}.{os.getpid()}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, draft)
        draft.replace(target / path.name)  # of a link itself, not of the file that it leads to
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        return False
    return True


class ServerReader:
    """A store that is read through MLflow's client; TrackingError for one that was not reached."""

    def __init__(self, store: Store) -> None:
        self._store, self._client = store, store.client

    @property
    def uri(self) -> str:
        """The store's address."""
        return self._store.uri

    def experiments(self) -> dict[str, str]:
        """Experiment name -> id."""
        return experiments(self._store)

    def by_id(self, run_ids: Sequence[str]) -> list[StoredRun]:
        """Those of the runs that exist, in the given order."""
        found = (get_run(self._store, run_id) for run_id in run_ids)
        return [_stored(run) for run in found if run is not None]

    def of_experiment(self, experiment_id: str, tags: Mapping[str, str]) -> list[StoredRun]:
        """The experiment's runs that have all of ``tags``."""
        return [_stored(run) for run in experiment_runs(self._store, experiment_id, tags)]

    def newest_sweep(self, experiment_ids: Sequence[str]) -> StoredRun | None:
        """The newest finished sweep of these experiments."""
        found = newest_run(self._store, experiment_ids, {KIND: "sweep"})
        return _stored(found) if found else None

    def read_artifact(self, run: StoredRun, name: str) -> bytes | None:
        """An artifact's bytes; None where the run has no such artifact."""
        with tempfile.TemporaryDirectory() as folder, contextlib.suppress(TrackingError, OSError):
            return get_artifact(self._store, run.run_id, name, Path(folder)).read_bytes()
        return None

    def add_artifact(self, run: StoredRun, path: Path, folder: str) -> bool:
        """Send a file to ``folder`` of a run's artifacts; False where the store does not take it, or says a folder of
        this machine, as any that another's server names would be written to."""
        if urlsplit(run.artifact_uri).scheme in ("", "file"):
            return False
        try:
            self._client.log_artifact(run.run_id, str(path), folder)
        except store_errors():
            return False
        return True


def _stored(run: RunData) -> StoredRun:
    return StoredRun(
        run_id=run["run_id"],
        name=run["name"],
        status=run["status"],
        start_ms=run["start_ms"],
        experiment_id=run["experiment_id"],
        artifact_uri=run["artifact_uri"],
        params=run["params"],
        tags=run["tags"],
        metrics=run["metrics"],
    )
