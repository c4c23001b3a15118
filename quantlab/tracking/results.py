"""A report's numbers by their tracked names, and everything that one job leaves in its tracked run."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypedDict

from quantlab.tracking.heat_map import HeatMap, draw_heat_map
from quantlab.tracking.pictures import SAMPLE_ARRAYS, SAMPLE_GRID, write_samples
from quantlab.tracking.provenance import Environment
from quantlab.tracking.run import Run
from quantlab.tracking.tags import CALIBRATION_SHA256
from quantlab.vocabulary.reports import (
    CalibratedLayer,
    CalibrationReport,
    LayerReport,
    Measurements,
    MemoryReport,
    QuantizationReport,
    RunReport,
)


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


def flat_metrics(report: RunReport) -> dict[str, float]:
    """Every number of a report by its MLflow name; what was not measured is absent."""
    if report.stored_metrics is not None:
        return dict(report.stored_metrics)
    out: dict[str, float | int | None] = {}
    groups = (("quality", report.quality), ("quality/floor", report.floor), ("quality/floor_batch", report.floor_batch))
    for prefix, values in groups:
        for name, v in values.items():
            out |= {
                f"{prefix}/{name}": v.value,
                f"{prefix}/{name}/se": v.se,
                f"{prefix}/{name}/ci_lo": v.ci_lo,
                f"{prefix}/{name}/ci_hi": v.ci_hi,
                f"{prefix}/{name}/n": v.n,
            }
    total = sum_memory(report.memory.values())
    if total is not None:
        out |= _memory_metrics("memory", total)
        out |= {k: v for name, m in report.memory.items() for k, v in _memory_metrics(f"memory/{name}", m).items()}
    out["memory/disk_bytes"] = report.disk_bytes
    if report.quantization is not None:
        out |= _quantization_metrics(report.quantization)
    if report.calibration is not None:
        out |= _calibration_metrics(report.calibration)
    for stage in report.stages:
        out |= {f"perf/{stage.name}_s": stage.seconds}
        out |= {f"memory/{stage.name}/{k}": v for k, v in asdict(stage).items() if k.endswith("_bytes")}
    if report.measurements is not None:
        out |= {f"perf/{k}": v for k, v in report.measurements.timings_ms.items()}
        on_gpu = any(s.peak_alloc_bytes is not None for s in report.stages)
        out["perf/representative"] = float(on_gpu)  # the order of the schemes' times on a CPU is not that on a GPU
        for name, curve in report.measurements.steps.items():
            out |= {f"quality/{name}/{k}": float(v) for k, v in enumerate(curve)}
    return {k: float(v) for k, v in out.items() if v is not None}


def _memory_metrics(prefix: str, m: MemoryReport) -> dict[str, float | int | None]:
    return {
        f"{prefix}/weights_bytes": m.weights_bytes,
        f"{prefix}/quantized_bytes": m.quantized_bytes,
        f"{prefix}/scale_bytes": m.scale_bytes,
        f"{prefix}/other_bytes": m.other_bytes,
        f"{prefix}/bits_per_weight_model": m.bits_per_weight,
        f"{prefix}/compression": m.bytes_at_16_bit / m.weights_bytes,
    }


def _quantization_metrics(q: QuantizationReport) -> dict[str, float | int | None]:
    done = [r for r in q.layers if r.status in ("quantized", "fallback")]
    sizes = [r.group_size or r.shape[1] for r in done if r.status == "quantized"]
    numel = sum(r.shape[0] * r.shape[1] for r in done)
    errors = [r.weight_rel_error for r in done if r.weight_rel_error is not None]
    return {
        "quantization/coverage": q.coverage,
        "quantization/num_layers": len(done),
        "quantization/num_skipped": sum(r.status == "skipped" for r in q.layers),
        "quantization/num_fallback": sum(r.status == "fallback" for r in q.layers),
        "quantization/num_excluded": sum(r.status == "excluded" for r in q.layers),
        "quantization/group_size_min": min(sizes, default=None),
        "quantization/group_size_max": max(sizes, default=None),
        "quantization/weight_rel_error_mean": sum(errors) / len(errors) if errors else None,
        "quantization/weight_rel_error_max": max(errors, default=None),
        "memory/bits_per_weight": 8 * sum(r.weight_bytes + r.scale_bytes for r in done) / numel if numel else None,
        "memory/is_simulated": float(any(r.is_simulated for r in done)),
    }


def _calibration_metrics(c: CalibrationReport) -> dict[str, float | int | None]:
    out: dict[str, float | int | None] = {
        "calibration/num_samples": c.num_samples,
        "calibration/batch_size": c.batch_size,
        "calibration/num_calls": c.num_calls,
    }
    for name in ("weight_sqnr_db", "output_sqnr_db"):
        for when in ("before", "after"):
            values = [v for r in c.layers if (v := getattr(r, f"{name}_{when}")) is not None]
            out[f"calibration/{name}_{when}_mean"] = sum(values) / len(values) if values else None
    worst = [r.output_sqnr_db_after for r in c.layers if r.output_sqnr_db_after is not None]
    return {**out, "calibration/output_sqnr_db_after_min": min(worst, default=None)}


def sum_memory(reports: Iterable[MemoryReport]) -> MemoryReport | None:
    """All components' bytes together; None for no component."""
    reports = list(reports)
    if not reports:
        return None
    return MemoryReport(**{k: sum(getattr(r, k) for r in reports) for k in asdict(reports[0])})


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
    }


def log_quantization(run: Run, report: RunReport, tags: Mapping[str, str]) -> None:
    """What the quantize stage found out: it stays even if the evaluation fails."""
    run.log_metrics(flat_metrics(report))
    run.set_tags(tags)
    if report.quantization is None:
        return
    rows = [asdict(r) for r in report.quantization.layers]
    run.log_table({k: [list(row[k]) if k == "shape" else row[k] for row in rows] for k in rows[0]}, "layers.json")
    run.log_params({f"resolved.{k}": v for k, v in report.quantization.resolved.items()})
    statuses = ("excluded", "skipped", "fallback")
    paths = _paths(report.quantization.layers)
    listed = {s: {paths[i]: row["reason"] for i, row in enumerate(rows) if row["status"] == s} for s in statuses}
    run.log_json(listed, "exclusions.json")


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


def log_evaluation(run: Run, report: RunReport, fingerprint: float | None) -> None:
    """What the evaluate stage found out, and the whole report as JSON."""
    before = flat_metrics(replace(report, quality={}, floor={}, floor_batch={}, measurements=None, stages=()))
    metrics = {k: v for k, v in flat_metrics(report).items() if k not in before}
    if fingerprint is not None:
        metrics["quality/reference_grid_fingerprint"] = fingerprint
    run.log_metrics(metrics)
    if report.measurements is not None:
        _log_measurements(run, report.measurements)
    run.log_json(report_data(report), "report.json")


def _log_measurements(run: Run, measured: Measurements) -> None:
    ids = list(measured.sample_ids)
    columns: dict[str, Sequence[object]] = {"sample_id": ids} if ids else {}
    for name in ("clusters", "strata"):
        if getattr(measured, name) is not None:
            columns[name] = [int(v) for v in getattr(measured, name)]
    columns |= {name: [float(v) for v in values] for name, values in measured.samples.items()}
    run.log_json(columns, "samples.json")
    if measured.steps:
        run.log_json({name: [float(v) for v in curve] for name, curve in measured.steps.items()}, "steps.json")
    if measured.images is not None:
        run.log_image_grid(measured.images, SAMPLE_GRID)
        with tempfile.TemporaryDirectory(prefix="quantlab-images-") as folder:
            file = Path(folder) / Path(SAMPLE_ARRAYS).name
            write_samples(measured.images, measured.image_ids, file)
            run.log_artifact(file, Path(SAMPLE_ARRAYS).parent.as_posix())
