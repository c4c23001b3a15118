"""The ledger of a run: bytes as planned, on the disk, after loading and at the peak of each phase; and what is left
unexplained. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from quantlab.vocabulary.reports import MemoryReport, RunReport, StageReport

KINDS = ("quantized_bytes", "scale_bytes", "other_bytes")
LARGEST_SHARE = 0.02
"""A remainder above this share of the weights is told."""


def ledger(report: RunReport) -> list[dict[str, Any]]:
    """One row a component and kind, then the files, then each phase, and last the remainder of all weights."""
    rows: list[dict[str, Any]] = []
    for name, measured in report.memory.items():
        planned = report.planned.get(name)
        for kind in KINDS:
            had = None if planned is None else getattr(planned, kind)
            rows.append(_row(name, kind.removesuffix("_bytes"), had, getattr(measured, kind)))
    rows.append(_row("", "on disk", None, report.disk_bytes))
    rows += [_row("", f"{stage.name}: {key}", None, value) for stage in report.stages for key, value in _peaks(stage)]
    planned_bytes, measured_bytes = _totals(report)
    rows.append(_row("", "unexplained remainder", planned_bytes, measured_bytes))
    return rows


def remainders(report: RunReport) -> dict[str, int]:
    """Component -> bytes that it has beyond the plan; negative: fewer."""
    found = {name: report.planned[name] for name in report.memory if name in report.planned}
    return {name: report.memory[name].weights_bytes - planned.weights_bytes for name, planned in found.items()}


def warning(report: RunReport) -> str:
    """What is told where the remainder is more than :data:`LARGEST_SHARE` of the weights; "" where it is not."""
    planned_bytes, measured_bytes = _totals(report)
    if not planned_bytes or abs(measured_bytes - planned_bytes) <= LARGEST_SHARE * planned_bytes:
        return ""
    name, kind, difference = _largest(report.memory, report.planned)
    return (
        f"{report.name}: {measured_bytes - planned_bytes:+,} bytes of weights "
        f"({(measured_bytes - planned_bytes) / planned_bytes:+.1%}) are not in the plan; the largest part are the "
        f"{kind.removesuffix('_bytes')} bytes of {name} ({difference:+,})"
    )


def _totals(report: RunReport) -> tuple[int, int]:
    names = [name for name in report.memory if name in report.planned]
    return (
        sum(report.planned[name].weights_bytes for name in names),
        sum(report.memory[name].weights_bytes for name in names),
    )


def _largest(memory: Mapping[str, MemoryReport], planned: Mapping[str, MemoryReport]) -> tuple[str, str, int]:
    parts = [
        (name, kind, getattr(memory[name], kind) - getattr(planned[name], kind))
        for name in memory
        if name in planned
        for kind in KINDS
    ]
    return max(parts, key=lambda part: abs(part[2]))


def _peaks(stage: StageReport) -> list[tuple[str, int]]:
    found = [(k, v) for k, v in asdict(stage).items() if k.startswith("peak_") and v is not None]
    return found + [(f"peak_alloc_bytes of device {i}", peak) for i, (_, peak) in enumerate(stage.by_device)]


def _row(component: str, what: str, planned: int | None, measured: int | None) -> dict[str, Any]:
    difference = None if planned is None or measured is None else measured - planned
    share = None if difference is None or not planned else 100 * difference / planned
    return {
        "component": component,
        "what": what,
        "planned_bytes": planned,
        "measured_bytes": measured,
        "unexplained_bytes": difference,
        "unexplained_percent": share,
    }
