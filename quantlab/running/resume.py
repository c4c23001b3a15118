"""Resume: a job is known by its content, so one that has finished is not run again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.errors import TrackingError
from quantlab.planning.job import Job
from quantlab.running.job import Session, Workbench, judge_digest
from quantlab.tracking.provenance import versions
from quantlab.tracking.tags import FAILURE, JOB_KEY, PARENT_RUN_ID, STAGE
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.reports import MetricValue, RunReport

LIBRARIES = {
    "none": (),
    "bitsandbytes": ("bitsandbytes",),
    "torchao": ("torchao",),
    "quanto": ("optimum-quanto",),
    "gguf": ("gguf", "libgguf"),
    "modelopt": ("nvidia-modelopt",),
}
"""backend -> distributions that its numbers depend on, beside those of the reference."""


def content_key(bench: Workbench, job: Job) -> str:
    """Digest of all that determines a job's numbers: reference, scheme, evaluation, library versions, this code."""
    config = job.config
    known = versions()
    parts = {
        "reference": bench.reference_key,
        "judge": judge_digest(bench),
        "quantization": asdict(config.quantization),
        "native": json.loads(job.native.to_json_string()) if job.native is not None else None,
        "components": config.model.components,
        "exclusions": config.model.default_exclusions,
        "evaluation": asdict(config.evaluation),
        "calibration": asdict(config.calibration) if job.native is not None and job.native.needs_data else None,
        "batch_size": job.batch_size,
        "floors": config.sweep.floors,
        "saved": config.tracking.save_checkpoint,
        "files": _file_digests(job),
        "libraries": {name: known.get(name) for name in LIBRARIES[config.quantization.backend]},
        "code": code_digest(),
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def _file_digests(job: Job) -> dict[str, str]:
    """Contents of the files that the scheme's settings name, and of calibration data of the user's own."""
    settings = json.loads(job.native.to_json_string()) if job.native is not None else {}
    paths = {k: Path(v).expanduser() for k, v in settings.items() if k.endswith("_file") and isinstance(v, str)}
    if job.native is not None and job.native.needs_data and job.config.calibration.path is not None:
        paths["calibration.path"] = Path(job.config.calibration.path).expanduser()
    return {k: hashlib.sha256(path.read_bytes()).hexdigest() for k, path in paths.items() if path.is_file()}


@functools.cache
def code_digest() -> str:
    """Digest of quantlab's own Python files."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


def earlier_report(session: Session, bench: Workbench, job: Job, key: str) -> RunReport | None:
    """The row of a job that an earlier sweep finished, which then counts as a job of this sweep; else None.

    With ``sweep.retry_failed=false`` a failed job's row counts too; ``sweep.force=true`` finds nothing.
    """
    if job.config.sweep.force:
        return None
    statuses = ("FINISHED",) if job.config.sweep.retry_failed else ("FINISHED", "FAILED")
    for status in statuses:
        for run in _runs(session, key, status):
            if PARENT_RUN_ID not in run["tags"] and "folder" not in run:
                continue  # a single run is not a part of a sweep
            with contextlib.suppress(TrackingError, OSError, ValueError):  # its report is lost: the next one, or anew
                report = _report(session, bench, job, run)
                if session.parent_run_id:
                    tracking.adopt(session.store, run["run_id"], session.parent_run_id)
                return report
    return None


def _runs(session: Session, key: str, status: str) -> list[dict[str, Any]]:
    """From the store, or from the runs' folders while the store is lost, also when it is lost only now."""
    with contextlib.suppress(TrackingError):
        found = tracking.find_runs(session.store, key=key, status=status)
        if not session.store.is_lost:
            return found
    return tracking.find_records(session.output_dir / "runs", {JOB_KEY: key}, status)


def _report(session: Session, bench: Workbench, job: Job, run: Mapping[str, Any]) -> RunReport:
    if run["status"] != "FINISHED":
        data = {"name": job.name, "status": run["status"], "protocol": bench.model.protocol}
        data |= {"metrics": run["metrics"], "error": run["tags"].get(FAILURE, "")}
        data |= {"failed_stage": run["tags"].get(STAGE, ""), "params": job.resolved}
    elif "folder" in run:
        data = json.loads((Path(run["folder"]) / "report.json").read_text(encoding="utf-8"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = tracking.get_artifact(session.store, run["run_id"], "report.json", Path(folder))
            data = json.loads(file.read_text(encoding="utf-8"))
    return read_report({**data, "name": job.name, "run_id": run["run_id"]}, is_resumed=True)


def read_report(data: Mapping[str, Any], is_resumed: bool = False) -> RunReport:
    """A row's JSON (``report.json``) as a report: its numbers, without arrays and layers."""
    metrics = {str(k): float(v) for k, v in data["metrics"].items()}
    return RunReport(
        name=data["name"],
        status=data["status"],
        protocol=data["protocol"],
        quality=metric_values(metrics, "quality/"),
        floor=metric_values(metrics, "quality/floor/"),
        floor_batch=metric_values(metrics, "quality/floor_batch/"),
        params=data["params"],
        error=data["error"],
        failed_stage=data["failed_stage"],
        run_id=data["run_id"],
        stored_metrics=metrics,
        is_resumed=is_resumed,
    )


def metric_values(metrics: Mapping[str, float], prefix: str) -> dict[str, MetricValue]:
    """The numbers with uncertainty among flat metrics whose name is ``prefix`` and one word."""
    names = [k.removeprefix(prefix).removesuffix("/n") for k in metrics if k.startswith(prefix) and k.endswith("/n")]
    return {
        name: MetricValue(
            value=metrics[prefix + name],
            n=int(metrics[f"{prefix}{name}/n"]),
            se=metrics.get(f"{prefix}{name}/se"),
            ci_lo=metrics.get(f"{prefix}{name}/ci_lo"),
            ci_hi=metrics.get(f"{prefix}{name}/ci_hi"),
        )
        for name in names
        if "/" not in name
    }
