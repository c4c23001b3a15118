"""``quantlab status [SWEEP]``: the jobs of a sweep, from the files in its folder and theirs; nothing is computed."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from quantlab.errors import ConfigError, nearest
from quantlab.report.terminal import Column, Sheet
from quantlab.running.attempts import ATTEMPT, LOG, ended_since_given, node_of, num_attempts, read
from quantlab.running.handing import JOBS
from quantlab.tracking.record import run_id_of
from quantlab.tracking.tags import HOST, KIND
from quantlab.tracking.values import process_is_alive, this_process

USAGE = "quantlab status [SWEEP] [output_dir=DIR] [--json] [--plain] [--wide]"
_QUEUED, _RUNNING, _LOST = "queued", "running", "lost"


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """Where one job is."""

    name: str
    state: str
    """``queued``, ``running``, ``finished``, ``failed``, or ``lost``: its process is gone and said nothing."""
    node: str = ""
    attempt: int = 0
    elapsed_s: float | None = None
    """Since the attempt began; of a job that is over, all that it took."""
    engine: str = ""
    job_id: str = ""
    log: str = ""


def status(words: Sequence[str]) -> list[JobStatus]:
    """The jobs of a sweep, named by its id, a part of its folder, or ``latest``; ConfigError where there is none such.

    A store need not be there, so that its address, which may be typed as for other commands, says nothing.
    """
    output_dir, wanted = Path("outputs"), "latest"
    for word in words:
        key, has_value, value = word.partition("=")
        if has_value and key == "output_dir":
            output_dir = Path(value).expanduser()
        elif has_value and key in ("tracking.uri", "tracking.experiment"):
            continue
        elif has_value and key == "sweep":
            wanted = value
        elif word.startswith("-") or has_value:
            raise ConfigError(f"{word}: no word of status{nearest(key, ['output_dir', 'sweep', '--json'])}; {USAGE}")
        else:
            wanted = word
    sweeps = [folder for folder in sorted((output_dir / "runs").glob("*")) if _is_sweep(folder)]
    named = [folder for folder in sweeps if wanted in ("latest", run_id_of(folder))]
    found = named or [folder for folder in sweeps if wanted in folder.name]
    if not found:
        runs = output_dir / "runs"
        if not sweeps:
            raise ConfigError(
                f"status: there is no sweep in {runs}; run one (quantlab -m ..., or recipe=NAME), or name "
                "another output_dir=..."
            )
        names = ", ".join(folder.name for folder in sweeps[-5:])
        raise ConfigError(f"status {wanted}: no sweep in {runs} is called so; there are {names}")
    return list(_jobs(found[-1]))


def data(jobs: Sequence[JobStatus]) -> list[dict[str, object]]:
    """For ``--json``."""
    return [asdict(job) for job in jobs]


def sheet(jobs: Sequence[JobStatus]) -> Sheet:
    """For the terminal, a line a job."""
    keep = {"job": 9, "state": 9, "node": 5, "attempt": 4, "elapsed s": 6, "log": 3}
    columns = [Column(title=title, is_text=title not in ("attempt", "elapsed s"), keep=k) for title, k in keep.items()]
    rows = [[job.name, job.state, job.node, str(job.attempt or ""), _seconds(job.elapsed_s), job.log] for job in jobs]
    return Sheet(columns=columns, rows=rows, caption=[])


def _seconds(elapsed_s: float | None) -> str:
    return "" if elapsed_s is None else f"{elapsed_s:.0f}"


def _is_sweep(folder: Path) -> bool:
    return read(folder, "run.json").get("tags", {}).get(KIND) == "sweep"


def _jobs(sweep: Path) -> Iterator[JobStatus]:
    """Those that were submitted, in order, those that ran in the sweep's own process, and those that it found."""
    submitted: dict[str, dict[str, str]] = {}
    if (sweep / JOBS).is_file():
        for line in (sweep / JOBS).read_text(encoding="utf-8").splitlines():
            one = json.loads(line)
            submitted[one["folder"]] = one
    record = read(sweep, "run.json").get("record")
    for folder in sorted(sweep.parent.glob("*")):
        run = read(folder, "run.json")
        if run.get("parent_record") == record and record and str(folder.absolute()) not in submitted:
            submitted[str(folder.absolute())] = {"name": run["name"], "folder": str(folder)}
    for one in submitted.values():
        yield _job(one, Path(one["folder"]))
    known = {one["name"] for one in submitted.values()}
    for row in read(sweep, "rows.json").get("rows", []):  # what another sweep had run
        if row["name"] not in known:
            yield JobStatus(name=row["name"], state=str(row["status"]).lower())


def _job(told: dict[str, str], folder: Path) -> JobStatus:
    run, attempt = read(folder, "run.json"), num_attempts(folder)
    state = ended_since_given(folder).lower() or (_QUEUED if not run and not attempt else _RUNNING)
    owner = read(folder, ATTEMPT) or run.get("tags", {})
    if state == _RUNNING and owner.get(HOST) == this_process()[HOST] and not _lives(owner, run):
        state = _LOST
    start = run.get("start_ms")
    end = run.get("end_ms") or (time.time_ns() // 1_000_000 if state == _RUNNING else None)
    return JobStatus(
        name=told["name"],
        state=state,
        node=node_of(folder) or str(run.get("tags", {}).get(HOST, "")),
        attempt=attempt or int(bool(run)),
        elapsed_s=(end - start) / 1000 if start and end else None,
        engine=told.get("engine", ""),
        job_id=told.get("id", ""),
        log=str(folder / LOG) if (folder / LOG).exists() else str(folder),
    )


def _lives(owner: dict[str, object], run: dict[str, object]) -> bool:
    tags = run.get("tags")
    return any(process_is_alive({k: str(v) for k, v in one.items()}) for one in (owner, tags) if isinstance(one, dict))
