"""``sweep=latest`` is the latest sweep that has something to compare."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import quantlab
from quantlab.errors import ConfigError, TrackingError
from quantlab.report.reading import ServerReader, open_reader, tell_of_newer
from quantlab.report.selection import _title, parse_request, select
from quantlab.running.reproduce import finished_job
from quantlab.tracking import open_store
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.comparison_store import N, add_run, fail, make_sweep


def latest(sweep):
    request = parse_request(["sweep=latest"])
    return select(request, open_reader(request.tracking, sweep.folder)).parents[0].run_id


def test_it_is_taken_without_its_key_too():
    assert parse_request(["latest", "metric=psnr"]).sweep == "latest"
    with pytest.raises(ConfigError, match="compare: sweep and run ids given"):
        parse_request(["latest", "sweep=abc"])
    with pytest.raises(ConfigError, match="compare: sweep and experiment given"):
        parse_request(["latest", "experiment=quantlab"])


def begun(sweep, name, status=None):
    folder = sweep.folder / "outputs" / "runs" / name
    run = sweep.store.start_run(name, folder, {}, {"quantlab.kind": "sweep"})
    if status:
        run.finish(status)
    return run.run_id


def test_titles_of_sweeps_without_a_store_tell_them_apart():
    """Their ids begin alike."""
    request = parse_request(["sweep=latest"])
    sweeps = [SimpleNamespace(name="sweep", run_id=f"local-{end}") for end in ("4784bdfb99", "47c669cb51")]
    assert [_title(request, [sweep]) for sweep in sweeps] == ["sweep-4784bdfb", "sweep-47c669cb"]
    assert _title(parse_request(["local-4784bdfb99"]), []) == "runs-4784bdfb"
    assert _title(request, [SimpleNamespace(name="s", run_id="0123456789ab")]) == "s-01234567"


@pytest.fixture
def sweep(tmp_path, template):
    return make_sweep(tmp_path / "my work", template)


def test_a_newer_one_without_a_finished_job_is_told_and_left(sweep, capsys, monkeypatch):
    failed, running = begun(sweep, "failed", "FAILED"), begun(sweep, "running")
    fail(sweep, "int3", failed)
    assert latest(sweep) == sweep.parent
    assert f"sweep=latest: running ({running[:8]}) is newer" in " ".join(capsys.readouterr().err.split())
    add_run(sweep, "again", np.full(N, 1e-4), backend="quanto", parent=running)
    assert latest(sweep) == running


def test_where_no_job_has_finished_it_says_so(tmp_path, base, store):
    from tests.support.comparison_store import Sweep

    sweep = Sweep(base, store)
    begun(sweep, "a", "FAILED")
    begun(sweep, "b")
    with pytest.raises(TrackingError, match=r"^sweep=latest: none of the 2 sweeps .*run one with"):
        latest(sweep)


@pytest.fixture
def elsewhere(sweep):
    """A newer sweep of a recipe with an experiment of its own."""
    store = open_store(TrackingConfig(experiment="my own"), sweep.folder)
    for name, status in (("older", "FINISHED"), ("newest of all", "FINISHED"), ("broken", "FAILED")):
        run = store.start_run(name, sweep.folder / "outputs" / "runs" / name, {}, {"quantlab.kind": "sweep"})
        run.finish(status)
        if name == "newest of all":
            found = run.run_id
    return found


def test_a_newer_one_of_another_experiment_is_told(sweep, elsewhere, capsys, monkeypatch):
    monkeypatch.chdir(sweep.folder)
    told = f"a newer sweep is in experiment my own: newest of all; its id is {elsewhere}"

    def said():
        return " ".join(capsys.readouterr().err.split())

    assert latest(sweep) == sweep.parent
    assert f"sweep=latest: {told}" in said()
    assert quantlab.load("latest").sweep_id == sweep.parent
    assert f"load('latest'): {told}" in said()
    reader = open_reader(TrackingConfig(), sweep.folder)
    assert finished_job(reader, "latest", "export", "quantlab").name == "int4 c"
    assert f"export latest: {told}" in said()
    others = [number for name, number in reader.experiments().items() if name != "quantlab"]
    assert ServerReader(sweep.store).newest_sweep(others) == reader.newest_sweep(others)


def test_what_is_newer_than_all_of_other_experiments_or_chosen_by_name_needs_no_word(sweep, elsewhere, capsys):
    add_run(sweep, "again", np.full(N, 1e-4), backend="quanto", parent=begun(sweep, "today"))
    latest(sweep)
    reader = open_reader(TrackingConfig(), sweep.folder)
    shown = reader.by_id([elsewhere])[0]
    tell_of_newer(reader, "my own", shown, "sweep=latest")
    assert "a newer sweep" not in capsys.readouterr().err
