"""What a sweep hands over to its engine, and how its rows come back: one after the other, as they arrive."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from quantlab import tracking
from quantlab.planning.job import Job
from quantlab.progress import say
from quantlab.running.apart import Floors, Handed, collect, hand_over
from quantlab.running.attempts import LOST, write
from quantlab.running.claims import wait_for
from quantlab.running.engines.protocol import Engine
from quantlab.running.engines.table import open_engine
from quantlab.running.resume import earlier_report
from quantlab.running.scheduler import Counts, Scheduler
from quantlab.running.workbench import Session
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import ExperimentConfig

JOBS = "jobs.jsonl"
"""In a sweep's folder, a line for each job that was submitted: name, folder, engine and the engine's id."""
SUBMITTED = "SUBMITTED"
_WAIT_S = 5.0


def runs_apart(job: Job, device: str) -> bool:
    """Does a sweep hand the job over? Else it runs in the sweep's own process and shares the loaded model."""
    config = job.config
    if config.launcher.engine != "serial" or config.sweep.isolation == "process":
        return True
    may_crash = any(device in scheme.row.may_crash_on for scheme in job.schemes.values())
    return config.sweep.isolation == "auto" and (may_crash or config.sweep.timeout_s is not None)


def handed(session: Session, job: Job, key: str, protocol: str, floors: Floors | None) -> Handed:
    """The job, handed over; or as an earlier process left it with its engine; or as another sweep is running it."""
    if not key:
        return hand_over(session, job, key, protocol, floors)
    if session.claims.take(key, job.name) is not None:
        return Handed(job=job, key=key, protocol=protocol, folder=Path(), floors=floors, is_elsewhere=True)
    left = session.claims.mine[key]
    if left.job_id and left.engine == job.config.launcher.engine and Path(left.folder).is_dir():
        return Handed(job=job, key=key, protocol=protocol, folder=Path(left.folder), job_id=left.job_id)
    return hand_over(session, job, key, protocol, floors)


def run_handed(
    session: Session, jobs: Sequence[Handed], config: ExperimentConfig, progress: Callable[[Counts], None]
) -> list[RunReport]:
    """The rows of all jobs that were handed over; each goes to the store when its job is over.

    Never raises for a job's failure; :class:`EngineError` where the engine takes no job at all. With
    ``launcher.detach`` jobs are submitted, and their rows say no more than that.
    """
    rows: dict[int, RunReport] = {}
    left = dict(enumerate(jobs))
    while left:
        here = {i: job for i, job in left.items() if not job.is_elsewhere}
        if here:
            found = _run(session, list(here.values()), config, progress)
            rows |= dict(zip(here, found, strict=True))
        seen = {i: _looked_up(session, job) for i, job in left.items() if i not in here}
        rows |= {i: one for i, one in seen.items() if isinstance(one, RunReport)}
        left = {i: one for i, one in seen.items() if isinstance(one, Handed)}
        if left and all(job.is_elsewhere for job in left.values()):
            progress(Counts(ended=len(rows), running=len(left)))
            wait_for(session.claims, [job.key for job in left.values()], _WAIT_S)
    return [rows[i] for i in range(len(jobs))]


def _looked_up(session: Session, job: Handed) -> RunReport | Handed:
    """A job that another sweep runs: its row where that is over, the job itself where nobody runs it any more."""
    if session.claims.holder(job.key):
        return job
    tracking.push_pending(session.store, session.output_dir / "runs")
    kept = replace(job.job.config, sweep=replace(job.job.config.sweep, retry_failed=False, force=False))
    row = earlier_report(session, job.protocol, replace(job.job, config=kept), job.key)
    return row or handed(session, job.job, job.key, job.protocol, job.floors)


def _run(
    session: Session, jobs: Sequence[Handed], config: ExperimentConfig, progress: Callable[[Counts], None]
) -> list[RunReport]:
    by_folder = {job.folder: job for job in jobs}
    rows: dict[Path, RunReport] = {}
    name = config.launcher.engine

    def over(folder: Path) -> None:
        job = by_folder[folder]
        rows[folder] = collect(session, job)
        session.claims.release(job.key)
        if job.job_id and session.parent_run_id and (run_id := rows[folder].run_id):
            tracking.adopt(session.store, run_id, session.parent_run_id)

    def submitted(folder: Path, job_id: str) -> None:
        job = by_folder[folder]
        session.claims.note(job.key, folder, name, job_id)
        if session.parent_folder is not None:
            line = {"name": job.job.name, "folder": str(folder), "engine": name, "id": job_id}
            with (session.parent_folder / JOBS).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")

    engine = open_engine(config, session.output_dir / "launcher" / jobs[0].folder.name, bool(session.lost_device))
    try:
        scheduler = Scheduler(engine, config.launcher.max_attempts, over, submitted, progress)
        _begin(scheduler, jobs)
        if config.launcher.detach:
            return _left(session, jobs, engine)
        scheduler.run()
    finally:
        engine.close()
    return [rows[job.folder] for job in jobs]


def _begin(scheduler: Scheduler, jobs: Sequence[Handed]) -> None:
    """Take over what the engine still has, submit the rest."""
    earlier = {job.job_id: job.folder for job in jobs if job.job_id}
    taken = scheduler.adopt(earlier) if earlier else set()
    if taken:
        say(f"{len(taken)} jobs of an earlier command are taken over", "launcher")
    for folder in set(earlier.values()) - taken:
        write(folder, LOST, {"reason": "its sweep ended, and its engine does not have it any more"})
    if rest := [job.folder for job in jobs if job.folder not in taken]:
        scheduler.add(rest)


def _left(session: Session, jobs: Sequence[Handed], engine: Engine) -> list[RunReport]:
    """What a sweep that leaves says of its jobs."""
    assert engine.outlives
    session.leaves = True
    rows = []
    for job in jobs:
        job_id = session.claims.mine[job.key].job_id if job.key in session.claims.mine else ""
        say(f"submitted: {job.job.name} as {job_id} ({job.folder})", "launcher")
        rows.append(RunReport(name=job.job.name, status=SUBMITTED, protocol=job.protocol, error=job_id))
    say("the same command again takes them over; quantlab status shows how they are")
    return rows
