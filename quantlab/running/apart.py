"""A sweep's job in a process of its own: handed over as a file in its run's folder, watched, and never lost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.errors import QuantlabError, is_device_lost
from quantlab.modules.device import answers
from quantlab.modules.precision import exact_arithmetic
from quantlab.planning.job import Job
from quantlab.planning.plan import plan
from quantlab.running.job import floor_rows, open_run, run_job
from quantlab.running.resume import content_key
from quantlab.running.rows import failed_row, finished_row
from quantlab.running.workbench import Session, prepare_device, run_folder, workbench
from quantlab.tracking.provenance import environment
from quantlab.tracking.tags import AFTER_LOST_DEVICE, JOB_KEY
from quantlab.vocabulary.reports import MetricValue, RunReport
from quantlab.vocabulary.schema import SearchConfig, SweepConfig

_JOB, _END, _LOG = "job.json", "exit.json", "worker.log"
_GRACE_S = 10.0
Floors = Mapping[str, Mapping[str, MetricValue]]
_MEANING = {
    "SIGSEGV": "a segmentation fault in a library",
    "SIGABRT": "a library gave up",
    "SIGKILL": "killed from outside, as the system does when memory runs out",
    "SIGILL": "an instruction that this processor does not have",
}


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A job that was handed over, as the sweep remembers it."""

    job: Job
    key: str
    protocol: str
    folder: Path
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
    (folder / _JOB).write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    return Handed(job=job, key=key, protocol=protocol, folder=folder, after=session.lost_device)


# -- whoever starts the process


def run_apart(folder: Path, timeout_s: float | None, cuda_device: str | None = None) -> None:
    """Run the job of ``folder`` in a process of its own, and note in ``exit.json`` how that process ended.

    Its output goes to ``worker.log``. It is killed after ``timeout_s``, and ends when this process does.
    ``cuda_device`` is the only device that it sees; None: all.
    """
    env = {**os.environ, "PYTHONPATH": python_path(), **({"CUDA_VISIBLE_DEVICES": cuda_device} if cuda_device else {})}
    code = "import sys; from quantlab.running.apart import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-X", "faulthandler", "-c", code, str(folder)]
    timed_out = False
    with (
        (folder / _LOG).open("wb") as log,
        subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
    end = {"code": process.returncode, "timed_out": timed_out, "timeout_s": timeout_s}
    (folder / _END).write_text(json.dumps(end), encoding="utf-8")


def python_path() -> str:
    """``PYTHONPATH`` by which another process finds this quantlab, also in a checkout that is not installed."""
    return os.pathsep.join(dict.fromkeys(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])))


def has_ended(folder: Path) -> str:
    """``FINISHED`` or ``FAILED`` where the job of ``folder`` is over, else an empty text."""
    with contextlib.suppress(OSError, ValueError):
        status = json.loads((folder / "run.json").read_text(encoding="utf-8"))["status"]
        if status != "RUNNING":
            return str(status)
    return "FAILED" if (folder / _END).exists() else ""


def collect(session: Session, handed: Handed) -> RunReport:
    """The row of a job that was handed over and is over; a run that its process left open is ended as failed."""
    error = _ending(handed.folder)
    run = tracking.end_lost_run(session.store, handed.folder, error, _LOG)
    if not run:  # the process ended before it could begin its run
        with open_run(session, handed.job.name, handed.job, key=handed.key, folder=handed.folder) as begun:
            begun.finish("FAILED", error, "start")
        run = tracking.end_lost_run(session.store, handed.folder, error)
    if run["status"] == "FINISHED":
        stored = json.loads((handed.folder / "report.json").read_text(encoding="utf-8"))
        row = finished_row(stored, run["run_id"])
    else:
        row = failed_row(handed.job, handed.protocol, run["error"], run["stage"], run["run_id"], run["metrics"])
    if not handed.after:
        return row
    return replace(row, params={**row.params, "process": f"its own, as {handed.after} had lost the sweep's GPU"})


def _ending(folder: Path) -> str:
    """How the process of a job ended, for the user."""
    try:
        end = json.loads((folder / _END).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "the job's process never reported back (its machine or its launcher ended)"
    if end["timed_out"]:
        return f"timeout: longer than sweep.timeout_s={end['timeout_s']:g}"
    if end["code"] < 0:
        name = signal.Signals(-end["code"]).name
        return f"{name}: the job's process ended ({_MEANING.get(name, 'by a signal')}); see worker.log in {folder.name}"
    lines = [line.strip() for line in (folder / _LOG).read_text(errors="replace").splitlines() if line.strip()]
    return f"exit code {end['code']}: {lines[-1][:300] if lines else 'the process said nothing'}"


# -- the process itself

_LOST: list[str] = []  # the job that left this process without its GPU
_SESSIONS: dict[str, Session] = {}  # of a worker that runs several jobs: they share the loaded model


def work(folder: Path) -> int:
    """Run the job that was handed over in ``folder``; 0 where it finished, 1 where it failed (its run says how)."""
    data = json.loads((folder / _JOB).read_text(encoding="utf-8"))
    os.chdir(data["base_dir"])
    job = _read_job(folder, data)
    device = prepare_device(job.config)
    import torch

    torch.set_num_threads(data["num_threads"])
    session = _session(job, device)
    session.parent_run_id = data["parent_run_id"]
    if data["parent_run_id"] and data["parent_record"]:
        session.store.know(data["parent_run_id"], data["parent_record"])
    try:
        with (
            exact_arithmetic(job.config.evaluation.deterministic),
            open_run(session, job.name, job, key=data["key"], folder=folder) as run,
        ):
            if data["after_lost_device"]:
                run.set_tags({AFTER_LOST_DEVICE: data["after_lost_device"]})
            bench = workbench(session, job.config, run)
            if not data["key"]:
                run.set_tags({JOB_KEY: content_key(bench, job)})
            if data["floors"] is None:
                floor_rows(session, bench, job)
            for row, values in (data["floors"] or {}).items():
                bench.floors[row] = {k: MetricValue(**v) for k, v in values.items()}
            run_job(session, bench, job, run)
    except Exception as error:  # noqa: BLE001  the run has it; this process has nothing else to do
        if is_device_lost(error) or not answers(device):
            _LOST.append(job.name)
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def has_lost_device() -> bool:
    """Has a job that ran in this process left it without its GPU?"""
    return bool(_LOST)


def _session(job: Job, device: str) -> Session:
    output_dir = Path(job.config.output_dir).expanduser().absolute()
    key = f"{output_dir} {job.config.tracking}"
    if key not in _SESSIONS:
        _SESSIONS[key] = Session(
            # The sweep has reached it: where it is gone by now, the job is tracked in its folder and sent later.
            store=tracking.open_store(replace(job.config.tracking, required=False), Path.cwd()),
            device=device,
            output_dir=output_dir,
            advance=lambda what, done, total, note="": None,
            environment=environment(),
        )
    return _SESSIONS[key]


def _read_job(folder: Path, data: Mapping[str, Any]) -> Job:
    recipe = folder / "recipe.yaml"
    recipe.write_text(data["recipe"], encoding="utf-8")
    (job,) = plan([f"recipe={recipe}"]).jobs
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


def _end_with_parent() -> None:
    """The parent holds the other end of stdin: its end, also by SIGKILL, ends this process and closes its run."""

    def watch() -> None:
        os.read(0, 1)  # nothing is ever written: it returns at the end of the other side
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(_GRACE_S)
        os._exit(143)  # a library does not come back to the interpreter, which handles the signal

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> int:
    """The process that :func:`run_apart` starts, with the folder of its job."""
    _end_with_parent()
    try:
        return work(Path(argv[0]))
    except QuantlabError as error:
        print(f"quantlab: {error}", file=sys.stderr)
        return error.exit_code
