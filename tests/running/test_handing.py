"""What is handed over, left, taken over and shared: with the simulated engine, and rows that need no model."""

from __future__ import annotations

import gc
import importlib.util
import json
from pathlib import Path

import pytest

from quantlab.errors import QuantlabError
from quantlab.planning import trust
from quantlab.planning.plan import plan
from quantlab.running import apart, handing, known, worker
from quantlab.running.apart import Handed
from quantlab.running.attempts import has_ended
from quantlab.running.claims import Claim, Claims
from quantlab.running.handing import JOBS, SUBMITTED, handed, run_handed
from quantlab.running.workbench import Session, let_go_of_bench
from quantlab.tracking import no_store
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import TrackingConfig
from tests.support.engines import Simulated, make_job


@pytest.fixture
def engine(monkeypatch):
    """The engine of all sweeps of a test, as a cluster is."""
    one = Simulated(0, lost=0, preempted=0, repeated=0, lazy=True)
    monkeypatch.setattr(handing, "open_engine", lambda *_: one)
    monkeypatch.setattr(
        handing, "collect", lambda session, job: RunReport(name=job.job.name, status=has_ended(job.folder))
    )
    monkeypatch.setattr(handing, "earlier_report", lambda *_: None)
    monkeypatch.setattr(
        handing,
        "hand_over",
        lambda session, job, key, protocol, floors: Handed(
            job=job, key=key, protocol=protocol, folder=make_job(session.output_dir, job.name)
        ),
    )
    return one


def session(folder):
    store = no_store(TrackingConfig(), folder)
    return Session(store=store, device="", output_dir=folder, advance=lambda *_: None, claims=Claims(folder / "claims"))


def jobs(*words):
    return plan(["backend=quanto", "dtype=int8,int4", "launcher=slurm", *words], multirun=True).jobs


def test_what_is_left_is_taken_over_and_computed_once(engine, tmp_path):
    first, wanted = session(tmp_path), jobs("launcher.detach=true")
    rows = run_handed(
        first, [handed(first, job, job.name, "p", None) for job in wanted], wanted[0].config, lambda counts: None
    )
    assert [row.status for row in rows] == [SUBMITTED] * 2
    assert first.leaves
    assert [row.error for row in rows] == ["j0", "j1"], "the engine's own ids"
    first.claims.close(keep=True)
    second, wanted = session(tmp_path), jobs()
    second.claims._me = {**second.claims._me, "quantlab.pid_started": "1.0"}  # another process
    monkey = second.claims.is_alive
    second.claims.is_alive = lambda owner: owner == second.claims._me and monkey(owner)
    again = [handed(second, job, job.name, "p", None) for job in wanted]
    assert [job.job_id for job in again] == ["j0", "j1"]
    second.parent_folder = tmp_path
    rows = run_handed(second, again, wanted[0].config, lambda counts: None)
    assert [row.status for row in rows] == ["FINISHED"] * 2
    assert noted(tmp_path) == [(job.job.name, str(job.folder), job.job_id) for job in again], (
        "status would not see them"
    )
    assert engine.num_submitted == 2
    assert set(engine.computed.values()) == {1}
    assert second.claims.mine == {}


def noted(folder):
    """The jobs that a sweep's folder knows of, as ``quantlab status`` reads them."""
    lines = map(json.loads, (folder / JOBS).read_text().splitlines())
    return [(line["name"], line["folder"], line["id"]) for line in lines]


def test_a_job_that_another_sweep_runs_is_known_to_the_folder_of_this_one(engine, tmp_path, monkeypatch):
    here, job = session(tmp_path), jobs()[0]
    here.parent_folder = tmp_path
    there = Claim(job.name, {}, str(tmp_path / "runs" / "theirs"), "slurm", "j7")
    held = iter([there, there, there, there, None])
    monkeypatch.setattr(here.claims, "holder", lambda key: next(held, None))
    monkeypatch.setattr(handing, "earlier_report", lambda *_: RunReport(name=job.name, status="FINISHED"))
    monkeypatch.setattr(handing, "wait_for", lambda *_: None)
    monkeypatch.setattr(handing.tracking, "push_pending", lambda *_: None)
    elsewhere = Handed(job=job, key="k", protocol="p", folder=Path(), is_elsewhere=True)
    rows = run_handed(here, [elsewhere], job.config, lambda counts: None)
    assert [row.status for row in rows] == ["FINISHED"]
    assert noted(tmp_path) == [(job.name, str(tmp_path / "runs" / "theirs"), "j7")]


# -- what a job's own process does not do again


def test_what_was_set_aside_stays_so_where_there_is_no_model_to_let_go_of(tmp_path, freezing):
    """A forked job would look at all objects of the libraries, and copy their pages."""
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        let_go_of_bench(session(tmp_path))
        assert gc.get_freeze_count() > 0.9 * before > 0  # frozen objects may still end by themselves
    finally:
        gc.unfreeze()


def test_a_job_that_was_handed_over_is_not_asked_about_again(tmp_path, monkeypatch):
    (job,) = plan(["backend=quanto", "dtype=int8", f"output_dir={tmp_path}"]).jobs
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(job.whole_yaml)
    assert "output_dir" in plan([f"recipe={recipe}"]).asked_for
    monkeypatch.setattr(trust, "compose_node", lambda *words: pytest.fail("composed a second time"))
    again = plan([f"recipe={recipe}"], is_own=True)
    assert not again.asked_for
    assert again.jobs[0].config.output_dir == str(tmp_path)


def test_a_node_with_other_code_computes_nothing(tmp_path):
    """The job's key says by which code its numbers are made."""
    with pytest.raises(QuantlabError, match=r"^quantlab on .* is not the sweep's: its code differs"):
        worker._check_code({"code": "another"})
    worker._check_code({"code": known.code_digest()})


def test_a_node_without_the_extra_of_a_job_says_which(tmp_path, monkeypatch):
    (job,) = plan(["backend=quanto", "dtype=int8", f"output_dir={tmp_path}"]).jobs
    here = session(tmp_path)
    monkeypatch.setattr(apart, "_num_threads", lambda *_: None)
    folder = apart.hand_over(here, job, "", "p", None).folder
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    with pytest.raises(QuantlabError, match=r"quanto.*quantlab-recipes\[quanto\]"):
        worker.work(folder)
