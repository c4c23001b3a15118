"""What a sweep hands over to its engine, and how its rows come back: one after the other, as they arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from quantlab.planning.job import Job
from quantlab.running.apart import Handed, collect
from quantlab.running.engines.table import open_engine
from quantlab.running.scheduler import Counts, Scheduler
from quantlab.running.workbench import Session
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import ExperimentConfig


def runs_apart(job: Job, device: str) -> bool:
    """Does a sweep hand the job over? Else it runs in the sweep's own process and shares the loaded model."""
    config = job.config
    if config.launcher.engine != "serial" or config.sweep.isolation == "process":
        return True
    may_crash = any(device in scheme.row.may_crash_on for scheme in job.schemes.values())
    return config.sweep.isolation == "auto" and (may_crash or config.sweep.timeout_s is not None)


def run_handed(
    session: Session, handed: Sequence[Handed], config: ExperimentConfig, progress: Callable[[Counts], None]
) -> dict[Path, RunReport]:
    """Folder -> row of all jobs that were handed over; each goes to the store when its job is over.

    Never raises for a job's failure; :class:`EngineError` where the engine takes no job at all.
    """
    jobs = {job.folder: job for job in handed}
    rows: dict[Path, RunReport] = {}

    def over(folder: Path) -> None:
        rows[folder] = collect(session, jobs[folder])

    engine = open_engine(config, _engine_folder(session, handed[0]), bool(session.lost_device))
    try:
        scheduler = Scheduler(engine, config.launcher.max_attempts, over, progress=progress)
        scheduler.add(list(jobs))
        scheduler.run()
    finally:
        engine.close()
    return rows


def _engine_folder(session: Session, first: Handed) -> Path:
    return session.output_dir / "launcher" / first.folder.name
