"""A store that was moved or copied: what was there is found, and nothing is written where it was made."""

from __future__ import annotations

import contextlib
import shutil
import sqlite3

import pytest

from quantlab.tracking import find_runs, get_artifact, open_store
from quantlab.vocabulary.schema import TrackingConfig


def made(base, name):
    """A finished run in the store of a folder; its id."""
    store = open_store(TrackingConfig(), base)
    with store.start_run(name, base / "outputs" / "runs" / name, {}, {"quantlab.kind": "job"}) as run:
        run.log_json({"name": name}, "report.json")
    return run.run_id


def places(base):
    with contextlib.closing(sqlite3.connect(base / "outputs" / "mlflow.db")) as database:
        return {place for (place,) in database.execute("SELECT artifact_uri FROM runs")}


@pytest.mark.parametrize("how", [shutil.move, shutil.copytree])
def test_a_store_elsewhere_has_its_artifacts_and_writes_beside_itself(tmp_path, capsys, how):
    old, new = tmp_path / "a 100% folder", tmp_path / "there"
    first = made(old, "first")
    how(old, new)
    before = sorted(old.rglob("*"))
    second = made(new, "second")
    assert sorted(old.rglob("*")) == before
    assert "the store was made in" in " ".join(capsys.readouterr().err.split())
    store = open_store(TrackingConfig(), new)
    for run_id in (first, second):
        assert (new / "outputs" / "mlartifacts" / run_id / "artifacts" / "report.json").is_file()
        assert get_artifact(store, run_id, "report.json", tmp_path / f"got {run_id}").is_file()
    assert {r["name"] for r in find_runs(store)} == {"first", "second"}
    assert all(place.startswith((new / "outputs" / "mlartifacts").as_uri()) for place in places(new))
    assert capsys.readouterr().err == "", "told once"


def test_a_store_under_another_name_of_its_folder_was_not_moved(tmp_path, capsys):
    made(tmp_path / "old", "first")
    (tmp_path / "link").symlink_to(tmp_path / "old")
    before = places(tmp_path / "old")
    open_store(TrackingConfig(), tmp_path / "link")
    assert places(tmp_path / "old") == before
    assert capsys.readouterr().err == ""


def test_nothing_is_changed_under_an_open_run_of_another_machine(tmp_path):
    """It may know the folder by another path."""
    made(tmp_path / "old", "first")
    with contextlib.closing(sqlite3.connect(tmp_path / "old" / "outputs" / "mlflow.db")) as database, database:
        database.execute("UPDATE runs SET status = 'RUNNING'")
        database.execute("UPDATE tags SET value = 'a node' WHERE key = 'quantlab.host'")
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    open_store(TrackingConfig(), tmp_path / "new")
    assert places(tmp_path / "new") == places(tmp_path / "old")
