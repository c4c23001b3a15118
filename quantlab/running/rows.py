"""Rows that are not measured here and now: read back from a record, failed, or never possible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from quantlab.models.table import FAMILIES
from quantlab.planning.job import Job
from quantlab.report.reading import StoredRun
from quantlab.tracking.tags import FAILURE, STAGE
from quantlab.vocabulary.numbers import FLOOR_DEVICE, FLOORS, REFERENCE, metric_value
from quantlab.vocabulary.reports import MetricValue, RunReport


def failed_row(
    job: Job,
    protocol: str,
    error: str,
    stage: str = "",
    run_id: str | None = None,
    metrics: Mapping[str, float] | None = None,
    is_resumed: bool = False,
) -> RunReport:
    """The row of a job that failed at ``stage``; ``metrics`` are what it had measured by then, by tracked names."""
    return RunReport(
        name=job.name,
        status="FAILED",
        protocol=protocol,
        error=error,
        failed_stage=stage,
        run_id=run_id,
        params=job.resolved,
        is_resumed=is_resumed,
        **_numbers(metrics or {}),
    )


def skipped_row(combination: str, protocol: str, reason: str) -> RunReport:
    """The row of a combination that no backend offers."""
    return RunReport(name=combination, status="SKIPPED", protocol=protocol, error=reason)


def finished_row(data: Mapping[str, Any], run_id: str | None, name: str = "", is_resumed: bool = False) -> RunReport:
    """A run's ``report.json`` as a row: its numbers, without arrays and layers; ``name`` replaces the stored one."""
    return RunReport(
        name=name or data["name"],
        status="FINISHED",
        protocol=data["protocol"],
        params=data["params"],
        run_id=run_id,
        is_resumed=is_resumed,
        unquantized=tuple(data.get("unquantized", ())),
        **_numbers(data["metrics"]),
    )


def stored_row(run: StoredRun, report: Mapping[str, Any]) -> RunReport:
    """A run of a store as a row: by its ``report.json``, and where it has none (``{}``) by its tags and metrics."""
    if report:
        return finished_row(report, run.run_id, run.name)
    status = "FAILED" if run.status == "FINISHED" else run.status
    return RunReport(
        name=run.name,
        status=status,
        protocol=family.protocol if (family := FAMILIES.get(run.params.get("model.family", ""))) else "",
        error=run.tags.get(FAILURE, "its report.json is missing" if status == "FAILED" else ""),
        failed_stage=run.tags.get(STAGE, "") if run.status != "FINISHED" else "",
        run_id=run.run_id,
        stored_metrics=run.metrics,
    )


def row_beside(data: Mapping[str, Any]) -> RunReport:
    """A row that was kept with a single run (:data:`quantlab.tracking.results.BESIDE`), and has no run of its own."""
    if data["status"] == "FINISHED":
        return finished_row(data, None)
    names = ("name", "status", "protocol", "error", "failed_stage", "params")
    return RunReport(**{name: data[name] for name in names})


def floors_of(rows: Sequence[RunReport], is_brought: bool) -> dict[str, dict[str, MetricValue]]:
    """Floor -> what it costs, of the finished ones among rows; ``is_brought``: the reference was made elsewhere."""
    done = {row.name: dict(row.quality) for row in rows if row.status == "FINISHED"}
    found = {name: values for name, values in done.items() if name in FLOORS}
    if is_brought and REFERENCE in done:
        found[FLOOR_DEVICE] = done[REFERENCE]  # the unquantized model here against the one there
    return found


def _numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a report that hold numbers, from flat metrics."""
    stored = {str(k): float(v) for k, v in metrics.items()}
    return {
        "quality": metric_values(stored, "quality/"),
        "floors": {row: found for row in FLOORS if (found := metric_values(stored, f"quality/{row}/"))},
        "stored_metrics": stored,
    }


def metric_values(metrics: Mapping[str, float], prefix: str) -> dict[str, MetricValue]:
    """The numbers with uncertainty among flat metrics whose name is ``prefix`` and one word."""
    names = [k.removeprefix(prefix).removesuffix("/n") for k in metrics if k.startswith(prefix) and k.endswith("/n")]
    return {name: metric_value(metrics, prefix + name) for name in names if "/" not in name}
