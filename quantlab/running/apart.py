"""A job in a process of its own, as its sweep sees it: handed over as a file in its run's folder, and never lost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from quantlab import tracking
from quantlab.planning.job import Job
from quantlab.running.attempts import JOB, LOG, earlier_attempts, ending
from quantlab.running.job import open_run
from quantlab.running.rows import failed_row, finished_row
from quantlab.running.workbench import Session, run_folder
from quantlab.vocabulary.reports import MetricValue, RunReport

Floors = Mapping[str, Mapping[str, MetricValue]]


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A job that was handed over, as the sweep remembers it."""

    job: Job
    key: str
    protocol: str
    folder: Path
    floors: Floors | None = None
    job_id: str = ""
    """What its engine calls it, of a job that an earlier process submitted."""
    is_elsewhere: bool = False
    """Another sweep runs it; it then has no folder here."""
    after: str = ""
    """The job after which the sweep's process had no GPU any more, so that this one runs apart."""


def hand_over(session: Session, job: Job, key: str, protocol: str, floors: Floors | None) -> Handed:
    """Write a job with all that its process needs; the reference is then in the cache, the floors are in the file.

    ``key`` "" and ``floors`` None: this process could not find them out, the job's own does.
    """
    import torch

    folder = run_folder(session, job.name)
    data = {
        "recipe": job.whole_yaml,
        "name": job.name,
        "recipe_name": job.config.recipe,
        "sweep": asdict(job.config.sweep),
        "overrides": job.overrides,
        "batch_size": job.batch_size,
        "plain_attention": job.plain_attention,
        "after_lost_device": session.lost_device,
        "key": key,
        "parent_run_id": session.parent_run_id,
        "parent_record": session.parent_record,
        "floors": None
        if floors is None
        else {row: {k: asdict(v) for k, v in values.items()} for row, values in floors.items()},
        "base_dir": str(Path.cwd()),
        "num_threads": torch.get_num_threads(),  # the reference's key depends on it
    }
    (folder / JOB).write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    return Handed(job=job, key=key, protocol=protocol, folder=folder, after=session.lost_device)


def collect(session: Session, handed: Handed) -> RunReport:
    """The row of a job that was handed over and is over; a run that its process left open is ended as failed."""
    error = ending(handed.folder)
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
