"""Resume: a job is known by its content, so one that has finished is not run again."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.backends.checkpoints import loaders
from quantlab.backends.table import Backend, distributions
from quantlab.datasets.table import files_read
from quantlab.errors import ConfigError, TrackingError
from quantlab.models.foreign import checkpoint_sha256, sources_of
from quantlab.planning.job import Job
from quantlab.progress import say
from quantlab.running.known import Known
from quantlab.running.rows import failed_row, finished_row
from quantlab.running.workbench import Session
from quantlab.tracking.provenance import PACKAGE, code_digest, digest_of_code, versions
from quantlab.tracking.tags import FAILURE, JOB_KEY, PARENT_RUN_ID, STAGE
from quantlab.tracking.values import is_as_written
from quantlab.vocabulary.files import sha256_of
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.reports import RunReport


def content_key(known: Known, job: Job, cache_dir: Path) -> str:
    """Digest of all that determines a job's numbers: reference, scheme, evaluation, library versions, this code.

    No weights are needed: ``known`` is :attr:`Workbench.known`, or what :func:`quantlab.running.known.recall` found.
    """
    config, there = job.config, versions()
    parts = {
        "reference": known.reference_key,
        "judge": known.judge_sha256,
        "checkpoint": _checkpoint_digest(known, job, cache_dir),
        "quantization": _placeless(asdict(config.quantization)),
        "own": _placeless(config.components),
        "native": _placeless({n: json.loads(scheme.native.to_json_string()) for n, scheme in job.schemes.items()}),
        "components": config.model.components,
        "exclusions": config.model.default_exclusions,
        "evaluation": asdict(config.evaluation),
        "calibration": {**asdict(config.calibration), "path": None} if job.needs_data else None,
        "batch_size": job.batch_size,
        "plain_attention": job.plain_attention,
        "floors": config.sweep.floors,
        "saved": config.tracking.save_checkpoint,
        "files": _file_digests(job),
        "libraries": {name: there.get(name) for name in _libraries(job)},
        "code": code_digest(),
        "backends": [_foreign_digest(backend) for backend in job.backends],
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:32]


def _placeless(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the paths of files, whose contents count (:func:`_file_digests`)."""
    return {
        k: _placeless(v) if isinstance(v, Mapping) else v for k, v in settings.items() if not str(k).endswith("_file")
    }


def _libraries(job: Job) -> Sequence[str]:
    """Packages that a job's numbers depend on; of a checkpoint, all that load such: it may be any one's."""
    if job.config.checkpoint is not None:
        return sorted({*distributions(), *loaders()})
    return [name for backend in job.backends for name in backend.distributions]


def _checkpoint_digest(known: Known, job: Job, cache_dir: Path) -> str | None:
    """Contents of the checkpoint that others made; one that cannot be read fails in its own stage, as a row."""
    checkpoint = job.config.checkpoint
    if checkpoint is None:
        return None
    names = list(job.config.model.components or known.classes)
    try:
        sources = sources_of(checkpoint, names, known.classes)
    except (ConfigError, KeyError):
        return f"unreadable: {checkpoint}"
    return checkpoint_sha256(sources, cache_dir)


def _file_digests(job: Job) -> dict[str, str]:
    """Contents of the files that the scheme's settings name, and of those that calibration data are made of."""
    paths = {
        f"{name}.{k}": Path(v).expanduser()
        for name, scheme in job.schemes.items()
        for k, v in json.loads(scheme.native.to_json_string()).items()
        if k.endswith("_file") and isinstance(v, str)
    }
    asked = job.config.calibration
    if job.needs_data and asked.path is not None:
        for i, file in enumerate(files_read(asked.source, asked.path)):
            paths[f"calibration.path.{i}.{file.name}"] = file
    return {k: sha256_of(path) for k, path in paths.items() if path.is_file()}


def _foreign_digest(backend: Backend) -> str | None:
    """Digest of the code of a backend that comes from another package; None for one of quantlab's."""
    file = Path(str(getattr(backend.module, "__file__", None) or PACKAGE))
    if file.is_relative_to(PACKAGE):
        return None
    is_folder = file.name == "__init__.py"
    return digest_of_code(file.parent, file.parent.rglob("*.py") if is_folder else [file])


def earlier_report(session: Session, protocol: str, job: Job, key: str) -> RunReport | None:
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
                report = _report(session, protocol, job, run)
                if session.parent_run_id:
                    tracking.adopt(session.store, run["run_id"], session.parent_run_id)
                return report
    return None


def _runs(session: Session, key: str, status: str) -> list[tracking.RunData]:
    """From the store, or from the runs' folders while the store is lost, also when it is lost only now."""
    with contextlib.suppress(TrackingError):
        found = tracking.find_runs(session.store, {JOB_KEY: key}, status)
        if not session.store.is_lost:
            return found
    return tracking.find_records(session.output_dir / "runs", {JOB_KEY: key}, status)


def _report(session: Session, protocol: str, job: Job, run: tracking.RunData) -> RunReport:
    if run["status"] != "FINISHED":
        error, stage = (run["tags"].get(tag, "") for tag in (FAILURE, STAGE))
        return failed_row(job, protocol, error, stage, run["run_id"], run["metrics"], is_resumed=True)
    if "folder" in run:
        content = (Path(run["folder"]) / "report.json").read_bytes()
    else:
        with tempfile.TemporaryDirectory() as folder:
            content = tracking.get_artifact(session.store, run["run_id"], "report.json", Path(folder)).read_bytes()
    if not is_as_written(run["tags"], "report.json", content):
        told = f"{run['name']} ({run['run_id']}): report.json is not what the run wrote; the job is run again"
        say(told, "warning")
        raise ValueError("report.json was changed")
    return finished_row(json.loads(content), run["run_id"], job.name, is_resumed=True)
