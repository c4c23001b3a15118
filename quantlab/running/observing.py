"""On a node, the job of a reference: observe it once for the sweep's jobs, and measure the floors, each a run."""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from quantlab.errors import in_words
from quantlab.planning.job import Job
from quantlab.planning.ready import check_ready
from quantlab.running.attempts import RESULT, write
from quantlab.running.job import run_row
from quantlab.running.known import bench_key
from quantlab.running.resume import content_key, earlier_report
from quantlab.running.workbench import Session, workbench
from quantlab.vocabulary.schema import CalibrationConfig


def observe_reference(session: Session, job: Job, folder: Path, calibrations: Sequence[Mapping[str, Any]]) -> int:
    """Write :data:`quantlab.running.attempts.RESULT` to ``folder``; 0, or 1 where that failed: ``run.json`` says why.

    ``calibrations`` are the settings of the jobs that will want data, which are checked now. A floor that was
    measured before is not measured again.
    """
    began = time.time_ns() // 1_000_000
    wanted = [replace(job.config, calibration=CalibrationConfig(**one)) for one in calibrations]
    session.expected = {bench_key(job.config): wanted}
    alone = replace(session, parent_run_id=None)  # what is found is the sweep's to take over
    error, keys = "", {}
    try:
        check_ready([job])  # what the submitting side left: a pipeline's class, before its weights
        bench = workbench(session, job, None)
        for floor in bench.known.floor_jobs(job.config):
            key = keys[floor.name] = content_key(bench.known, floor, bench.cache_dir)
            earlier = earlier_report(alone, bench.model.protocol, floor, key)
            if earlier is not None:
                bench.keep_floor(earlier)
            else:
                run_row(session, bench, floor, key, folder / floor.name)
        floors = {row: {k: asdict(v) for k, v in values.items()} for row, values in bench.floors.items()}
        write(folder, RESULT, {"known": asdict(bench.known), "rows": keys, "floors": floors})
    except Exception as failure:  # noqa: BLE001  whatever a library raises: the jobs' rows say it
        traceback.print_exc()
        error = in_words(failure)
    status = "FAILED" if error else "FINISHED"
    ended = time.time_ns() // 1_000_000
    write(folder, "run.json", {"name": job.name, "status": status, "error": error, "start_ms": began, "end_ms": ended})
    return int(bool(error))
