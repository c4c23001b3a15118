"""The record of a run in its own folder: an append-only list of events, and how much of it has reached the store.

In the run's folder::

    run.json                what is known of the run, for people and for ``compare``: the fold of all events
    tracking/events.jsonl   every write, in order, with its time; never rewritten
    tracking/sent.json      the store, the run's id there, and the byte up to which the events have arrived
    layers.json images/...  the artifacts, under the names that they have in the store

The events are the truth. A process killed at any point leaves a prefix of them: a line that does not end like one is
ignored. ``run.json`` and the store follow each of them, or several that belong together. Each line carries the version
of its form and a checksum; a record with a line that was changed, or of a form that is not known, is damaged: nothing
of it is believed.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, cast

from quantlab.errors import TrackingError
from quantlab.progress import say
from quantlab.tracking.events import Event, RunSummary, add_event

_EVENTS = Path("tracking", "events.jsonl")
_SENT = Path("tracking", "sent.json")
_LOCK = Path("tracking", "lock")

VERSION = 1
"""Of the form of a line; raised when one is read differently."""
_CHECK = "crc32"
_FORMS: dict[str, dict[str, type]] = {
    "start": {"record": str, "name": str, "tags": dict},
    "params": {"values": dict},
    "tags": {"values": dict},
    "metrics": {"values": dict},
    "curve": {"name": str, "values": list},
    "input": {"name": str, "digest": str, "context": str, "source": dict, "profile": dict},
    "artifact": {"name": str, "file": str, "table": bool},
    "finish": {"status": str, "error": str, "stage": str},
}
"""Event -> what it must hold."""

LEFT_OPEN: set[Path] = set()
"""Folders in which this process could not write, as on a full disk: where a run stayed open, its next start ends it."""


class DamagedRecord(TrackingError):
    """A record that is not what was written; the message names its folder."""


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
        """Read the record in ``folder``; :class:`DamagedRecord` where it is not what was written."""
        record = cls(folder)
        for event, _ in record.events(0):
            if (event["op"] == "start") == bool(record.summary):
                raise record._damaged("its first event is not the only start")
            add_event(record.summary, event)
        return record

    def _damaged(self, why: str) -> DamagedRecord:
        return DamagedRecord(f"{self.folder}: damaged ({why}); move the folder away, or bring an intact copy")

    @property
    def run_id(self) -> str:
        """The id of the run in the store that it was sent to; ``local-...`` as long as none has taken it."""
        sent = self.sent()
        return sent.run_id if sent and sent.run_id else f"local-{self.summary['record']}"

    def discard(self) -> None:
        """Forget a record whose first event is not whole, so that another can begin in its folder."""
        (self.folder / _EVENTS).unlink(missing_ok=True)

    def keep_here(self, uri: str) -> None:
        """Note that nothing of it is to be sent: it was made without a store, and stays so under a later one."""
        self.save_sent(Sent(uri, None, (self.folder / _EVENTS).stat().st_size, done=True))

    @property
    def is_open(self) -> bool:
        """Whether the run has not ended, as far as the events tell."""
        return bool(self.summary.get("status") == "RUNNING")

    def append(self, event: Event, shows: bool = True) -> None:
        """Write one event to the folder and add it to the summary; without ``shows``, :meth:`show` is called later."""
        with self._left_open_where_it_fails():
            self._append(cast(Event, {"time_ms": now_ms(), **event}))
            if shows:
                self.show()

    def show(self) -> None:
        """Write the sum of the events to ``run.json``."""
        with self._left_open_where_it_fails():
            _write_json(self.folder / "run.json", self.summary)

    @contextlib.contextmanager
    def _left_open_where_it_fails(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            LEFT_OPEN.add(self.folder)
            raise

    def _append(self, event: Event) -> None:
        line = json.dumps(_with_check(event), ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        with (self.folder / _EVENTS).open("ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a process died while it wrote the last line
                    line = b"\n" + line
            file.write(line)
        add_event(self.summary, event)

    def events(self, offset: int) -> Iterator[tuple[Event, int]]:
        """The events from byte ``offset`` on, each with the offset behind it.

        Raises :class:`DamagedRecord` at a line that is not what was written.
        """
        with (self.folder / _EVENTS).open("rb") as file:
            file.seek(offset)
            for line in file:
                try:
                    event = _parsed(line) if line.endswith(b"\n") else None
                except ValueError as error:
                    raise self._damaged(f"event at byte {offset}: {error}") from error
                offset += len(line)
                if event is not None:
                    yield event, offset

    def sent(self) -> Sent | None:
        """How much has arrived; None where nothing was ever tried.

        A note that cannot be read says only that something was: the run is looked for in the store, and sent again.
        """
        path = self.folder / _SENT
        if not path.exists():
            return None
        data = _read_json(path)
        wanted: dict[str, type | tuple[type, ...]] = {
            "uri": str,
            "run_id": (str, type(None)),
            "offset": int,
            "done": bool,
            "refused": list,
        }
        if set(data) != set(wanted) or not all(isinstance(data[k], kind) for k, kind in wanted.items()):
            return Sent(uri="")
        size = (self.folder / _EVENTS).stat().st_size
        return Sent(**data) if 0 <= data["offset"] <= size else Sent(uri="")

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


def run_id_of(folder: Path) -> str:
    """:attr:`Record.run_id` of a run's folder, of which only two small files are read; empty of any other folder."""
    try:
        sent = _read_json(folder / "tracking" / "sent.json").get("run_id")
        return str(sent or f"local-{_read_json(folder / 'run.json')['record']}")
    except (OSError, ValueError, KeyError):
        return ""


def folders_with_records(runs_dir: Path) -> list[Path]:
    """Folders of ``runs_dir`` (and one level deeper) that hold a record."""
    found = [*runs_dir.glob(f"*/{_EVENTS}"), *runs_dir.glob(f"*/*/{_EVENTS}")]
    return sorted(path.parent.parent for path in found)


def records(runs_dir: Path) -> Iterator[Record]:
    """The records below ``runs_dir``; a damaged one is named, and left out."""
    for folder in folders_with_records(runs_dir):
        try:
            yield Record.load(folder)
        except (DamagedRecord, OSError) as error:
            if folder not in _TOLD:
                _TOLD.add(folder)
                say(f"{error}; it is left out", "warning")


_TOLD: set[Path] = set()
"""Damaged folders that were named already."""


def _with_check(event: Event) -> dict[str, Any]:
    data = {"v": VERSION, **event}
    return {**data, _CHECK: _checksum(data)}


def _checksum(data: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(data, sort_keys=True, ensure_ascii=False).encode(errors="backslashreplace"))


def _parsed(line: bytes) -> Event | None:
    """The event of a line; None for one that was torn by the death of its writer, ValueError for a changed one."""
    try:
        event = json.loads(line)
    except ValueError:
        if line.rstrip().endswith(b"}"):
            raise ValueError("is no JSON") from None
        return None
    if not isinstance(event, dict) or event.get("op") not in _FORMS:
        raise ValueError("is no event")
    version = event.pop("v", None)
    if version is not None:
        if version != VERSION:
            raise ValueError(f"has the form {version}, and this version of quantlab knows {VERSION}")
        if event.pop(_CHECK, None) != _checksum({"v": version, **event}):
            raise ValueError("is not what was written")
    form = {"time_ms": int, **_FORMS[event["op"]]}
    if missing := [k for k, kind in form.items() if not isinstance(event.get(k), kind)]:
        raise ValueError(f"has no {missing[0]}")
    for place in [event["name"], event["file"]] if event["op"] == "artifact" else ():
        if PurePosixPath(place).is_absolute() or ".." in PurePosixPath(place).parts:
            raise ValueError(f"names {place[:80]!r}, which is no file of the run's folder")
    return cast(Event, event)


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
