"""The candidate of a job that was measured, made once more and exported: a run's, or the one that a sweep chose.

A run keeps no quantized weights. Its scheme is deterministic, so the candidate is made again from its recipe; what the
tensors show is compared with what the run recorded before anything is written.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.datasets.table import DATASETS
from quantlab.errors import ConfigError, ModelError, NotQuantized, TrackingError
from quantlab.exporting.card import Described
from quantlab.exporting.whole import Exported, export
from quantlab.metrics import METRICS
from quantlab.modules.holders import READ
from quantlab.planning.job import Job, Plan
from quantlab.planning.picking import conditions
from quantlab.progress import say
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.compare import answers, compare
from quantlab.report.reading import Reader, StoredRun, open_reader, read_json
from quantlab.report.selection import ComparisonRequest, is_candidate, is_quantized, select
from quantlab.report.verdicts import IN_FLOOR
from quantlab.running.forecast import bytes_to_run
from quantlab.running.job import make, planned_bytes
from quantlab.running.placement import hollow
from quantlab.running.workbench import Session, Workbench, has_bench, in_stage, let_go_of_bench, workbench
from quantlab.tracking.connect import NO_STORE
from quantlab.tracking.pictures import SAMPLE_GRID, kept_picture
from quantlab.tracking.results import Row, report_data
from quantlab.tracking.tags import WEIGHTS_SHA256
from quantlab.vocabulary.reports import QuantizationReport, RunReport
from quantlab.vocabulary.schema import ExperimentConfig

_SAME = ("status", "dtype", "group_size", "weight_bytes", "scale_bytes")
"""What a layer's row must have of the run's own."""
_REL_TOLERANCE = 1e-4
"""Errors of rounding may differ in their last digits: sums of other threads."""


def made_and_exported(
    session: Session,
    bench: Workbench,
    job: Job,
    target: str,
    described: Described,
    run: StoredRun | None,
    recorded: Mapping[str, Any],
) -> Exported:
    if run is not None and (digest := run.tags.get(WEIGHTS_SHA256)) not in (None, bench.model.weights_sha256):
        raise ModelError(
            f"model.path: these weights are not those that run {run.run_id} measured (digest "
            f"{bench.model.weights_sha256[:16]}, the run's {str(digest)[:16]}); give model.path=... of those"
        )
    made = make(session, bench, job, None)
    if recorded and made.quantization is not None:
        check_same(recorded, made.quantization)
    return export(target, job, bench.model, made.model, made.quantization, bench.inputs, described, "export", True)


def bench_for(session: Session, job: Job, recorded: Mapping[str, Any]) -> Workbench:
    """What a job's candidate is made with once more: without the values of the unquantized weights, where its layers
    can be read one by one from the model's files, and else the whole workbench.

    Whole, because it runs: the model that a scheme is calibrated on. Because nothing else has what is needed: one that
    is not read from safetensors as it stands in them, and a run without its table of layers. And where the run says so
    (``memory.placement``).
    """
    config = job.config
    is_open = config.memory.placement in ("auto", "streamed", "alone")
    if job.needs_data or not is_open or not recorded or has_bench(session, config):
        return workbench(session, job, None)
    cache = session.output_dir / "cache"
    try:
        with in_stage(session, None, "load"):
            model = hollow(config, session.device, cache, session.advance)
    except (ConfigError, ModelError) as error:
        if config.memory.placement != "auto":
            raise
        say(f"{job.name}: made beside the whole unquantized model ({error})")
        return workbench(session, job, None)
    let_go_of_bench(session)
    inputs = DATASETS[config.dataset.name].load(config.dataset, config.evaluation, model)
    return Workbench(
        key="",
        model=model,
        inputs=inputs,
        reference={},
        reference_key="",
        fingerprint=None,
        reads=_reads(recorded),
        cache_dir=cache,
    )


def _reads(recorded: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """Component -> its layers whose weights it reads, as the run found out by running the model."""
    found: dict[str, tuple[str, ...]] = {}
    for row in _rows(recorded):
        if READ in row.get("reason", ""):
            found[row["component"]] = (*found.get(row["component"], ()), row["name"])
    return found


def _rows(recorded: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of a run's ``layers.json``."""
    columns = list(recorded.get("columns", ()))
    return [dict(zip(columns, values, strict=True)) for values in recorded.get("data", ())]


def check_same(recorded: Mapping[str, Any], layers: QuantizationReport) -> None:
    """NotQuantized where a layer is something else than the run's ``layers.json`` says."""
    was = {(row["component"], row["name"]): row for row in _rows(recorded) if {"component", "name"} <= set(row)}
    for row in layers.layers:
        old = was.get((row.component, row.name))
        if old is None:
            raise NotQuantized(f"export: the run had no layer {row.name} of {row.component}; run the job again")
        other = [name for name in _SAME if name in old and old[name] != getattr(row, name)]
        if other:
            raise NotQuantized(
                f"export: {row.name} of {row.component} has {other[0]} {getattr(row, other[0])} now and had "
                f"{old[other[0]]} in the run (other versions, or another machine); run the job again, and export that"
            )
        before, now = old.get("weight_rel_error"), row.weight_rel_error
        if (
            before is not None
            and now is not None
            and not math.isclose(now, before, rel_tol=_REL_TOLERANCE, abs_tol=1e-12)
        ):
            raise NotQuantized(
                f"export: {row.name} of {row.component} rounds its weights otherwise than in the run (relative error "
                f"{now:.6g}, it was {before:.6g}); run the job again, and export that"
            )


# -- which one a sweep exports


def export_chosen(session: Session, plan: Plan, reports: Sequence[RunReport]) -> Exported | None:
    """Export the scheme that ``export.winner`` or ``export.pick`` chooses among a sweep's rows; None where none is.

    Where nothing is chosen it is told why: the sweep itself has done what it should.
    """
    found = chosen(session, plan, reports)
    if found is None:
        return None
    job, report = found
    with tempfile.TemporaryDirectory(prefix="quantlab-export-") as scratch:
        recorded, picture = recorded_of(job.config, report, Path(scratch))
        row, planned = report_data(report), planned_bytes(report)
        exported = export_row(session, job, str(plan.export.path), row, planned, recorded, picture)
    if report.run_id:
        tracking.annotate(session.store, report.run_id, exported.metrics, exported.tags)
    say(f"{report.name}: {'; '.join(exported.lines())}")
    return exported


def chosen(session: Session, plan: Plan, reports: Sequence[RunReport]) -> tuple[Job, RunReport] | None:
    """What a sweep exports, by its rows; None where it is nothing, which is told with the reason."""
    target = plan.export.path
    if target is None:
        return None
    found, why = _picked(plan, reports) if plan.export.pick else _winner(session, plan.jobs[0].config, reports)
    job = next((job for job in plan.jobs if found is not None and job.name == found.name), None)
    if found is None or job is None:
        say(f"export.path={target}: nothing is exported: {why}", "warning")
        return None
    return job, found


def export_row(
    session: Session,
    job: Job,
    target: str,
    row: Row,
    planned: Mapping[str, int],
    recorded: Mapping[str, Any],
    picture: Path | None,
) -> Exported:
    """Make the candidate of a measured row once more, with what its run recorded, and export it.

    ``planned``: bytes that its weights take, in words, as :func:`quantlab.running.job.planned_bytes` has them.
    """
    bench = bench_for(session, job, recorded)
    described = Described(row=row, memory_bytes={**planned, **bytes_to_run(job)}, picture=picture)
    return made_and_exported(session, bench, job, target, described, None, recorded)


def _candidates(plan: Plan, reports: Sequence[RunReport]) -> list[RunReport]:
    """The finished rows of the plan's own jobs, the smallest first; of one size, the best by the headline metric."""
    names = {job.name for job in plan.jobs if job.schemes}
    done = [r for r in reports if r.name in names and r.status == "FINISHED"]

    def order(report: RunReport) -> tuple[float, float]:
        metrics, metric = report_data(report)["metrics"], PROTOCOLS[report.protocol].HEADLINE[0]
        loss = -1 if METRICS[metric].higher_is_better else 1
        return metrics.get("memory/weights_bytes", math.inf), loss * metrics.get(f"quality/{metric}", loss * math.inf)

    return sorted(done, key=order)


def _picked(plan: Plan, reports: Sequence[RunReport]) -> tuple[RunReport | None, str]:
    wanted = conditions(plan.export.pick)
    every = _candidates(plan, reports)
    for report in every:
        metrics = report_data(report)["metrics"]
        if all(one.holds(metrics) for one in wanted):
            return report, ""
    return None, f"none of the {len(every)} finished schemes has {plan.export.pick}"


def _winner(session: Session, config: ExperimentConfig, reports: Sequence[RunReport]) -> tuple[RunReport | None, str]:
    """The smallest that is surely inside the floor, by the comparison that ``quantlab compare`` shows."""
    settings = config.tracking
    if session.parent_run_id is None or (session.store.is_lost and settings.uri != NO_STORE):
        return None, "the store does not answer, and verdicts are made of what it has"
    request = ComparisonRequest(sweep=session.parent_run_id, tracking=settings)
    try:
        reader = open_reader(settings, Path.cwd(), config.output_dir)
        selection = select(request, reader)  # without casts: there is no file of those
        kept = (tuple(r for r in group if is_quantized(r) or not is_candidate(r)) for group in selection.groups)
        groups = compare(request, replace(selection, groups=tuple(kept)), reader)
    except TrackingError as error:
        return None, str(error)
    smallest = [(group, name) for group in groups for question, name in answers(group) if IN_FLOOR in question]
    if len(smallest) != 1:
        what = "several models were measured" if smallest else "no scheme is surely inside the floor"
        return (
            None,
            f"{what}; quantlab compare sweep={session.parent_run_id} shows them, export.pick chooses by numbers",
        )
    group, name = smallest[0]
    run_id = next(run.run_id for run in group.candidates if run.name == name)
    return next((r for r in reports if r.run_id == run_id), None), f"{name} is no row of this sweep"


def stored_picture(reader: Reader, run: StoredRun, scratch: Path) -> Path | None:
    """A run's images of the reference, the candidate and their difference, as a file in ``scratch``."""
    content = kept_picture(partial(reader.read_artifact, run), SAMPLE_GRID)
    if content is None:
        return None
    file = scratch / Path(SAMPLE_GRID).name
    file.write_bytes(content)
    return file


def recorded_of(config: ExperimentConfig, found: RunReport, scratch: Path) -> tuple[Mapping[str, Any], Path | None]:
    """The run's table of layers and its picture; nothing where they cannot be read."""
    try:
        reader = open_reader(config.tracking, Path.cwd(), config.output_dir)
        runs = reader.by_id([found.run_id]) if found.run_id else []
    except TrackingError:
        return {}, None
    return (read_json(reader, runs[0], "layers.json"), stored_picture(reader, runs[0], scratch)) if runs else ({}, None)
