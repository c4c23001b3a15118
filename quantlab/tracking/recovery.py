"""What an earlier process left behind: runs that never arrived in the store, and runs that nobody will end."""

from __future__ import annotations

import logging
import socket
from pathlib import Path

from quantlab.progress import say
from quantlab.tracking.connect import first_line, store_errors
from quantlab.tracking.events import EndedRun
from quantlab.tracking.record import LEFT_OPEN, DamagedRecord, Record, folders_with_records, records
from quantlab.tracking.store import Store
from quantlab.tracking.tags import FAILURE, HOST, STAGE
from quantlab.tracking.values import process_is_alive

_LOG = logging.getLogger(__name__)
MANY = 1000
"""More runs than this are not looked for one by one at each start."""
_DIED = "the process ended without closing the run (killed, out of memory, or a full disk)"


def push_pending(store: Store, runs_dir: Path) -> list[str]:
    """Send to ``store`` what is in the folders of ``runs_dir`` and has not arrived; returns the names of those runs.

    May be called again, and by several processes: what has arrived is not sent twice. Runs that are being written by
    a live process are left to it. Parents go before their children.
    """
    if not store.is_reached:
        return []
    gone = _gone_from(store, runs_dir)
    pending = [r for r in records(runs_dir) if not _is_done(r.folder) or r.folder in gone]
    pushed = []
    known = [r for r in pending if r.summary]
    for record in sorted(known, key=lambda r: (r.summary["start_ms"], r.summary["parent_run_id"] is not None)):
        if record.is_open and _may_be_alive(record):
            continue
        try:
            _forget_lost_run(store, record)
        except store_errors() as error:
            _LOG.warning(
                "tracking.uri=%s: the store is lost (%s); the rest is sent at the next start",
                store.uri,
                first_line(error),
            )
            break
        if store.sync(record):
            pushed.append(str(record.summary["name"]))
    return pushed


def all_arrived(runs_dir: Path) -> bool:
    """Whether each run below ``runs_dir`` has ended and reached its store: nothing is left to be closed or sent."""
    return all(_is_done(folder) for folder in folders_with_records(runs_dir))


def close_orphans(store: Store, runs_dir: Path) -> list[str]:
    """End the runs of this host whose process is gone as KILLED, in folders and in ``store``; returns their names.

    A run belongs to the process whose pid and start time its tags hold; one on another host is never touched.
    """
    closed = []
    for found in records(runs_dir):
        if _is_done(found.folder):
            continue
        record = _closed_record(found.folder)
        if record is not None:
            store.sync(record)
            closed.append(str(record.summary["name"]))
    return closed + _close_in_store(store)


def end_lost_run(store: Store, folder: Path, error: str, log: str = "") -> EndedRun:
    """What is known of the run in ``folder``, ended FAILED with ``error`` where its process left it open.

    For whoever started that process and saw it end. Empty where the process died before it began the run; else the
    fold of its events (``run.json``) and ``run_id``. ``log`` is a file in the folder that then becomes an artifact.
    """
    if folder not in folders_with_records(folder.parent):
        return {}
    try:
        record = Record.load(folder)
    except DamagedRecord as damage:
        say(str(damage), "warning")
        return {}
    if not record.summary:  # it died while it wrote the first line
        record.discard()
        return {}
    if record.is_open:
        if log and (folder / log).is_file():
            record.append({"op": "artifact", "name": log, "file": log, "table": False})
        _end(record, "FAILED", error)
    store.sync(record)
    return {**record.summary, "run_id": record.run_id}


def _end(record: Record, status: str, error: str) -> None:
    """What a process would have written at the end of its run."""
    record.append({"op": "tags", "values": {FAILURE: error}})
    stage = record.summary["tags"].get(STAGE, "")
    record.append({"op": "finish", "status": status, "error": error, "stage": stage})


def _closed_record(folder: Path) -> Record | None:
    """The record of ``folder`` with its end written, where nobody else will write it; else None."""
    with Record(folder).locked() as alone:
        record = Record.load(folder)
        if not alone or not record.summary or not record.is_open or _may_be_alive(record):
            return None
        _end(record, "KILLED", _DIED)
    LEFT_OPEN.discard(record.folder)
    return record


def _close_in_store(store: Store) -> list[str]:
    """The same for runs whose folder is gone or elsewhere."""
    if not store.is_reached:
        return []
    closed = []
    left_open = f"attributes.status = 'RUNNING' and tags.`{HOST}` = '{socket.gethostname()}'"
    try:
        for run in list(store.search(left_open)):
            if not process_is_alive(run.data.tags):
                store.client.set_tag(run.info.run_id, FAILURE, _DIED)
                store.client.set_terminated(run.info.run_id, "KILLED")
                closed.append(str(run.info.run_name))
    except store_errors() as error:
        _LOG.warning(
            "tracking.uri=%s: runs left open could not be closed (%s); the next start tries again",
            store.uri,
            first_line(error),
        )
    return closed


def _gone_from(store: Store, runs_dir: Path) -> set[Path]:
    """Folders of runs that arrived whole, and are not in the store any more: it was emptied, or lost them.

    What a note says was sent is not what is there. Of very many runs a few are looked at; one that is missing has all
    looked at.
    """
    done = {}
    for folder in folders_with_records(runs_dir):
        sent = Record(folder).sent()
        if sent is not None and sent.done and sent.uri == store.uri and sent.run_id:
            done[sent.run_id] = folder.absolute()
    try:
        if len(done) > MANY and all(_is_there(store, i) for i in [*done][:: len(done) // 8]):
            return set()
        there = set(store.run_ids("")) if done else set()
        return {folder for run_id, folder in done.items() if run_id not in there and not _is_there(store, run_id)}
    except store_errors():
        return set()


def _is_there(store: Store, run_id: str) -> bool:
    """Does the store know the run, deleted ones included (who deletes one does not want it back)?"""
    try:
        store.client.get_run(run_id)
    except store_errors() as error:
        if getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
    return True


def _is_done(folder: Path) -> bool:
    sent = Record(folder).sent()
    return sent is not None and sent.done


def _may_be_alive(record: Record) -> bool:
    tags = record.summary["tags"]
    if record.folder in LEFT_OPEN:
        return False
    return tags[HOST] != socket.gethostname() or process_is_alive(tags)


def _forget_lost_run(store: Store, record: Record) -> None:
    """Where the store was made anew under the same address, the run is not there any more: send it whole."""
    sent = record.sent()
    if sent is None or sent.uri != store.uri or sent.run_id is None:
        return
    try:
        store.client.get_run(sent.run_id)
    except store_errors() as error:
        if getattr(error, "error_code", None) != "RESOURCE_DOES_NOT_EXIST":
            raise
        sent.run_id, sent.offset, sent.done = None, 0, False
        record.save_sent(sent)
