"""Everything that one job leaves in its tracked run, and a report as JSON data."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict

from quantlab.metrics import METRICS
from quantlab.tracking.heat_map import HeatMap, draw_heat_map
from quantlab.tracking.pictures import (
    SAMPLE_ANIMATION,
    SAMPLE_ARRAYS,
    SAMPLE_GRID,
    animated_grid,
    contact_sheet,
    framed_grid,
    save_animation,
    write_samples,
)
from quantlab.tracking.provenance import Environment
from quantlab.tracking.run import Run
from quantlab.tracking.tags import CALIBRATION_SHA256, UNDEFINED, UNQUANTIZED
from quantlab.vocabulary.ledger import ledger
from quantlab.vocabulary.numbers import FLOOR_DEVICE, FLOORS, flat_metrics
from quantlab.vocabulary.reports import (
    CalibratedLayer,
    CalibrationReport,
    LayerReport,
    Measurements,
    RunReport,
)

IMAGE_KEY = "reference-quantized-difference"
"""The key in MLflow's image grid; its steps are the samples."""
MAX_IN_GRID = 4
BESIDE = "beside.json"
"""Of a single run: the rows of its reference and floors, which have no runs."""
TEXTS = "texts.json"
"""Of language models: continuations of prompts, and the tokens that changed most."""
ROWS = tuple(floor for floor in FLOORS if floor != FLOOR_DEVICE)
"""Floors that are rows of a sweep."""


class Measured(TypedDict):
    """What a table shows of a row."""

    name: str
    status: str
    metrics: Mapping[str, float]


class Row(Measured):
    """One row of a request (``report.json``): a report without arrays."""

    protocol: str
    error: str
    failed_stage: str
    run_id: str | None
    resumed: bool
    params: Mapping[str, object]
    unquantized: list[str]
    """A sentence for each component of which much stays unquantized."""
    undefined: Mapping[str, str]
    """Metrics that have no value on these samples, and why."""


class Skipped(TypedDict):
    """A combination that no backend offers."""

    combination: str
    reason: str


class SweepResults(TypedDict):
    """What a sweep writes at its end (``rows.json``)."""

    rows: list[Row]
    skipped: list[Skipped]
    environment: Environment
    seconds: float


def report_data(report: RunReport) -> Row:
    """A report as JSON data, without arrays."""
    return {
        "name": report.name,
        "status": report.status,
        "protocol": report.protocol,
        "metrics": flat_metrics(report),
        "error": report.error,
        "failed_stage": report.failed_stage,
        "run_id": report.run_id,
        "resumed": report.is_resumed,
        "params": report.params,
        "unquantized": list(report.unquantized),
        "undefined": dict(report.measurements.undefined) if report.measurements else {},
    }


def log_quantization(run: Run, report: RunReport, tags: Mapping[str, str]) -> None:
    """What the quantize stage found out: it stays even if the evaluation fails."""
    run.log_metrics(_tracked(run, report))
    run.set_tags(tags)
    if report.unquantized:
        run.set_tags({UNQUANTIZED: json.dumps(list(report.unquantized))})
        run.describe(*report.unquantized)
    if report.quantization is None:
        return
    rows = [asdict(r) for r in report.quantization.layers]
    run.log_table(layer_columns(report), "layers.json")
    run.log_params({f"resolved.{k}": v for k, v in report.quantization.resolved.items()})
    statuses = ("excluded", "left", "skipped", "fallback")
    paths = _paths(report.quantization.layers)
    listed = {s: {paths[i]: row["reason"] for i, row in enumerate(rows) if row["status"] == s} for s in statuses}
    run.log_json(listed, "exclusions.json")


def layer_columns(report: RunReport) -> dict[str, list[object]]:
    """The layers of a report, a column a field; empty for one that quantized none."""
    rows = [asdict(r) for r in report.quantization.layers] if report.quantization is not None else []
    return {k: [list(row[k]) if k == "shape" else row[k] for row in rows] for k in rows[0]} if rows else {}


def sample_columns(measured: Measurements) -> dict[str, list[object]]:
    """Each sample's id, cluster, stratum and seed where it has them, and each metric of it."""
    columns: dict[str, list[object]] = {"sample_id": list(measured.sample_ids)} if measured.sample_ids else {}
    for name in ("clusters", "strata", "seeds"):
        if getattr(measured, name) is not None:
            columns[name] = [int(v) for v in getattr(measured, name)]
    return columns | {name: [float(v) for v in values] for name, values in measured.samples.items()}


def step_columns(measured: Measurements) -> dict[str, list[object]]:
    """Each curve over the denoising steps."""
    return {name: [float(v) for v in curve] for name, curve in measured.steps.items()}


def _paths(layers: Sequence[LayerReport] | Sequence[CalibratedLayer]) -> list[str]:
    """Names of layers, with their component's where there are several."""
    several = len({r.component for r in layers}) > 1
    return [f"{r.component}.{r.name}" if several else r.name for r in layers]


def log_calibration(run: Run, report: RunReport) -> None:
    """What calibration used and what it showed of each layer; a tag says so where the scheme needs no data."""
    found = report.calibration
    run.set_tags({CALIBRATION_SHA256: found.sha256 if found else "none: this scheme needs no data"})
    if found is None or not found.layers:
        return
    rows = [{k: v for k, v in asdict(r).items() if k != "step_sqnr_db"} for r in found.layers]
    run.log_table({k: [row[k] for row in rows] for k in rows[0]}, "calibration_layers.json")
    heat = calibration_map(found)
    run.log_json(heat, "calibration_steps.json")
    if len(heat["columns"]) > 1:
        with tempfile.TemporaryDirectory(prefix="quantlab-figure-") as folder:
            picture = Path(folder) / "calibration_layers_by_step.png"
            draw_heat_map(heat, picture)
            run.log_artifact(picture, "figures")


def calibration_map(found: CalibrationReport) -> HeatMap:
    """``rows`` (layers), ``columns`` (denoising steps), ``values``: output SQNR in dB of each layer at each step."""
    steps = sorted({k for r in found.layers for k in r.step_sqnr_db})
    return {
        "title": "output SQNR (dB) by layer and denoising step, on calibration data",
        "rows": _paths(found.layers),
        "columns": [str(k) for k in steps],
        "values": [[r.step_sqnr_db.get(k) for k in steps] for r in found.layers],
    }


def log_beside(run: Run, rows: Sequence[RunReport]) -> None:
    """The reference and the floors of a single run, which in a sweep have runs of their own."""
    if rows:
        run.log_json({"rows": [report_data(row) for row in rows]}, BESIDE)


def log_evaluation(run: Run, report: RunReport, fingerprint: float | None) -> None:
    """What the evaluate stage found out, and the whole report as JSON."""
    before = flat_metrics(
        replace(report, quality={}, floors={}, measurements=None, attribution={}, speed={}, stages=())
    )
    metrics = {k: v for k, v in _tracked(run, report).items() if k not in before}
    if fingerprint is not None:
        metrics["quality/reference_grid_fingerprint"] = fingerprint
    run.log_metrics(metrics)
    rows = ledger(report)
    run.log_table({k: [row[k] for row in rows] for k in rows[0]}, "ledger.json")
    if report.measurements is not None:
        _log_measurements(run, report.measurements)
    if report.attribution:
        _log_attribution(run, report)
    run.log_json(report_data(report), "report.json")


def _tracked(run: Run, report: RunReport) -> dict[str, float]:
    """The report's numbers that are metrics of its run; all of them are in ``report.json``."""
    is_in_sweep = run.record.summary["parent_run_id"] is not None
    return {k: v for k, v in flat_metrics(report).items() if not _is_elsewhere(k, is_in_sweep)}


def _is_elsewhere(name: str, is_in_sweep: bool) -> bool:
    """Is a number a point of a curve, or in a sweep a floor's, which has a run of its own?"""
    metric, _, rest = name.removeprefix("quality/").partition("/")
    return (metric in METRICS and METRICS[metric].is_curve and rest.isdigit()) or (is_in_sweep and metric in ROWS)


def _log_attribution(run: Run, report: RunReport) -> None:
    """A row a component and metric, and the values of each sample with the component alone."""
    rows = [
        {
            "component": name,
            "saved_bytes": found.saved_bytes,
            "metric": metric,
            "alone": value.value,
            "alone_ci_lo": value.ci_lo,
            "alone_ci_hi": value.ci_hi,
            "together": report.quality[metric].value if metric in report.quality else None,
            "on_top": found.others[metric].value if metric in found.others else None,
            "on_top_ci_lo": found.others[metric].ci_lo if metric in found.others else None,
            "on_top_ci_hi": found.others[metric].ci_hi if metric in found.others else None,
        }
        for name, found in report.attribution.items()
        for metric, value in found.quality.items()
    ]
    if rows:
        run.log_table({k: [row[k] for row in rows] for k in rows[0]}, "attribution.json")
    values = {n: {m: [float(v) for v in x] for m, x in f.samples.items()} for n, f in report.attribution.items()}
    run.log_json(values, "attribution_samples.json")


def _log_measurements(run: Run, measured: Measurements) -> None:
    run.log_params({f"resolved.{k}": v for k, v in measured.resolved.items()})
    if measured.undefined:
        run.set_tags({UNDEFINED: json.dumps(dict(measured.undefined))})
    run.log_json(sample_columns(measured), "samples.json")
    for name, curve in measured.steps.items():
        run.log_curve(f"quality/{name}", curve)
    if measured.steps:
        run.log_json(step_columns(measured), "steps.json")
    if measured.texts:
        run.log_json(dict(measured.texts), TEXTS)
    if measured.images is not None:
        is_video = measured.images.ndim == 6
        run.log_image_grid(contact_sheet(measured.images) if is_video else measured.images, SAMPLE_GRID)
        for k, sample in enumerate(measured.images[:MAX_IN_GRID]):  # of a video the frame in the middle
            frames = sample[:, sample.shape[1] // 2] if is_video else sample
            run.log_image(framed_grid(frames, IMAGE_KEY), IMAGE_KEY, k)
        with tempfile.TemporaryDirectory(prefix="quantlab-images-") as folder:
            if is_video:
                moving = Path(folder) / Path(SAMPLE_ANIMATION).name
                save_animation(animated_grid(measured.images, SAMPLE_ANIMATION), moving, exact=False)
                run.log_artifact(moving, Path(SAMPLE_ANIMATION).parent.as_posix())
            file = Path(folder) / Path(SAMPLE_ARRAYS).name
            write_samples(measured.images, measured.image_ids, file)
            run.log_artifact(file, Path(SAMPLE_ARRAYS).parent.as_posix())
