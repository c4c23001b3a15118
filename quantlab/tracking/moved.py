"""An SQLite store that was moved or copied: its artifacts lie beside it, whatever place it was made at.

MLflow keeps absolute places. Of a store elsewhere than where it was made finished jobs would be looked for at the old
place, and the artifacts of new runs be written there: into whosever folder that is.
"""

from __future__ import annotations

import contextlib
import socket
import sqlite3
from pathlib import Path
from urllib.parse import unquote, urlsplit

from quantlab.progress import say
from quantlab.tracking.tags import HOST

_WAIT_S = 5.0
_PLACES = "SELECT DISTINCT artifact_location FROM experiments WHERE artifact_location LIKE 'file:%'"
_RUNS = "SELECT run_uuid FROM runs WHERE substr(artifact_uri, 1, ?) = ?"
_ELSEWHERE = """
SELECT COUNT(*) FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid AND t.key = ?
WHERE r.status = 'RUNNING' AND t.value != ?"""
_EXPERIMENTS_HERE = "UPDATE experiments SET artifact_location = ? WHERE artifact_location = ?"
_RUNS_HERE = "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) WHERE substr(artifact_uri, 1, ?) = ?"


def bring_home(database: Path, artifacts: Path) -> None:
    """Note ``artifacts`` as the place of what lies there and is said to lie in a folder of its name elsewhere.

    Nothing is changed while a run of another machine is open, which may know the store by another path. What cannot be
    changed now is the next time.
    """
    if not artifacts.is_dir():
        return
    with (
        contextlib.suppress(sqlite3.Error, OSError),
        contextlib.closing(sqlite3.connect(database, timeout=_WAIT_S)) as opened,
        opened,
    ):
        for (old,) in opened.execute(_PLACES).fetchall():
            place = Path(unquote(urlsplit(old).path))
            if place.name != artifacts.name or place.resolve() == artifacts.resolve():
                continue
            inside = f"{old}/"
            runs = [run for (run,) in opened.execute(_RUNS, (len(inside), inside))]
            is_here = not runs or any((artifacts / run).is_dir() for run in runs)
            if not is_here or opened.execute(_ELSEWHERE, (HOST, socket.gethostname())).fetchone()[0]:
                continue
            new = artifacts.as_uri()
            opened.execute(_EXPERIMENTS_HERE, (new, old))
            opened.execute(_RUNS_HERE, (new, len(old) + 1, len(inside), inside))
            if runs:
                say(f"{database}: the store was made in {place.parent}; its artifacts are those beside it now")
