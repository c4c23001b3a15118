"""A job in a process of its own, as its sweep sees it: handed over as a file in its run's folder, and never lost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantlab import tracking
from quantlab.planning.job import Job
from quantlab.running.attempts import JOB, LOG, RESUMED, earlier_attempts, ending, has_ended, read
from quantlab.running.engines.table import is_far
from quantlab.running.job import open_run
from quantlab.running.known import Known, where_of
from quantlab.running.resume import earlier_report
from quantlab.running.rows import failed_row, finished_row
from quantlab.running.workbench import Session, run_folder
from quantlab.tracking.provenance import code_digest
from quantlab.vocabulary.reports import MetricValue, RunReport
from quantlab.vocabulary.schema import CalibrationConfig

Floors = Mapping[str, Mapping[str, MetricValue]]


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A job that was handed over, as the sweep remembers it."""

    job: Job
    key: str
    protocol: str
    folder: Path
    claim: str = ""
    """By what it is claimed, where its key is not known yet; else by that."""
    place: int = 0
    """Its row's, for whoever handed it over."""
    is_no_row: bool = False
    """It observes the reference and measures the floors, or it exports; it is no row itself."""
    behind: Path | None = None
    """Folder of the reference's job, which is not over yet."""
    known: Known | None = None
    """What the reference turned out to be."""
    floors: Floors | None = None
    job_id: str = ""
    """What its engine calls it, of a job that an earlier process submitted."""
    is_elsewhere: bool = False
    """Another sweep runs it; it then has no folder here."""
    after: str = ""
    """The job after which the sweep's process had no GPU any more, so that this one runs apart."""

    @property
    def claimed(self) -> str:
        """By what the job is claimed."""
        return self.claim or self.key


def hand_over(
    session: Session,
    job: Job,
    key: str,
    protocol: str,
    floors: Floors | None,
    *,
    claim: str = "",
    behind: Path | None = None,
    known: Known | None = None,
    calibrations: Sequence[CalibrationConfig] | None = None,
    export: Mapping[str, object] | None = None,
) -> Handed:
    """Write a job with all that its process needs; the reference is then in the cache, the floors are in the file.

    ``key`` "" and ``floors`` None: this process could not find them out, the job's own does, by what is in ``behind``
    where that is over. With ``calibrations``, those of the jobs that will need it, it is the job of a reference, and
    with ``export``, what is asked of it, one that exports.
    """
    folder = run_folder(session, job.name)
    data = {
        "recipe": job.whole_yaml,
        "name": job.name,
        "recipe_name": job.config.recipe,
        "sweep": asdict(job.config.sweep),
        "overrides": job.overrides,
        "typed": session.typed,
        "batch_size": job.batch_size,
        "plain_attention": job.plain_attention,
        "after_lost_device": session.lost_device,
        "key": key,
        "code": code_digest(),
        "parent_run_id": session.parent_run_id,
        "parent_record": session.parent_record,
        "floors": None
        if floors is None
        else {row: {k: asdict(v) for k, v in values.items()} for row, values in floors.items()},
        "base_dir": str(Path.cwd()),
        "num_threads": _num_threads(job, known),
        "where": where_of(job.config) if is_far(job.config.launcher) else None,
        "known": None if known is None else asdict(known),
        "behind": None if behind is None else str(behind),
        "calibrations": None if calibrations is None else [asdict(one) for one in calibrations],
        "export": export,
    }
    (folder / JOB).write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    return Handed(
        job=job,
        key=key,
        protocol=protocol,
        folder=folder,
        claim=claim,
        is_no_row=calibrations is not None or export is not None,
        behind=behind,
        known=known,
        after=session.lost_device,
    )


def _num_threads(job: Job, known: Known | None) -> int | None:
    """Those that the reference was computed with, whose key depends on them; None: what the job's node has."""
    if is_far(job.config.launcher):
        threads = known.made["arithmetic"].get("threads") if known is not None else None
        return None if threads is None else int(threads)
    import torch

    return torch.get_num_threads()


def collect(session: Session, handed: Handed) -> RunReport:
    """The row of a job that was handed over and is over; a run that its process left open is ended as failed."""
    error = ending(handed.folder)
    told = read(handed.folder, "run.json")
    if handed.is_no_row:
        why = str(told.get("error") or (error if has_ended(handed.folder) == "FAILED" else ""))
        status = "FAILED" if why else "FINISHED"
        return RunReport(name=handed.job.name, status=status, protocol=handed.protocol, error=why)
    if RESUMED in told and (row := earlier_report(session, handed.protocol, handed.job, told[RESUMED])):
        return row
    run = tracking.end_lost_run(session.store, handed.folder, error, LOG)
    if not run:  # the process ended before it could begin its run
        with open_run(session, handed.job.name, handed.job, key=handed.key, folder=handed.folder) as begun:
            begun.finish("FAILED", error, "start")
        run = tracking.end_lost_run(session.store, handed.folder, error)
    if run["status"] == "FINISHED":
        stored = json.loads((handed.folder / "report.json").read_text(encoding="utf-8"))
        row = finished_row(stored, run["run_id"])
    else:
        row = failed_row(handed.job, handed.protocol, run["error"], run["stage"], run["run_id"], run["metrics"])
    more: dict[str, object] = {}
    if handed.after:
        more["process"] = f"its own, as {handed.after} had lost the sweep's GPU"
    if earlier := earlier_attempts(handed.folder):
        more["attempt"] = len(earlier) + 1
        more["earlier_attempts"] = earlier
    return replace(row, params={**row.params, **more}) if more else row
