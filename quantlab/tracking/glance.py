"""A glance into an SQLite store without MLflow, whose import takes seconds: is there a sweep of just these jobs?

Three of MLflow's tables are read. Whatever is not as expected there is no answer, and MLflow is asked.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, unquote, urlsplit

from quantlab.tracking.connect import SQLITE
from quantlab.tracking.tags import ARTIFACT_DIGESTS, JOB_KEY, KIND
from quantlab.tracking.values import is_as_written

_MAX_SWEEPS = 50
_WAIT_S = 5.0
_SWEEPS = """
SELECT r.run_uuid, r.artifact_uri FROM runs r
JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = ? AND t.value = 'sweep'
JOIN experiments e ON e.experiment_id = r.experiment_id AND e.name = ? AND e.lifecycle_stage = 'active'
WHERE r.name = ? AND r.status = 'FINISHED' AND r.lifecycle_stage = 'active'
ORDER BY r.start_time DESC LIMIT ?"""
_RUN = "SELECT artifact_uri FROM runs WHERE run_uuid = ? AND status = 'FINISHED' AND lifecycle_stage = 'active'"
_TAG = "SELECT value FROM tags WHERE run_uuid = ? AND key = ?"


class Found(NamedTuple):
    """A finished job of a sweep."""

    run_id: str
    report: bytes
    """Its ``report.json``, as the run wrote it."""


def sweep_of(uri: str, experiment: str, name: str, keys: Sequence[str]) -> list[Found] | None:
    """The jobs of the newest finished sweep ``name`` that consists of jobs with these content keys, in this order.

    None where there is no such sweep, where one of its jobs is gone or changed, and in any other store than SQLite.
    """
    if not uri.startswith(SQLITE):
        return None
    address = f"file:{quote(uri.removeprefix(SQLITE))}?mode=ro"
    with (
        contextlib.suppress(sqlite3.Error, OSError, ValueError, KeyError, TypeError),
        contextlib.closing(sqlite3.connect(address, uri=True, timeout=_WAIT_S)) as database,
    ):
        for _, place in database.execute(_SWEEPS, (KIND, experiment, name, _MAX_SWEEPS)).fetchall():
            ids = [row["run_id"] for row in json.loads(_artifact(place, "rows.json"))["rows"]]
            found = [_job(database, run_id, key) for run_id, key in zip(ids, keys, strict=False)]
            if len(ids) == len(keys) and all(found):
                return [job for job in found if job is not None]
    return None


def _job(database: sqlite3.Connection, run_id: str | None, key: str) -> Found | None:
    row = database.execute(_RUN, (run_id,)).fetchone()
    if row is None or _tag(database, run_id, JOB_KEY) != key:
        return None
    report = _artifact(row[0], "report.json")
    digests = {ARTIFACT_DIGESTS: _tag(database, run_id, ARTIFACT_DIGESTS) or "{}"}
    return Found(str(run_id), report) if is_as_written(digests, "report.json", report) else None


def _tag(database: sqlite3.Connection, run_id: str | None, key: str) -> str | None:
    row = database.execute(_TAG, (run_id, key)).fetchone()
    return None if row is None else str(row[0])


def _artifact(place: str, name: str) -> bytes:
    """Of a run whose artifacts lie on this machine; OSError where they do not."""
    parts = urlsplit(place)
    if parts.scheme != "file":
        raise OSError(f"{place}: elsewhere")
    return Path(unquote(parts.path), name).read_bytes()
