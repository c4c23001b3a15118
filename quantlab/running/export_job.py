"""What a sweep exports, made by a job of its engine: the process that submits loads no model.

The job takes along what the measured run recorded, and writes to ``export.path`` as its node sees it.
"""

from __future__ import annotations

import base64
import hashlib
import socket
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.errors import QuantlabError, in_words
from quantlab.planning.job import Job, Plan
from quantlab.progress import say
from quantlab.running.attempts import LOG, read, write
from quantlab.running.handing import SUBMITTED, handed, run_handed
from quantlab.running.job import planned_bytes
from quantlab.running.winner import chosen, export_row, recorded_of
from quantlab.running.workbench import Session
from quantlab.tracking.pictures import SAMPLE_GRID
from quantlab.tracking.results import report_data
from quantlab.vocabulary.reports import RunReport

NAME = "export"
"""Of the job."""
RESULT = "export.json"
"""In its folder, what was exported."""


def export_far(session: Session, plan: Plan, reports: Sequence[RunReport]) -> None:
    """Have the scheme exported that ``export.winner`` or ``export.pick`` chooses among a sweep's rows.

    Where nothing is chosen it is told why: the sweep itself has done what it should. Raises QuantlabError where the
    export fails.
    """
    if any(report.status == SUBMITTED for report in reports):
        why = f"export.path={plan.export.path}: nothing is chosen before the jobs are over; give the command again then"
        say(why, "warning")
        return
    found = chosen(session, plan, reports)
    if found is None:
        return
    job, report = found
    target = Path(str(plan.export.path)).expanduser().absolute()
    with tempfile.TemporaryDirectory(prefix="quantlab-export-") as scratch:
        recorded, picture = recorded_of(job.config, report, Path(scratch))
        asked = {
            "target": str(target),
            "row": report_data(report),
            "planned": planned_bytes(report),
            "recorded": recorded,
            "picture": None if picture is None else base64.b64encode(picture.read_bytes()).decode(),
        }
    claim = hashlib.sha256(f"export {target} {report.run_id}".encode()).hexdigest()[:32]
    one = handed(session, replace(job, name=NAME), "", report.protocol, None, claim=claim, export=asked)
    (row,) = run_handed(session, [one], job.config, lambda counts: None)
    told = read(one.folder, RESULT)
    if one.is_elsewhere:
        say(f"export.path={target}: {report.name} is exported by another sweep")
        return
    if not told:
        raise QuantlabError(
            f"export.path={target}: {report.name} is not exported: {row.error or 'the job left nothing'}; its log is "
            f"{one.folder / LOG}"
        )
    if report.run_id:
        tracking.annotate(session.store, report.run_id, told["metrics"], told["tags"])
    there = "" if target.is_dir() else f" (on {told['host']}: it is not seen from here)"
    say(f"{report.name}: {'; '.join(told['lines'])}{there}")


def export_here(session: Session, job: Job, folder: Path, asked: Mapping[str, Any]) -> int:
    """On a node, the job: write :data:`RESULT` to ``folder``; 0, or 1 where that failed: ``run.json`` says why."""
    began, error = time.time_ns() // 1_000_000, ""
    try:
        picture = None
        if asked["picture"] is not None:
            picture = folder / Path(SAMPLE_GRID).name
            picture.write_bytes(base64.b64decode(asked["picture"]))
        measured = replace(job, name=asked["row"]["name"])
        told = (asked["row"], asked["planned"], asked["recorded"], picture)
        exported = export_row(session, measured, asked["target"], *told)
        found = {"metrics": exported.metrics, "tags": exported.tags, "lines": list(exported.lines())}
        write(folder, RESULT, {**found, "host": socket.gethostname()})
    except Exception as failure:  # noqa: BLE001  whatever a library raises: the sweep says it
        traceback.print_exc()
        error = in_words(failure)
    status, ended = "FAILED" if error else "FINISHED", time.time_ns() // 1_000_000
    write(folder, "run.json", {"name": job.name, "status": status, "error": error, "start_ms": began, "end_ms": ended})
    return int(bool(error))
