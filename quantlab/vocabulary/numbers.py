"""A report's numbers by their tracked names: what each name means is written here, and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict

from quantlab.vocabulary.ledger import remainders
from quantlab.vocabulary.reports import (
    CalibrationReport,
    MemoryReport,
    MetricValue,
    QuantizationReport,
    RunReport,
    StageReport,
)

REFERENCE = "reference"
FLOOR_BF16, FLOOR_BATCH, FLOOR_ATTENTION, FLOOR_FP32 = "floor_bf16", "floor_batch", "floor_attention", "floor_fp32"
FLOOR_DEVICE = "floor_device"
"""The unquantized model of this machine against a reference that another one made (``reference.path``)."""
NEEDED_BYTES = "memory/needed_bytes"
"""What a scheme needs by itself on a GPU, see :func:`needed_bytes`."""
CHECKPOINT_METHOD = "checkpoint_method"
"""What a candidate that others quantized says of itself (``quant_method``): among what a run made of its settings."""
CHECKPOINT_SHA256 = "checkpoint_sha256"
"""Digest of the files of such a candidate, among the same."""
OTHER_BATCH = "quality/other_batch"
"""Prefix of a candidate's own numbers at another batch size."""
ALONE, ON_TOP = "quality/alone", "quality/on_top"
"""Prefixes, with a component's name behind them: of the model in which it alone is quantized, and of what the others
cost on top of it (``evaluation.attribute``)."""
FLOORS = (FLOOR_BF16, FLOOR_BATCH, FLOOR_ATTENTION, FLOOR_FP32, FLOOR_DEVICE)
"""Rows of other executions of the reference; their numbers are ``quality/<floor>/...`` in every row."""

_COVERAGE = "quantization/coverage"


def is_scheme(name: str, metrics: Mapping[str, float]) -> bool:
    """Is a row one of what was asked for: a scheme, or a cast (``backend=none dtype=float16``)? Reference and floors,
    which come along, are none."""
    return _COVERAGE in metrics or (bool(metrics) and name.split(" #")[0] not in (REFERENCE, *FLOORS))


def flat_metrics(report: RunReport) -> dict[str, float]:
    """Every number of a report by its MLflow name; what was not measured is absent."""
    if report.stored_metrics is not None:
        return dict(report.stored_metrics)
    out: dict[str, float | int | None] = {}
    groups = {"quality": report.quality, OTHER_BATCH: report.other_batch}
    groups |= {f"quality/{row}": values for row, values in report.floors.items()}
    for name, found in report.attribution.items():
        groups |= {f"{ALONE}/{name}": found.quality, f"{ON_TOP}/{name}": found.others}
        out[f"memory/{name}/saved_bytes"] = found.saved_bytes
        rows = report.quantization.layers if report.quantization is not None else ()
        out[f"memory/{name}/is_simulated"] = float(any(r.is_simulated for r in rows if r.component == name))
    for prefix, values in groups.items():
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
    out |= {f"memory/{name}/planned_bytes": m.weights_bytes for name, m in report.planned.items()}
    out |= {f"memory/device_{i}/weights_bytes": n for i, n in enumerate(report.device_bytes)}
    out |= {f"memory/{name}/unexplained_bytes": n for name, n in remainders(report).items()}
    out["memory/disk_bytes_model"] = report.disk_bytes
    if report.quantization is not None:
        out |= _quantization_metrics(report.quantization)
    if report.calibration is not None:
        out |= _calibration_metrics(report.calibration)
    for stage in report.stages:
        out |= {f"perf/{stage.name}_s": stage.seconds}
        out |= {f"memory/{stage.name}/{k}": v for k, v in asdict(stage).items() if k.endswith("_bytes")}
        each = enumerate(stage.by_device)
        out |= {f"memory/device_{i}/{stage.name}/peak_alloc_bytes": peak for i, (_, peak) in each}
    out |= {f"perf/{k}": v for k, v in report.speed.items()}
    if total is not None:
        out[NEEDED_BYTES] = needed_bytes(total, report.stages)
    if report.measurements is not None:
        out |= {f"perf/{k}": v for k, v in report.measurements.timings_ms.items()}
        on_gpu = any(s.peak_alloc_bytes is not None for s in report.stages)
        out["perf/representative"] = float(on_gpu)  # the order of the schemes' times on a CPU is not that on a GPU
        for name, curve in report.measurements.steps.items():
            out |= {f"quality/{name}/{k}": float(v) for k, v in enumerate(curve)}
    return {k: float(v) for k, v in out.items() if v is not None}


def needed_bytes(weights: MemoryReport, stages: Iterable[StageReport]) -> int | None:
    """What the components need by themselves on a GPU: their weights, and what evaluating them took beside them.

    The peak of the stage ``evaluate`` also holds what was there before it: the reference, encoders, the weights
    themselves. None on a CPU: its resident set also grows by metrics, imported libraries and freed memory that the
    process keeps, so that the number would depend on which job came first.
    """
    for stage in stages:
        if stage.name == "evaluate" and stage.peak_alloc_bytes is not None and stage.baseline_alloc_bytes is not None:
            each = stage.by_device or ((stage.baseline_alloc_bytes, stage.peak_alloc_bytes),)
            return weights.weights_bytes + sum(peak - baseline for baseline, peak in each)
    return None


_TIMES = {"_ms_per_token": "ms/token", "_tokens_per_s": "tokens/s", "_per_s": "1/s", "_ms": "ms", "_s": "s"}
"""How a name ends -> its unit."""


def time_in_words(name: str) -> tuple[str, str]:
    """``perf/time_to_first_token_ms`` -> ``time to first token`` and its unit, ``ms``."""
    key = name.removeprefix("perf/").removesuffix("_p90")
    ending = next((e for e in _TIMES if key.endswith(e)), "")
    percentile = ", 90th percentile" if name.endswith("_p90") else ""
    percentile += " of times" if percentile and key.endswith("_per_s") else ""  # where the rate is low
    return key.removesuffix(ending).replace("_", " ") + percentile, _TIMES.get(ending, "")


def metric_value(metrics: Mapping[str, float], name: str) -> MetricValue:
    """A metric among flat ``metrics``, with its uncertainty; KeyError where it is not among them."""
    return MetricValue(
        value=metrics[name],
        n=int(metrics.get(f"{name}/n", 0)),
        se=metrics.get(f"{name}/se"),
        ci_lo=metrics.get(f"{name}/ci_lo"),
        ci_hi=metrics.get(f"{name}/ci_hi"),
    )


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
    done = [r for r in q.layers if r.status in ("quantized", "fallback") and not r.shares]
    sizes = [r.group_size or r.shape[1] for r in done if r.status == "quantized"]
    stored = [r for r in done if r.is_stored_quantized]
    numel = sum(r.num_weights for r in stored)
    errors = [r.weight_rel_error for r in done if r.weight_rel_error is not None]
    return {
        _COVERAGE: q.coverage,
        "quantization/num_layers": len(done),
        "quantization/num_skipped": sum(r.status == "skipped" for r in q.layers),
        "quantization/num_fallback": sum(r.status == "fallback" for r in q.layers),
        "quantization/num_excluded": sum(r.status == "excluded" for r in q.layers),
        "quantization/group_size_min": min(sizes, default=None),
        "quantization/group_size_max": max(sizes, default=None),
        "quantization/weight_rel_error_mean": sum(errors) / len(errors) if errors else None,
        "quantization/weight_rel_error_max": max(errors, default=None),
        "quantization/product_rel_error_max": max(
            (r.product_rel_error for r in done if r.product_rel_error is not None), default=None
        ),
        "quantization/worst_row_rel_error_max": max(
            (r.worst_row_rel_error for r in done if r.worst_row_rel_error is not None), default=None
        ),
        "memory/bits_per_weight_quantized": 8 * sum(r.weight_bytes + r.scale_bytes for r in stored) / numel
        if numel
        else None,
        "memory/is_simulated": float(any(r.is_simulated for r in done)),
    }


def _calibration_metrics(c: CalibrationReport) -> dict[str, float | int | None]:
    out: dict[str, float | int | None] = {
        "calibration/num_samples": c.num_samples,
        "calibration/batch_size": c.batch_size,
        "calibration/num_calls": c.num_calls,
        "calibration/shared_tokens_of_calibration": c.shared_tokens_of_calibration,
        "calibration/shared_tokens_of_evaluation": c.shared_tokens_of_evaluation,
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
