"""``quantlab export RUN_ID DIR``: a run is rebuilt from the tracking store, and its candidate written and checked."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.errors import ConfigError, nearest
from quantlab.exporting.card import Described, as_row
from quantlab.exporting.folder import check_target
from quantlab.exporting.push import push
from quantlab.exporting.whole import Exported
from quantlab.planning.job import Job
from quantlab.report.reading import Reader, StoredRun, open_reader, read_json
from quantlab.running.forecast import bytes_to_run
from quantlab.running.outlined import refused_by_shape
from quantlab.running.reproduce import KEYS, finished_job, may_be_set, rebuilt, with_weights
from quantlab.running.sweep import open_session
from quantlab.running.winner import bench_for, made_and_exported, stored_picture
from quantlab.tracking.tags import EXPORT_PATH
from quantlab.vocabulary.numbers import NEEDED_BYTES
from quantlab.vocabulary.schema import TrackingConfig

USAGE = "quantlab export RUN_ID DIR (or latest instead of the id)"
_KEYS = (*KEYS, "tracking.experiment")
_PLACES = ("tracking.uri", "tracking.experiment", "output_dir")
"""Where a run that is uploaded is looked for."""


@dataclass(frozen=True, kw_only=True)
class ExportRequest:
    """What was typed behind ``quantlab export``."""

    run_id: str
    target: str
    words: Mapping[str, str] = field(default_factory=dict)
    quiet: bool = False


def parse_request(words: Sequence[str]) -> ExportRequest:
    """The words behind ``quantlab export`` as a request; ConfigError for what is none."""
    given: list[str] = []
    values: dict[str, str] = {}
    quiet = False
    for word in words:
        key, has_value, value = word.partition("=")
        if word in ("-q", "--quiet"):
            quiet = True
        elif word.startswith("-"):
            raise ConfigError(f"{word}: no such option of export{nearest(word, ['--quiet'])}; there is -q")
        elif has_value and (key in _KEYS or may_be_set(key)) and value:
            values[key] = value
        elif has_value and key.replace(".", "").replace("_", "").isalnum() and "/" not in key:
            raise ConfigError(
                f"{word}: a run is exported as it was measured{nearest(key, _KEYS)}; only {', '.join(_KEYS)} can be set"
            )
        else:
            given.append(word)
    if len(given) != 2:
        lacks = {0: "no run and no folder are named", 1: "no folder is named to write to"}
        what = lacks.get(len(given), "a run and one folder are wanted")
        raise ConfigError(f"{' '.join(['export', *given])}: {what}; write {USAGE}")
    return ExportRequest(run_id=given[0], target=given[1], words=values, quiet=quiet)


def export_run(request: ExportRequest) -> Exported:
    """Make the candidate of a finished run again, compare it with the run's record, and write it.

    Raises:
        TrackingError: no such run, or one without what is needed: a sweep, a failed job, artifacts that are gone.
        ConfigError, NotQuantized, DiskFull: see :func:`quantlab.exporting.whole.export`.
    """
    check_target("export", request.target)
    tracked = TrackingConfig(uri=request.words.get("tracking.uri", TrackingConfig().uri))
    reader = open_reader(tracked, Path.cwd(), request.words.get("output_dir", "outputs"))
    run = finished_job(reader, request.run_id, "export", _experiment(request.words))
    said = {k: v for k, v in request.words.items() if may_be_set(k)}
    with tempfile.TemporaryDirectory(prefix="quantlab-export-") as folder:
        scratch = Path(folder)
        job = rebuilt(said, reader, run, read_json(reader, run, "environment.json"), scratch, "export")
        if not job.schemes:
            raise ConfigError(f"export {run.run_id}: {run.name!r} is not quantized; give the id of a run that is")
        _check_shapes(job, request.target)
        with open_session(job.config, request.quiet) as session:
            job = replace(job, config=with_weights(job.config, session, run, scratch, "export"))
            recorded = read_json(reader, run, "layers.json")
            bench = bench_for(session, job, recorded)
            described = _described(reader, run, job, scratch)
            exported = made_and_exported(session, bench, job, request.target, described, run, recorded)
            tracking.annotate(session.store, run.run_id, exported.metrics, exported.tags)
            return exported


def _check_shapes(job: Job, target: str) -> None:
    """ConfigError for what no loader reads by its shapes, before the candidate is made (and calibrated) once more."""
    asked = replace(job, config=replace(job.config, export=replace(job.config.export, path=target)))
    for error in refused_by_shape([asked], is_far=False).values():
        raise error


def _experiment(words: Mapping[str, str]) -> str:
    return words.get("tracking.experiment", TrackingConfig().experiment)


def _described(reader: Reader, run: StoredRun, job: Job, scratch: Path) -> Described:
    row = as_row(read_json(reader, run, "report.json"))
    memory_bytes = {**_memory(read_json(reader, run, "ledger.json"), run.metrics), **bytes_to_run(job)}
    return Described(row=row, memory_bytes=memory_bytes, picture=stored_picture(reader, run, scratch))


def _memory(ledger: Mapping[str, Any], metrics: Mapping[str, float]) -> dict[str, int]:
    """What was planned of the weights, and what running took on a GPU, where that is known."""
    rows = [dict(zip(ledger.get("columns", ()), values, strict=False)) for values in ledger.get("data", ())]
    planned = next((r.get("planned_bytes") for r in rows if r.get("what") == "unexplained remainder"), None)
    needed = metrics.get(NEEDED_BYTES)
    return {
        **({"weights, as planned": int(planned)} if planned else {}),
        **({"to run the quantized components on a GPU": int(needed)} if needed else {}),
    }


def export_lines(words: Sequence[str]) -> list[str]:
    """Export what the words behind ``quantlab export`` say; what is told of it."""
    return export_run(parse_request(words)).lines()


def push_lines(words: Sequence[str]) -> list[str]:
    """Upload the folder that a run was exported to; the address of the commit.

    Raises TrackingError for a run that is not there, ConfigError for one without an export, or whose export is gone.
    """
    given = [word for word in words if "=" not in word]
    values = dict(word.split("=", 1) for word in words if "=" in word)
    if wrong := [key for key in values if key not in _PLACES]:
        raise ConfigError(f"{wrong[0]}: push takes {', '.join(_PLACES)} alone; leave it out")
    if len(given) != 2 or any(word.startswith("-") for word in given):
        raise ConfigError("push: a run and a repository are wanted; write quantlab push RUN_ID OWNER/NAME")
    tracked = TrackingConfig(uri=values.get("tracking.uri", TrackingConfig().uri))
    reader = open_reader(tracked, Path.cwd(), values.get("output_dir", "outputs"))
    run = finished_job(reader, given[0], "export", _experiment(values))
    folder = run.tags.get(EXPORT_PATH)
    if not folder or not Path(folder).is_dir():
        gone = f", and {folder} is gone" if folder else ""
        raise ConfigError(f"push {given[0]}: it was not exported{gone}; quantlab export {given[0]} DIR does that first")
    return [push(Path(folder), given[1], f"push {given[0]}")]
