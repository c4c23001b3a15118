"""The process of a job that was handed over: it reads the job from its folder, and writes to that folder alone."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.errors import QuantlabError, is_device_lost
from quantlab.modules.device import answers, collect_rarely
from quantlab.modules.precision import exact_arithmetic
from quantlab.planning.job import Job
from quantlab.planning.plan import plan
from quantlab.running.attempts import END, JOB, LOG, RESULT, RESUMED, begin, earlier_attempts, read, write
from quantlab.running.export_job import export_here
from quantlab.running.job import floor_rows, open_run, run_job
from quantlab.running.known import Known, known_of
from quantlab.running.observing import observe_reference
from quantlab.running.resume import content_key, earlier_report
from quantlab.running.workbench import Session, prepare_device, workbench
from quantlab.tracking.provenance import PACKAGE, code_digest, environment
from quantlab.tracking.tags import AFTER_LOST_DEVICE, ATTEMPT, EARLIER_ATTEMPTS, JOB_KEY
from quantlab.vocabulary.reports import MetricValue
from quantlab.vocabulary.schema import SearchConfig, SweepConfig

_GRACE_S = 10.0
_LOST: list[str] = []  # the job that left this process without its GPU
_SESSIONS: dict[str, Session] = {}  # of a worker that runs several jobs: they share the loaded model


def main(words: list[str]) -> int:
    """The process of the job whose folder is given, or (``queue FOLDER``) of one job of a queue after the other."""
    end_with_parent()
    collect_rarely()
    if words[0] != "queue":
        return _work(Path(words[0]))
    while not _LOST and (folder := _taken(Path(words[1]))) is not None:
        if begin(folder):
            write(folder, END, {"code": _work(folder)})
    return 0


def _work(folder: Path) -> int:
    try:
        return work(folder)
    except QuantlabError as error:
        print(f"quantlab: {error}", file=sys.stderr)
        return error.exit_code


def _taken(queue: Path) -> Path | None:
    """The folder of the first job of a queue that no other worker has taken; it is then this process's."""
    for file in sorted(queue.glob("*.job")):
        mine = file.with_suffix(f".{os.getpid()}")
        with contextlib.suppress(FileNotFoundError):
            file.rename(mine)
            return Path(json.loads(mine.read_text(encoding="utf-8"))["folder"])
    return None


def work(folder: Path) -> int:
    """Run the job that was handed over in ``folder``; 0 where it finished, 1 where it failed (its run says how)."""
    data = json.loads((folder / JOB).read_text(encoding="utf-8"))
    os.chdir(data["base_dir"])
    _check_code(data)
    job = _read_job(folder, data)
    output_dir = Path(data.get("output_dir") or job.config.output_dir).expanduser().absolute()
    known, floors = _of_reference(data)
    if known is not None and not data["key"] and _was_finished(job, known, folder, output_dir):
        return 0
    device = prepare_device(job.config)
    threads = data["num_threads"] or (known is not None and known.made["arithmetic"].get("threads"))
    if threads:
        import torch

        torch.set_num_threads(threads)
    session = _session(job, device, output_dir)
    session.parent_run_id, session.typed = data["parent_run_id"], data["typed"]
    session.where, session.compares_with = data["where"], known
    if data["parent_run_id"] and data["parent_record"]:
        session.store.know(data["parent_run_id"], data["parent_record"])
    if data["calibrations"] is not None:
        with exact_arithmetic(job.config.evaluation.deterministic):
            return observe_reference(session, job, folder, data["calibrations"])
    if data["export"] is not None:
        with exact_arithmetic(job.config.evaluation.deterministic):
            return export_here(session, job, folder, data["export"])
    try:
        with (
            exact_arithmetic(job.config.evaluation.deterministic),
            open_run(session, job.name, job, key=data["key"], folder=folder) as run,
        ):
            if data["after_lost_device"]:
                run.set_tags({AFTER_LOST_DEVICE: data["after_lost_device"]})
            if earlier := earlier_attempts(folder):
                run.set_tags({ATTEMPT: str(len(earlier) + 1), EARLIER_ATTEMPTS: json.dumps(earlier)})
            bench = workbench(session, job, run)
            if not data["key"]:
                run.set_tags({JOB_KEY: content_key(bench.known, job, bench.cache_dir)})
            if floors is None:
                floor_rows(session, bench, job)
            for row, values in (floors or {}).items():
                bench.floors[row] = {k: MetricValue(**v) for k, v in values.items()}
            run_job(session, bench, job, run)
    except Exception as error:  # noqa: BLE001  the run has it; this process has nothing else to do
        if is_device_lost(error) or not answers(device):
            _LOST.append(job.name)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _check_code(data: Mapping[str, Any]) -> None:
    """Raises QuantlabError where this process computes by other code than that by which the job is known."""
    if data.get("code") not in (None, code_digest()):
        raise QuantlabError(
            f"quantlab on {socket.gethostname()} ({PACKAGE}) is not the sweep's: its code differs, and so may its "
            "numbers; install the same there, or give the sweep again if it was changed here meanwhile"
        )


def _of_reference(data: Mapping[str, Any]) -> tuple[Known | None, Mapping[str, Any] | None]:
    """What the sweep's reference is, and its floors, as the sweep knew it, or as the reference's job wrote it since.

    Raises QuantlabError where that job failed.
    """
    known, floors = data["known"], data["floors"]
    if data["behind"]:
        behind = Path(data["behind"])
        if read(behind, "run.json").get("status") == "FAILED":
            raise QuantlabError(f"its reference failed: {read(behind, 'run.json')['error']}; its log is {behind / LOG}")
        told = read(behind, RESULT)
        known, floors = told.get("known"), told.get("floors")
    return (None if known is None else known_of(known)), floors


def _was_finished(job: Job, known: Known, folder: Path, output_dir: Path) -> bool:
    """Was a job finished before whose sweep could not know its key? Then it is over at once, and its folder says so."""
    session = _session(job, "", output_dir)
    key = content_key(known, job, session.output_dir / "cache")
    if earlier_report(session, known.protocol, job, key) is None:
        return False
    write(folder, "run.json", {"name": job.name, "status": "FINISHED", RESUMED: key})
    return True


def end_with_parent() -> None:
    """The parent holds the other end of stdin: its end, also by SIGKILL, ends this process and closes its run."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: it returns at the end of the other side
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_GRACE_S)
        os._exit(143)  # a library does not come back to the interpreter, which handles the signal

    threading.Thread(target=watch, daemon=True).start()


def _session(job: Job, device: str, output_dir: Path) -> Session:
    key = f"{output_dir} {device} {job.config.tracking}"
    if key not in _SESSIONS:
        _SESSIONS[key] = Session(
            store=tracking.no_store(job.config.tracking, Path.cwd()),  # the sweep's process alone writes to it
            device=device,
            output_dir=output_dir,
            advance=lambda what, done, total, note="": None,
            environment=environment(),
            keeps_model=False,
        )
    return _SESSIONS[key]


def _read_job(folder: Path, data: Mapping[str, Any]) -> Job:
    recipe = folder / "recipe.yaml"
    recipe.write_text(data["recipe"], encoding="utf-8")
    (job,) = plan([f"recipe={recipe}"], is_own=True).jobs
    sweep = SweepConfig(**{**data["sweep"], "search": SearchConfig(**data["sweep"]["search"])})
    config = replace(job.config, recipe=data["recipe_name"], sweep=sweep)
    return replace(
        job,
        name=data["name"],
        config=config,
        overrides=tuple(data["overrides"]),
        batch_size=data["batch_size"],
        plain_attention=data["plain_attention"],
    )
