"""A sweep that was there before is found in an SQLite store without MLflow; in doubt it is not found, and MLflow is asked."""

from __future__ import annotations

import json
import sqlite3

import pytest

from quantlab.tracking.glance import sweep_of
from quantlab.tracking.tags import ARTIFACT_DIGESTS, JOB_KEY, KIND
from quantlab.tracking.values import digest_of

TABLES = """
CREATE TABLE experiments (experiment_id INTEGER, name TEXT, lifecycle_stage TEXT);
CREATE TABLE runs (run_uuid TEXT, name TEXT, status TEXT, lifecycle_stage TEXT, artifact_uri TEXT, experiment_id INTEGER,
                   start_time INTEGER);
CREATE TABLE tags (key TEXT, value TEXT, run_uuid TEXT);
INSERT INTO experiments VALUES (1, 'mine', 'active'), (2, 'another', 'active');
"""


@pytest.fixture
def store(tmp_path):
    """Two sweeps ``grid`` of the jobs a and b, and the jobs; what MLflow's tables hold of them."""
    place = tmp_path / "a store" / "mlflow.db"
    place.parent.mkdir()
    with sqlite3.connect(place) as database:
        database.executescript(TABLES)
        for job in ("a", "b"):
            report = json.dumps({"name": job}).encode()
            add(database, place, job, "report.json", report, {JOB_KEY: f"key of {job}"})
        for start, sweep in enumerate(("earlier", "later")):
            rows = json.dumps({"rows": [{"run_id": job} for job in ("a", "b")]}).encode()
            add(database, place, sweep, "rows.json", rows, {KIND: "sweep"}, "grid", start)
    return place


def add(database, store, run_id, artifact, content, tags, name="", start=0):
    folder = store.parent / "mlartifacts" / run_id
    folder.mkdir(parents=True)
    (folder / artifact).write_bytes(content)
    values = (run_id, name, "FINISHED", "active", folder.as_uri(), 1, start)
    database.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", values)
    digests = json.dumps({artifact: digest_of(content)})
    for key, value in {**tags, ARTIFACT_DIGESTS: digests}.items():
        database.execute("INSERT INTO tags VALUES (?, ?, ?)", (key, value, run_id))


KEYS = ("key of a", "key of b")


def ids(store, experiment="mine", name="grid", keys=KEYS, uri="sqlite:///{}"):
    found = sweep_of(uri.format(store), experiment, name, keys)
    return found and [job.run_id for job in found]


def test_the_jobs_of_a_finished_sweep(store):
    found = sweep_of(f"sqlite:///{store}", "mine", "grid", KEYS)
    assert [(job.run_id, json.loads(job.report)) for job in found] == [("a", {"name": "a"}), ("b", {"name": "b"})]
    assert ids(store, keys=KEYS[::-1]) is None
    assert ids(store, keys=KEYS[:1]) is None
    assert ids(store, keys=(*KEYS, "key of c")) is None
    assert ids(store, experiment="another") is None
    assert ids(store, name="another") is None
    assert ids(store, uri="http://host{}") is None
    assert ids(store.with_name("another.db")) is None
    assert not store.with_name("another.db").exists(), "a glance makes nothing"


@pytest.mark.parametrize(
    ("change", "is_found"),
    [
        ("UPDATE runs SET status = 'FAILED' WHERE run_uuid = 'b'", False),
        ("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = 'a'", False),
        ("DELETE FROM runs WHERE run_uuid = 'a'", False),
        ("UPDATE tags SET value = 'another key' WHERE run_uuid = 'b' AND key = 'quantlab.key'", False),
        ("UPDATE runs SET artifact_uri = 's3://bucket/a' WHERE run_uuid = 'a'", False),
        ("UPDATE experiments SET lifecycle_stage = 'deleted'", False),
        ("UPDATE runs SET status = 'RUNNING' WHERE name = 'grid'", False),
        ("DROP TABLE tags", False),
        ("ALTER TABLE runs RENAME COLUMN run_uuid TO id", False),
        ("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = 'later'", True),
        ("UPDATE runs SET lifecycle_stage = 'deleted' WHERE run_uuid = 'later'", True),
    ],
)
def test_what_is_gone_or_otherwise_is_not_believed(store, change, is_found):
    with sqlite3.connect(store) as database:
        database.execute(change)
    assert ids(store) == (["a", "b"] if is_found else None)


def test_a_report_that_was_changed_is_not_believed(store):
    (store.parent / "mlartifacts" / "b" / "report.json").write_text("{}")
    assert ids(store) is None


def test_no_database(store):
    store.write_text("no database")
    assert ids(store) is None


def test_the_tables_are_mlflows(tmp_path):
    """Of MLflow as it is installed: a sweep of one job, tracked as any other."""
    from quantlab.tracking import open_store
    from quantlab.vocabulary.schema import TrackingConfig

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    opened = open_store(TrackingConfig(uri=uri, experiment="mine"), tmp_path)
    with opened.start_run("grid", tmp_path / "sweep", {}, {KIND: "sweep"}) as sweep:
        with opened.start_run("a", tmp_path / "a", {}, {KIND: "job", JOB_KEY: KEYS[0]}, sweep.run_id) as job:
            job.log_json({"name": "a"}, "report.json")
        sweep.log_json({"rows": [{"run_id": job.run_id}]}, "rows.json")
    assert ids(tmp_path / "mlflow.db", keys=KEYS[:1]) == [job.run_id]
