"""What a sweep hands over to its engine, and how its rows come back: one after the other, as they arrive."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

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
More = Callable[[Handed, RunReport], Sequence[Handed]]
_WAIT_S = 5.0


def runs_apart(job: Job, device: str) -> bool:
    """Does a sweep hand the job over? Else it runs in the sweep's own process and shares the loaded model."""
    config = job.config
    if config.launcher.engine != "serial" or config.sweep.isolation == "process":
        return True
    may_crash = any(device in scheme.row.may_crash_on for scheme in job.schemes.values())
    return config.sweep.isolation == "auto" and (may_crash or config.sweep.timeout_s is not None)


def handed(
    session: Session, job: Job, key: str, protocol: str, floors: Floors | None, claim: str = "", **more: Any
) -> Handed:
    """The job, handed over; or as an earlier process left it with its engine; or as another sweep is running it.

    ``claim`` is by what it is claimed where that is not its key; ``more`` goes to
    :func:`quantlab.running.apart.hand_over`.
    """
    claimed = claim or key
    if claim:
        more["claim"] = claim
    if not claimed:
        return hand_over(session, job, key, protocol, floors, **more)
    known: dict[str, Any] = {name: more[name] for name in ("claim", "behind", "known") if name in more}
    is_no_row = any(more.get(name) is not None for name in ("calibrations", "export"))
    told = partial(Handed, job=job, key=key, protocol=protocol, is_no_row=is_no_row, **known)
    if session.claims.take(claimed, job.name) is not None:
        return told(folder=Path(), floors=floors, is_elsewhere=True)
    left = session.claims.mine[claimed]
    if left.job_id and left.engine == job.config.launcher.engine and Path(left.folder).is_dir():
        return told(folder=Path(left.folder), job_id=left.job_id)
    return hand_over(session, job, key, protocol, floors, **more)


def run_handed(
    session: Session,
    jobs: Sequence[Handed],
    config: ExperimentConfig,
    progress: Callable[[Counts], None],
    more: More = lambda job, row: (),
) -> list[RunReport]:
    """The rows of all jobs that were handed over; each goes to the store when its job is over.

    ``more`` is told each row as it arrives, and gives further jobs, of which it is told as well. Never raises for a
    job's failure; :class:`EngineError` where the engine takes no job at all. With ``launcher.detach`` jobs are
    submitted, and their rows say no more than that.
    """
    numbers = itertools.count()
    left = {next(numbers): job for job in jobs}
    rows: dict[int, RunReport] = {}
    noted: set[str] = set()

    def arrived(number: int, job: Handed, row: RunReport) -> dict[int, Handed]:
        rows[number] = row
        further = {next(numbers): one for one in more(job, row)}
        note_elsewhere(further.values())
        return further

    def note_elsewhere(waited_for: Iterable[Handed]) -> None:
        for job in waited_for:
            there = session.claims.holder(job.claimed) if job.is_elsewhere and job.claimed not in noted else None
            if there is not None and there.folder:
                noted.add(job.claimed)
                _note(session, job, there.folder, there.engine, there.job_id)

    while left:
        note_elsewhere(left.values())
        here = {i: job for i, job in left.items() if not job.is_elsewhere}
        waiting = {i: job for i, job in left.items() if job.is_elsewhere}
        if here:
            waiting |= _run(session, here, config, progress, arrived)
        left = {}
        for i, job in waiting.items():
            seen = _looked_up(session, job)
            left |= {i: seen} if isinstance(seen, Handed) else arrived(i, job, seen)
        if left and all(job.is_elsewhere for job in left.values()):
            progress(Counts(ended=len(rows), running=len(left)))
            wait_for(session.claims, [job.claimed for job in left.values()], _WAIT_S)
    return [rows[i] for i in range(len(jobs))]


def _looked_up(session: Session, job: Handed) -> RunReport | Handed:
    """A job that another sweep runs: its row where that is over, the job itself where nobody runs it any more."""
    if session.claims.holder(job.claimed):
        return job
    tracking.push_pending(session.store, session.output_dir / "runs")
    if job.is_no_row:  # what it wrote is known by now; where it failed, it is asked for again
        return RunReport(name=job.job.name, status="FINISHED", protocol=job.protocol)
    kept = replace(job.job.config, sweep=replace(job.job.config.sweep, retry_failed=False, force=False))
    row = earlier_report(session, job.protocol, replace(job.job, config=kept), job.key)
    if row is not None:
        return row
    told = {name: getattr(job, name) for name in ("behind", "known") if getattr(job, name) is not None}
    again = handed(session, job.job, job.key, job.protocol, job.floors, claim=job.claim, **told)
    return replace(again, place=job.place)


def _run(
    session: Session,
    jobs: Mapping[int, Handed],
    config: ExperimentConfig,
    progress: Callable[[Counts], None],
    arrived: Callable[[int, Handed, RunReport], Mapping[int, Handed]],
) -> dict[int, Handed]:
    """Run jobs, and those that come after them; returns those of these that another sweep runs."""
    by_folder = {job.folder: (number, job) for number, job in jobs.items()}
    elsewhere: dict[int, Handed] = {}
    name = config.launcher.engine

    def over(folder: Path) -> None:
        number, job = by_folder[folder]
        row = collect(session, job)
        session.claims.release(job.claimed)
        if job.job_id and session.parent_run_id and row.run_id:
            tracking.adopt(session.store, row.run_id, session.parent_run_id)
        further = arrived(number, job, row)
        elsewhere.update({i: one for i, one in further.items() if one.is_elsewhere})
        if here := {i: one for i, one in further.items() if not one.is_elsewhere}:
            by_folder.update({one.folder: (i, one) for i, one in here.items()})
            _begin(scheduler, list(here.values()))

    def submitted(folder: Path, job_id: str) -> None:
        _, job = by_folder[folder]
        session.claims.note(job.claimed, folder, name, job_id)
        _note(session, job, folder, name, job_id)

    first = next(iter(jobs.values()))
    engine = open_engine(config, session.output_dir / "launcher" / first.folder.name, bool(session.lost_device))
    try:
        scheduler = Scheduler(engine, config.launcher.max_attempts, over, submitted, progress)
        _begin(scheduler, list(jobs.values()))
        if config.launcher.detach:
            for (number, job), row in zip(jobs.items(), _left(session, list(jobs.values()), engine), strict=True):
                arrived(number, job, row)
        else:
            scheduler.run()
    finally:
        engine.close()
    return elsewhere


def _note(session: Session, job: Handed, folder: Path | str, engine: str, job_id: str) -> None:
    """In the sweep's folder a job has a line, by which ``quantlab status`` finds it: whoever submitted it."""
    if session.parent_folder is not None:
        line = {"name": job.job.name, "folder": str(folder), "engine": engine, "id": job_id}
        with (session.parent_folder / JOBS).open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(line) + "\n")


def _begin(scheduler: Scheduler, jobs: Sequence[Handed]) -> None:
    """Take over what the engine still has, submit the rest; what is behind another job begins when that is over."""
    earlier = {job.job_id: job.folder for job in jobs if job.job_id}
    taken = scheduler.adopt(earlier) if earlier else set()
    if taken:
        say(f"{len(taken)} jobs of an earlier command are taken over")
    for folder in set(earlier.values()) - taken:
        write(folder, LOST, {"reason": "its sweep ended, and its engine does not have it any more"})
    ids = {job.folder: job.job_id for job in jobs if job.folder in taken}
    for folder, job_id in ids.items():
        scheduler.submitted(folder, job_id)
    rest = [job for job in jobs if job.folder not in taken]
    for behind in sorted({job.behind for job in rest}, key=lambda folder: (folder is not None, str(folder))):
        some = [job.folder for job in rest if job.behind == behind]
        after = [ids[behind]] if behind in ids else []
        ids |= zip(some, scheduler.add(some, after), strict=True)


def _left(session: Session, jobs: Sequence[Handed], engine: Engine) -> list[RunReport]:
    """What a sweep that leaves says of its jobs."""
    assert engine.outlives
    session.leaves = True
    rows = []
    for job in jobs:
        job_id = session.claims.mine[job.claimed].job_id if job.claimed in session.claims.mine else ""
        say(f"submitted: {job.job.name} as {job_id} ({job.folder})")
        rows.append(RunReport(name=job.job.name, status=SUBMITTED, protocol=job.protocol, error=job_id))
    say("the same command again takes them over; quantlab status shows how they are")
    return rows
