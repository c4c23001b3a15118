"""The record of a run in its own folder: an append-only list of events, and how much of it has reached the store.

In the run's folder::

    run.json                what is known of the run, for people and for ``compare``: the fold of all events
    tracking/events.jsonl   every write, in order, with its time; never rewritten
    tracking/sent.json      the store, the run's id there, and the byte up to which the events have arrived
    layers.json images/...  the artifacts, under the names that they have in the store

The events are the truth. A process killed at any point leaves a prefix of them (a torn last line is ignored).
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from quantlab.errors import TrackingError
from quantlab.tracking.events import Event, RunSummary, add_event

_EVENTS = Path("tracking", "events.jsonl")
_SENT = Path("tracking", "sent.json")
_LOCK = Path("tracking", "lock")

LEFT_OPEN: set[Path] = set()
"""Folders in which this process could not write, as on a full disk: where a run stayed open, its next start ends it."""


@dataclass
class Sent:
    """How much of a record has arrived, and where."""

    uri: str
    run_id: str | None = None
    offset: int = 0
    """Bytes of the events file that have arrived."""
    done: bool = False
    """The end of the run has arrived: nothing is pending."""
    refused: list[str] = field(default_factory=list)
    """What the store would not take, and why."""


def now_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Record:
    """The events of one run and their sum."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.summary: RunSummary = {}

    @classmethod
    def create(
        cls,
        folder: Path,
        name: str,
        tags: Mapping[str, str],
        parent_run_id: str | None = None,
        parent_record: str | None = None,
    ) -> Record:
        """Begin a record in ``folder``; TrackingError where one is there already or the folder cannot be written."""
        record = cls(folder)
        events = record.folder / _EVENTS
        try:
            events.parent.mkdir(parents=True, exist_ok=True)
            events.touch(exist_ok=False)
        except FileExistsError as error:
            raise TrackingError(f"{folder}: holds the record of a run; give each run a folder of its own") from error
        except OSError as error:
            raise TrackingError(f"{folder}: cannot be written ({error}); set output_dir=<another folder>") from error
        try:
            record.append(
                {
                    "op": "start",
                    "record": uuid.uuid4().hex,
                    "name": name,
                    "tags": dict(tags),
                    "parent_run_id": parent_run_id,
                    "parent_record": parent_record,
                }
            )
        except OSError:
            if not record.summary:  # not even the first line found room
                record.discard()
            raise
        return record

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read the record in ``folder``."""
        record = cls(folder)
        for event, _ in record.events(0):
            add_event(record.summary, event)
        return record

    @property
    def run_id(self) -> str:
        """The id of the run in the store that it was sent to; ``local-...`` as long as none has taken it."""
        sent = self.sent()
        return sent.run_id if sent and sent.run_id else f"local-{self.summary['record']}"

    def discard(self) -> None:
        """Forget a record whose first event is not whole, so that another can begin in its folder."""
        (self.folder / _EVENTS).unlink(missing_ok=True)

    @property
    def is_open(self) -> bool:
        """Whether the run has not ended, as far as the events tell."""
        return bool(self.summary.get("status") == "RUNNING")

    def append(self, event: Event) -> None:
        """Write one event to the folder and add it to the summary."""
        try:
            self._append(cast(Event, {"time_ms": now_ms(), **event}))
        except OSError:
            LEFT_OPEN.add(self.folder)
            raise

    def _append(self, event: Event) -> None:
        line = json.dumps(event, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with (self.folder / _EVENTS).open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process died while it wrote the last line
                    line = b"\n" + line
            file.write(line)
        add_event(self.summary, event)
        _write_json(self.folder / "run.json", self.summary)

    def events(self, offset: int) -> Iterator[tuple[Event, int]]:
        """The events from byte ``offset`` on, each with the offset behind it."""
        with (self.folder / _EVENTS).open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if line.endswith(b"\n") and (event := _parsed(line)) is not None:
                    yield event, offset

    def sent(self) -> Sent | None:
        """How much has arrived; None where nothing was ever tried."""
        data = _read_json(self.folder / _SENT)
        return Sent(**data) if data else None

    def save_sent(self, sent: Sent) -> None:
        """Note how much has arrived."""
        _write_json(self.folder / _SENT, asdict(sent))

    @contextlib.contextmanager
    def locked(self) -> Iterator[bool]:
        """True while this process alone sends the record; False where another does."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.folder / _LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()


def folders_with_records(runs_dir: Path) -> list[Path]:
    """Folders of ``runs_dir`` (and one level deeper) that hold a record."""
    found = [*runs_dir.glob(f"*/{_EVENTS}"), *runs_dir.glob(f"*/*/{_EVENTS}")]
    return sorted(path.parent.parent for path in found)


def _parsed(line: bytes) -> Event | None:
    try:
        event = json.loads(line)
    except ValueError:  # torn by the death of its writer
        return None
    return cast(Event, event) if isinstance(event, dict) and "op" in event else None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def _write_json(path: Path, data: Mapping[str, object]) -> None:
    """All or nothing, so that a reader never sees half a file."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(
            json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="backslashreplace"
        )
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
