"""One bad folder is named and left out, and the others work; a store that lost runs is filled again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quantlab.tracking import close_orphans, find_records, find_runs, open_store, push_pending
from quantlab.tracking.record import DamagedRecord, Record, _with_check
from quantlab.vocabulary.schema import TrackingConfig

EVENTS, SENT = ("tracking", "events.jsonl"), ("tracking", "sent.json")


@pytest.fixture
def finished(store, runs):
    """Folders of three finished runs."""
    folders = []
    for name in ("first", "second", "third"):
        folder = runs / f"20260101-000000-{name}"
        with store.start_run(name, folder, {"lr": 0.1}, {"quantlab.kind": "job"}) as run:
            run.log_metrics({"quality/psnr_db": 40.0})
            run.log_json({"a": 1}, "rows.json")
        folders.append(folder)
    return folders


def names(found):
    return {r["name"] for r in found}


def changed(folder, change):
    file = folder.joinpath(*EVENTS)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(change(lines)))


DAMAGES = {
    "a NUL byte": lambda lines: [lines[0], lines[1].replace(b'"lr"', b'"l\0"'), *lines[2:]],
    "a NUL byte in the start": lambda lines: [lines[0].replace(b"first", b"fi\0st"), *lines[1:]],
    "a changed number": lambda lines: [line.replace(b"40.0", b"41.0") for line in lines],
    "no start": lambda lines: lines[1:],
    "a start twice": lambda lines: [lines[0], *lines],
    "another form": lambda lines: [lines[0].replace(b'"v": 1', b'"v": 99'), *lines[1:]],
    "of no event": lambda lines: [*lines[:1], b'{"op": "dance", "time_ms": 1}\n', *lines[1:]],
    "a list": lambda lines: [*lines[:1], b"[1, {}]\n", *lines[1:]],
    "values that are none": lambda lines: [*lines[:1], b'{"op": "params", "time_ms": 1, "values": 3}\n', *lines[1:]],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_named_and_the_others_work(damage, store, runs, finished, capsys):
    changed(finished[0], DAMAGES[damage])
    finished[0].joinpath(*SENT).unlink()
    with pytest.raises(DamagedRecord, match=r"20260101-000000-first: damaged \("):
        Record.load(finished[0])
    assert names(find_records(runs, {"quantlab.kind": "job"})) == {"second", "third"}
    assert close_orphans(store, runs) == []
    assert push_pending(store, runs) == []
    said = "".join(capsys.readouterr().err.split())
    assert said.count("20260101-000000-first:damaged(") == 1, "named once"


@pytest.mark.parametrize("place", ["{secret}", "../secret.txt", "images/../../secret.txt", "link.txt"])
def test_no_file_from_outside_a_folder_is_sent(store, runs, finished, tmp_path, place):
    """A run's folder may be another person's, and the store a server."""
    secret = runs / "secret.txt"
    secret.write_text("a secret")
    (finished[0] / "link.txt").symlink_to(secret)
    place = place.format(secret=secret)
    event = {"time_ms": 1, "op": "artifact", "name": Path(place).name, "file": place, "table": False}
    line = json.dumps(_with_check(event)).encode() + b"\n"
    changed(finished[0], lambda lines: [*lines[:-1], line, lines[-1]])
    finished[0].joinpath(*SENT).unlink()
    other = open_store(TrackingConfig(uri=f"sqlite:///{tmp_path}/other/mlflow.db"), tmp_path)
    push_pending(other, runs)
    sent = [file for file in (tmp_path / "other").rglob("*") if file.is_file() and file.suffix == ".txt"]
    assert [file for file in sent if file.read_text() == "a secret"] == []


def test_a_line_that_was_torn_is_no_damage(store, runs):
    folder = runs / "20260101-000000-torn"
    run = store.start_run("torn", folder, {}, {})
    with folder.joinpath(*EVENTS).open("ab") as file:
        file.write(b'{"v": 1, "time_ms": 17000, "op": "metrics", "values": {"a": 1')
    run.log_metrics({"b": 2.0})
    run.finish("FINISHED")
    assert Record.load(folder).summary["metrics"] == {"b": 2.0}


def test_records_without_checksums_are_read(store, runs, finished):
    """Those of earlier versions."""

    def plain(lines):
        events = [json.loads(line) for line in lines]
        return [json.dumps({k: v for k, v in e.items() if k not in ("v", "crc32")}).encode() + b"\n" for e in events]

    changed(finished[0], plain)
    assert Record.load(finished[0]).summary["params"] == {"lr": "0.1"}


@pytest.mark.parametrize(
    "text",
    ['{"bad": 1}', "[]", "", "\0\0\0", '{"uri": "x", "run_id": 3, "offset": "a", "done": 1, "refused": []}'],
)
def test_a_note_that_cannot_be_read_sends_the_run_again_and_not_twice(text, store, runs, finished):
    finished[1].joinpath(*SENT).write_text(text)
    assert push_pending(store, runs) == ["second"]
    found = find_runs(store, {"quantlab.kind": "job"})
    assert sorted(r["name"] for r in found) == ["first", "second", "third"]
    assert push_pending(store, runs) == []


def test_an_offset_beyond_the_events_is_not_believed(store, runs, finished):
    note = json.loads(finished[1].joinpath(*SENT).read_text())
    finished[1].joinpath(*SENT).write_text(json.dumps({**note, "offset": 10**9, "done": False}))
    assert push_pending(store, runs) == ["second"]


def test_runs_that_the_store_lost_are_sent_again(store, runs, finished):
    import sqlite3

    lost = find_runs(store, {"quantlab.kind": "job"})[0]
    file = store.uri.removeprefix("sqlite:///")
    with sqlite3.connect(file) as database:
        for table in ("tags", "params", "metrics", "latest_metrics", "runs"):
            database.execute(f"delete from {table} where run_uuid = ?", (lost["run_id"],))
    assert push_pending(store, runs) == [lost["name"]]
    found = {r["name"]: r for r in find_runs(store, {"quantlab.kind": "job"})}
    assert set(found) == {"first", "second", "third"}
    assert found[lost["name"]]["metrics"] == {"quality/psnr_db": 40.0}


def test_runs_that_were_deleted_stay_deleted(store, runs, finished):
    deleted = find_runs(store, {"quantlab.kind": "job"})[0]
    store.client.delete_run(deleted["run_id"])
    assert push_pending(store, runs) == []
    assert len(find_runs(store, {"quantlab.kind": "job"})) == 2
