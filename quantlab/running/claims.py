"""Who runs a job: a file a content key, so that sweeps share their work, and one that comes back finds its jobs.

A claim is its owner's, a sweep's process, until the job is over. An owner on this host is dead when its process is; one
elsewhere when it has not touched its file for two minutes. What a dead owner left is taken over with the job's folder
and the id that the engine gave it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from quantlab.tracking.tags import HOST, PID, PID_STARTED
from quantlab.tracking.values import process_is_alive, this_process

BEAT_S, DEAD_S = 20.0, 120.0


@dataclass(frozen=True)
class Claim:
    """What is written of a job that somebody runs."""

    name: str
    owner: dict[str, str]
    folder: str = ""
    engine: str = ""
    job_id: str = ""


@dataclass
class Claims:
    """The claims in a folder, and those of this process among them."""

    folder: Path
    mine: dict[str, Claim] = field(default_factory=dict)
    _me: dict[str, str] = field(default_factory=this_process)
    _over: threading.Event = field(default_factory=threading.Event)
    _beating: threading.Thread | None = None

    def take(self, key: str, name: str) -> Claim | None:
        """None where the job is this process's from now on; else the claim of another one that is alive.

        What a dead owner left is this process's too: :attr:`mine` then holds its folder and id.
        """
        self._begin()
        with self._lock():
            there = self._read(key)
            if there is not None and there.owner != self._me and self.is_alive(there.owner):
                return there
            left = there or Claim(name, self._me)
            self._write(key, replace(left, name=name, owner=self._me))
        return None

    def note(self, key: str, folder: Path, engine: str, job_id: str) -> None:
        """Write down where this process's job lies and what the engine calls it."""
        if key in self.mine:
            self._write(key, replace(self.mine[key], folder=str(folder), engine=engine, job_id=job_id))

    def release(self, key: str) -> None:
        """The job is over, or nobody's."""
        if self.mine.pop(key, None) is not None:
            self._file(key).unlink(missing_ok=True)

    def holder(self, key: str) -> Claim | None:
        """Another process's claim that stands."""
        there = self._read(key)
        return there if there is not None and there.owner != self._me and self.is_alive(there.owner) else None

    def close(self, keep: bool = False) -> None:
        """Give all up; with ``keep`` they stay for whoever comes back, without an owner that is alive."""
        for key in list(self.mine):
            if not keep:
                self.release(key)
        self._over.set()
        if self._beating is not None:
            self._beating.join()
            self._beat_file(self._me).unlink(missing_ok=True)

    def is_alive(self, owner: dict[str, str]) -> bool:
        """Is the process there, as far as can be seen from here?"""
        if owner.get(HOST) == socket.gethostname():
            return process_is_alive(owner)
        here = self.folder / f".now-{os.getpid()}"
        try:  # by the clock of the file system, which all hosts share
            here.touch()
            now = here.stat().st_mtime
            here.unlink(missing_ok=True)
            return now - self._beat_file(owner).stat().st_mtime < DEAD_S
        except OSError:
            return False

    def _begin(self) -> None:
        if self._beating is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._beat_file(self._me).touch()
            self._beating = threading.Thread(target=self._beat, daemon=True)
            self._beating.start()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):
                self._beat_file(self._me).touch()

    def _beat_file(self, owner: dict[str, str]) -> Path:
        word = "-".join(owner.get(tag, "") for tag in (HOST, PID, PID_STARTED))
        return self.folder / f"{word}.alive".replace("/", "_")

    def _lock(self) -> FileLock:
        return FileLock(self.folder / "lock")

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def _read(self, key: str) -> Claim | None:
        try:
            data: dict[str, Any] = json.loads(self._file(key).read_text(encoding="utf-8"))
            return Claim(**data)
        except (OSError, ValueError, TypeError):
            return None

    def _write(self, key: str, claim: Claim) -> None:
        self.mine[key] = claim
        draft = self.folder / f".{key}.{os.getpid()}"
        draft.write_text(json.dumps(asdict(claim)), encoding="utf-8")
        draft.replace(self._file(key))


def wait_for(claims: Claims, keys: list[str], seconds: float) -> None:
    """Until one of the jobs is nobody else's any more, or ``seconds`` are over."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and all(claims.holder(key) for key in keys):
        time.sleep(0.2)
