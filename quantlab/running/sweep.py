"""The story of a request: open the store, then run its jobs, one or a sweep of them."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.backends.table import loggers
from quantlab.errors import DiskFull, QuantlabError, TrackingError, in_words, is_disk_full
from quantlab.modules.precision import exact_arithmetic, own_modes
from quantlab.planning.job import Job, Merged, Plan
from quantlab.planning.ready import check_room, no_folder
from quantlab.planning.space import objectives_of
from quantlab.planning.trust import require_trust
from quantlab.progress import Advance, headline_of, progress_bars, say, under_way
from quantlab.quiet import quiet_libraries
from quantlab.running.apart import Handed, hand_over
from quantlab.running.claims import Claims, wait_for
from quantlab.running.engines.table import is_far
from quantlab.running.export_job import export_far
from quantlab.running.far import JOBS_STAGE, references, run_far
from quantlab.running.finished import answered_before, environment_of, known_before, rows_before
from quantlab.running.handing import handed, run_handed, runs_apart
from quantlab.running.job import floor_rows, open_run, run_job, run_row
from quantlab.running.known import Known, bench_key
from quantlab.running.once import Once
from quantlab.running.overview import log_overview
from quantlab.running.refusals import check_request, runs_elsewhere
from quantlab.running.resume import content_key, earlier_report
from quantlab.running.rows import skipped_row
from quantlab.running.scheduler import Counts
from quantlab.running.search import Search, run_search
from quantlab.running.winner import export_chosen
from quantlab.running.workbench import Session, Workbench, has_bench, let_go_of_bench, prepare_device, workbench
from quantlab.tracking.connect import SQLITE, resolved_uri
from quantlab.tracking.provenance import environment
from quantlab.tracking.results import log_beside, report_data
from quantlab.tracking.tags import FAILED_JOBS, JOB_KEY, SEARCH_FRONT, STAGE
from quantlab.vocabulary.amounts import MIB
from quantlab.vocabulary.numbers import FLOORS, REFERENCE
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import ExperimentConfig

_MAX_TOLD = 8
PLACES = ("runs", "cache", "cache/reference", "cache/calibration", "cache/models")
"""Below ``output_dir``, what a run writes to."""
ARTIFACTS = "mlartifacts"


def run_plan(plan: Plan, quiet: bool = False, trust: bool = False) -> list[RunReport]:
    """Run every job of a plan; one report a row, floors and reference first, in a sweep's order.

    In a sweep a failing job is a FAILED row and the others go on; in a single run its error is raised.
    Errors of what all jobs share (model, data, store) are raised in both. What a recipe that does not come with
    quantlab decides (:mod:`quantlab.planning.trust`) is refused unless the user agreed to it or ``trust`` says so.
    """
    require_trust(plan, trust)
    first = plan.jobs[0].config
    with progress_bars(quiet):  # files are read before there is a session, and large ones take long
        check_request(plan)
        if not plan.is_sweep and first.launcher.engine != "serial":
            say(f"launcher={first.launcher.engine}: a single job is run by this process", "launcher")
        known = _known_before(plan)
        if known is not None and (rows := answered_before(plan, known)) is not None:
            _say_merged(plan)
            return rows
        computes = known is None and not runs_elsewhere(plan)
        with open_session(first, quiet, computes=computes) as session:
            session.known_before, session.typed = known, plan.typed
            session.expect(plan.jobs)
            return _run_sweep(session, plan) if plan.is_sweep else _run_single(session, plan.jobs[0])


def _known_before(plan: Plan) -> dict[str, Known] | None:
    """What is known of a sweep's references before anything is loaded; None where that is of no use."""
    config = plan.jobs[0].config
    if not plan.is_sweep or config.sweep.force or config.sweep.search.num_trials or is_far(config.launcher):
        return None
    return known_before(plan.jobs, Path(config.output_dir).expanduser().absolute() / "cache")


@contextlib.contextmanager
def open_session(config: ExperimentConfig, quiet: bool = False, computes: bool = True) -> Iterator[Session]:
    """A request under way: device, store and bars are ready, and what earlier processes left is closed or pushed.

    Without ``computes`` no device is looked for, and torch is not imported: others run the jobs.
    """
    with _room_in(config.output_dir), progress_bars(quiet) as advance, contextlib.ExitStack() as modes:
        under_way("importing libraries")
        device = _prepared(modes, config) if computes else ""
        output_dir = _usable_folder(config.output_dir, _keeps_artifacts(config))
        _remove_parts(output_dir / "cache")
        with _ready(config, output_dir, device, advance) as session:
            yield session


def _prepared(stack: contextlib.ExitStack, config: ExperimentConfig) -> str:
    """The device; until ``stack`` is closed torch is as everybody's runs have it, then as its caller had."""
    quiet_libraries(loggers())
    stack.enter_context(own_modes())
    stack.enter_context(exact_arithmetic(config.evaluation.deterministic))
    return prepare_device(config)


@contextlib.contextmanager
def _computing(session: Session, config: ExperimentConfig) -> Iterator[None]:
    """While open this process computes, whatever it was opened for."""
    if session.device:
        yield
        return
    with contextlib.ExitStack() as modes:
        session.device = _prepared(modes, config)
        session.environment = environment(Path(__file__).parents[2])
        yield


@contextlib.contextmanager
def _room_in(output_dir: str) -> Iterator[None]:
    """A disk without room, wherever it was noticed, as one message; what was written before is kept."""
    try:
        yield
    except Exception as error:
        if not is_disk_full(error) or (isinstance(error, TrackingError) and str(error).startswith("tracking.")):
            raise  # the store's disk may be another one, and its message says which
        raise DiskFull(
            f"output_dir={output_dir}: the disk is full ({_free(Path(output_dir))} MiB left there, "
            f"{_free(Path(tempfile.gettempdir()))} MiB for temporary files in {tempfile.gettempdir()}); make room, or "
            "set output_dir=<a folder on another disk> for what comes next, and give the same command again: what has "
            "finished is kept"
        ) from error


def _remove_parts(cache: Path) -> None:
    """Delete the unfinished files of processes that are gone; a full disk or a kill leaves them."""
    import psutil

    for part in cache.glob("reference/*.part"):
        pid = part.stem.rpartition(".")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            part.unlink(missing_ok=True)


def _free(folder: Path) -> str:
    try:
        return str(shutil.disk_usage(folder.expanduser()).free // MIB)
    except OSError:
        return "?"


@contextlib.contextmanager
def _ready(config: ExperimentConfig, output_dir: Path, device: str, advance: Advance) -> Iterator[Session]:
    under_way("opening the store")
    store = tracking.open_store(config.tracking, Path.cwd())
    runs_dir = output_dir / "runs"
    tracking.close_orphans(store, runs_dir)
    tracking.push_pending(store, runs_dir)
    gc.freeze()  # a million objects of libraries, which no stage's collection need look at
    try:
        session = Session(
            store=store,
            device=device,
            output_dir=output_dir,
            advance=advance,
            environment=environment(Path(__file__).parents[2], has_hardware=bool(device)),
            claims=Claims(output_dir / "claims"),
        )
        try:
            yield session
        finally:
            session.claims.close(keep=session.leaves)
    finally:
        gc.unfreeze()
    if store.was_lost and store.is_reached:  # it may answer by now
        store.wake()
        tracking.push_pending(store, runs_dir)


def _usable_folder(output_dir: str, is_beside: bool = False) -> Path:
    """The folder, with each place below it that is written to: found before any work, with the path and the reason.

    ``is_beside``: a store is in it, whose artifacts are then too. What is not there yet is made by who writes to it.
    """
    folder = Path(output_dir).expanduser().absolute()
    for name in (*PLACES, ARTIFACTS) if is_beside else PLACES:
        place = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            there = next(one for one in (place, *place.parents) if os.path.lexists(one))
            with tempfile.TemporaryFile(dir=there) as file:
                file.write(b"x" * 4096)
        except OSError as error:
            if is_disk_full(error):
                raise
            why = error.strerror or str(error)
            raise no_folder(output_dir, place, why) from error
    check_room(output_dir, folder)
    return folder


def _keeps_artifacts(config: ExperimentConfig) -> bool:
    """Is the store a database in the folder of the results?"""
    uri, output_dir = resolved_uri(config.tracking.uri, Path.cwd()), Path(config.output_dir).expanduser().absolute()
    return uri.startswith(SQLITE) and Path(uri.removeprefix(SQLITE)).parent == output_dir


def _run_single(session: Session, job: Job) -> list[RunReport]:
    with told_apart(job.name), open_run(session, job.name, job) as run:
        bench = workbench(session, job, run)
        run.stage = "floors"
        rows = floor_rows(session, bench, job)
        run.set_tags({JOB_KEY: content_key(bench.known, job, bench.cache_dir)})
        report = run_job(session, bench, job, run)
        log_beside(run, rows)
    return [*rows, report]


@contextlib.contextmanager
def told_apart(name: str) -> Iterator[None]:
    """A library's failure as one message of ours; its traceback is in the run's folder and in ``__cause__``."""
    try:
        yield
    except QuantlabError:
        raise
    except Exception as error:
        raise QuantlabError(
            f"{name}: failed with {in_words(error)}; the run's failure.txt says where, and "
            "QUANTLAB_TRACEBACK=1 shows it here"
        ) from error


def _run_sweep(session: Session, plan: Plan) -> list[RunReport]:
    began = time.perf_counter()
    with told_apart(plan.name), open_run(session, plan.name, plan.jobs[0], kind="sweep") as parent:
        session.parent_folder = parent.record.folder
        session.parent_run_id, session.parent_record = parent.run_id, parent.record.summary["record"]
        if plan.invalid:
            num = len(plan.invalid) + len(plan.jobs)
            are = "is" if len(plan.invalid) == 1 else "are"
            say(f"skipped: {len(plan.invalid)} of {num} combinations {are} impossible; sweep.dry_run=true lists them")
        _say_merged(plan)
        config, study = plan.jobs[0].config, None
        if config.sweep.search.num_trials:
            reports, study = _search(session, plan, parent)
        else:
            reports = _all_rows(session, plan, parent)
        protocol = reports[0].protocol if reports else ""
        if study is None:
            reports += [skipped_row(combination, protocol, why) for combination, why in plan.invalid]
        else:
            parent.set_tags({SEARCH_FRONT: ", ".join(study["front"])})
        parent.log_json(
            {
                **({"search": study} if study else {}),
                "rows": [report_data(r) for r in reports],
                "skipped": [{"combination": c, "reason": r} for c, r in plan.invalid],
                "environment": session.environment,
                "seconds": time.perf_counter() - began,
            },
            "rows.json",
        )
        failed = [r.name for r in reports if r.status == "FAILED"]
        if failed:
            parent.set_tags({FAILED_JOBS: ", ".join(failed)})
        log_overview(session.store, parent, plan, reports)
        if plan.export.path is not None:
            parent.stage = "export"
            if is_far(config.launcher):
                export_far(session, plan, reports)
            else:
                with _computing(session, config):
                    export_chosen(session, plan, reports)
    return reports


def _all_rows(session: Session, plan: Plan, parent: Any) -> list[RunReport]:
    """Those of a grid or of candidates: by an engine's nodes, from earlier sweeps, or run here."""
    config = plan.jobs[0].config
    if is_far(config.launcher):
        return run_far(session, plan.jobs, parent)
    if session.known_before is not None:
        found = rows_before(session, plan.jobs, session.known_before)
        if found is not None:
            session.environment = environment_of(session, found)
            return found
    with _computing(session, config):
        return _finished(session, _rows(session, plan, parent), config)


def _say_merged(plan: Plan) -> None:
    if plan.merged:
        say(f"run once, as these are one scheme in several words: {_spelled(plan.merged)}")


def _spelled(merged: Sequence[Merged]) -> str:
    shown = "; ".join(f"{' = '.join(one.spellings)} ({one.name})" for one in merged[:_MAX_TOLD])
    return f"{shown}; and {len(merged) - _MAX_TOLD} more, see sweep.dry_run=true" if len(merged) > _MAX_TOLD else shown


def _rows(session: Session, plan: Plan, parent: Any) -> list[RunReport | Handed]:
    """Floors and jobs in order: found in an earlier sweep, run now, or handed over to be run."""
    rows: list[RunReport | Handed] = []
    known: set[str] = set()
    once = Once()
    num_failed = 0
    for i, job in enumerate(plan.jobs):
        if not any(isinstance(row, Handed) for row in rows):
            session.advance("jobs", i, len(plan.jobs), f"{num_failed} failed" if i else "")
        made = _rows_of(session, job, parent, known, once)
        once.tell()
        if not made:
            continue
        num_failed += isinstance(made[-1], RunReport) and made[-1].status == "FAILED"
        rows += made
    return rows


def _rows_of(session: Session, job: Job, parent: Any, known: set[str], once: Once) -> list[RunReport | Handed]:
    """The row of a job, unless it has one, behind the floors of a workbench that is not ``known`` yet.

    Nothing holds the workbench when this returns: the next job may need the room for another model.
    """
    if session.lost_device and not has_bench(session, job.config):
        return [hand_over(session, job, "", session.bench.model.protocol if session.bench else "", None)]
    bench = workbench(session, job, parent)
    parent.set_tags({STAGE: JOBS_STAGE})
    rows: list[RunReport | Handed] = []
    if bench.key not in known:
        known.add(bench.key)
        rows += [_row(session, bench, floor, apart=False) for floor in bench.known.floor_jobs(job.config)]
    if once.is_again(bench.known, job):
        return rows
    return [*rows, _row(session, bench, job, apart=runs_apart(job, session.device))]


def _search(session: Session, plan: Plan, parent: Any) -> tuple[list[RunReport], dict[str, Any]]:
    """Floors, then the points that the search chose; and the study as JSON data. Its jobs run where a sweep's would."""
    first = plan.jobs[0].config
    groups = references(session, plan.jobs, parent) if is_far(first.launcher) else []
    group_of = {job.name: (group, place) for group in groups for place, job in group.jobs.items()}
    protocol = groups[0].protocol if groups else workbench(session, plan.jobs[0], parent).model.protocol
    objectives, once, space = objectives_of(first.sweep.search, protocol), Once(), list[Job]()
    rows: list[RunReport | Handed] = []
    floors: dict[str, Any] = {}  # of each workbench, also after another one has taken its place
    keys, known = {}, {}

    def known_here(job: Job) -> tuple[Known, str]:
        bench = workbench(session, job, parent)
        if bench.key not in floors:
            rows.extend(_row(session, bench, floor, apart=False) for floor in bench.known.floor_jobs(job.config))
            floors[bench.key] = bench.floors
        return bench.known, bench.key

    def known_far(job: Job) -> tuple[Known, str]:
        group, _ = group_of[job.name]
        assert group.known is not None
        key = bench_key(job.config)
        if key not in floors:
            rows.extend(group.floor_rows)
            floors[key] = group.floors
        return group.known, key

    def look_up(job: Job) -> None:  # a call of its own: nothing holds the workbench when the next one is loaded
        known_of = known_far if groups else known_here
        known_one, shared = known_of(job)
        if once.is_again(known_one, job):
            return
        space.append(job)
        keys[job.name] = (content_key(known_one, job, session.output_dir / "cache"), shared)
        if earlier := earlier_report(session, protocol, job, keys[job.name][0]):
            known[job.name] = earlier

    def run_point(job: Job, key: str, shared: str) -> RunReport | Handed:
        if groups:
            group, place = group_of[job.name]
            return group.hand_over(session, place, key)
        if session.lost_device or runs_apart(job, session.device):
            return handed(session, job, key, protocol, floors[shared])
        bench = workbench(session, job, parent)
        parent.set_tags({STAGE: JOBS_STAGE})
        bench.floors.update(floors[shared])
        return run_row(session, bench, job, key)

    for job in plan.jobs:
        look_up(job)
    once.tell()
    search = Search(first.sweep.search, objectives, space)
    if search.config.num_trials > len(space):
        say(
            f"sweep.search.num_trials={search.config.num_trials}: the grid has {len(space)} possible jobs, "
            "so all of them are run"
        )

    def measure(jobs: Sequence[Job]) -> list[RunReport]:
        return _finished(session, [run_point(job, *keys[job.name]) for job in jobs], first, "jobs at once")

    def on_trial(done: int, total: int, failed: int) -> None:
        session.advance("jobs", done, total, f"{failed} failed" if done else "")

    batch_size = 1 if first.launcher.engine == "serial" else first.launcher.num_workers
    run_search(search, known, measure, batch_size, on_trial)
    return [*_finished(session, rows, first), *search.reports], search.data()


def _row(session: Session, bench: Workbench, job: Job, apart: bool) -> RunReport | Handed:
    """One job of a sweep; its failure is a row, never the end of the others."""
    key = content_key(bench.known, job, bench.cache_dir)
    protocol, is_floor = bench.model.protocol, job.name in (REFERENCE, *FLOORS)
    while True:
        earlier = earlier_report(session, protocol, job, key)
        if earlier is not None:
            bench.keep_floor(earlier)
            return earlier
        if apart or session.lost_device or session.claims.take(key, job.name) is None:
            break
        if not is_floor:  # others first: by then its row may be there
            return handed(session, job, key, protocol, bench.floors)
        wait_for(session.claims, [key], 60.0)  # the rows after it need its numbers
    if apart or session.lost_device:
        wanted = {floor.name for floor in bench.known.floor_jobs(job.config)} & set(FLOORS)
        is_cut = bool(session.lost_device) and not wanted <= set(
            bench.floors
        )  # the GPU was lost before they were known
        return handed(session, job, key, protocol, None if is_cut else bench.floors)
    try:
        return run_row(session, bench, job, key)
    finally:
        session.claims.release(key)


def _finished(
    session: Session, rows: Sequence[RunReport | Handed], config: ExperimentConfig, what: str = "jobs"
) -> list[RunReport]:
    """Run what was handed over, without this process keeping the model, and put its rows in their places."""
    jobs = [row for row in rows if isinstance(row, Handed)]
    found: list[RunReport] = []
    if jobs:
        let_go_of_bench(session)

        def progress(counts: Counts) -> None:
            session.advance(what, counts.ended, len(jobs), f"{counts.running} running, {counts.failed} failed")

        found = run_handed(session, jobs, config, progress)
    arrived = iter(found)
    reports = [next(arrived) if isinstance(row, Handed) else row for row in rows]
    for report, row in zip(reports, rows, strict=True):
        if isinstance(row, Handed) and report.status == "FAILED":
            say(f"{report.name} at {report.failed_stage}: {headline_of(report.error, 500)}", "failed")
    return reports
