"""A sweep whose jobs have all finished before: its rows, with no model loaded and no torch imported."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from quantlab import tracking
from quantlab.errors import TrackingError
from quantlab.planning.job import Job, Plan
from quantlab.running.known import Known, bench_key, recall_each, reference_of
from quantlab.running.once import Once
from quantlab.running.resume import content_key, earlier_report
from quantlab.running.rows import finished_row
from quantlab.running.workbench import Session
from quantlab.tracking.connect import resolved_uri
from quantlab.tracking.glance import sweep_of
from quantlab.tracking.provenance import Environment, environment
from quantlab.vocabulary.reports import RunReport


def known_before(jobs: Sequence[Job], cache_dir: Path) -> dict[str, Known] | None:
    """Of each reference that the jobs are compared with, what is known of it; None where one is not known yet."""
    found = recall_each(jobs, cache_dir)
    known = {key: there for key, there in found.items() if there is not None}
    return known if len(known) == len(found) else None


def rows_before(session: Session, jobs: Sequence[Job], known: dict[str, Known]) -> list[RunReport] | None:
    """The rows of jobs that earlier sweeps finished, floors before the first job of each reference; None where one has
    not been, or is to be run again."""
    rows: list[RunReport] = []
    once = Once()
    for job, there, key in _wanted(jobs, known, session.output_dir / "cache", once):
        row = earlier_report(session, there.protocol, job, key)
        if row is None:
            return None
        rows.append(row)
    once.tell()
    return rows


def answered_before(request: Plan, known: dict[str, Known]) -> list[RunReport] | None:
    """The rows of a request that an earlier sweep answered whole: that sweep's, read without MLflow and with nothing
    written. None where there is none such in this store, or where runs wait to be closed or sent."""
    config = request.jobs[0].config
    output_dir = Path(config.output_dir).expanduser().absolute()
    if request.invalid or request.export.path is not None or not tracking.all_arrived(output_dir / "runs"):
        return None
    once = Once()
    wanted = list(_wanted(request.jobs, known, output_dir / "cache", once))
    uri = resolved_uri(config.tracking.uri, Path.cwd())
    found = sweep_of(uri, config.tracking.experiment, request.name, [key for _, _, key in wanted])
    if found is None:
        return None
    once.tell()
    return [
        finished_row(json.loads(earlier.report), earlier.run_id, job.name, is_resumed=True)
        for earlier, (job, _, _) in zip(found, wanted, strict=True)
    ]


def _wanted(
    jobs: Sequence[Job], known: dict[str, Known], cache_dir: Path, once: Once
) -> Iterator[tuple[Job, Known, str]]:
    """Jobs with their content keys, floors before the first job of each reference; each scheme once."""
    told: set[str] = set()
    for job in jobs:
        there, shared = known[reference_of(job)], bench_key(job.config)
        floors = [] if shared in told else there.floor_jobs(job.config)
        told.add(shared)
        for one in (*floors, *([] if once.is_again(there, job) else [job])):
            yield one, there, content_key(there, one, cache_dir)


def environment_of(session: Session, rows: Sequence[RunReport]) -> Environment:
    """This process's environment with the hardware on which the first row was measured; where no store tells it, with
    that of this machine."""
    run_id = next((row.run_id for row in rows if row.run_id), "local-")
    if session.store.is_lost or run_id.startswith("local-"):
        return environment(Path(__file__).parents[2])
    with contextlib.suppress(TrackingError, OSError, ValueError, KeyError), tempfile.TemporaryDirectory() as folder:
        file = tracking.get_artifact(session.store, run_id, "environment.json", Path(folder))
        here = environment(Path(__file__).parents[2], has_hardware=False)
        return {**here, "hardware": json.loads(file.read_text(encoding="utf-8"))["hardware"]}
    return environment(Path(__file__).parents[2])
