"""The table at the end of a request: one row a scheme, for the terminal and as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from quantlab.metrics import HEADLINE, METRICS
from quantlab.report.record import sum_memory
from quantlab.reports import MetricValue, RunReport

MIB = 1024**2


def columns(protocol: str) -> list[str]:
    """Column titles of a protocol's table."""
    names = [_title(m) for m in HEADLINE[protocol]]
    return ["scheme", "bits/weight", "MiB", "saving", *names, "coverage", "s"]


def _title(metric: str) -> str:
    row = METRICS[metric]
    arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    unit = f" [{row.unit}]" if row.unit not in ("", "1") else ""
    return f"{metric.removesuffix('_db')}{unit}{arrow}"


def cells(report: RunReport, protocol: str) -> list[str]:
    """One row's texts; a number with its 95 % interval, ``≤ floor`` where it is inside the bf16 noise floor."""
    if report.status != "FINISHED":
        blank = ["", "", ""] + [""] * (len(HEADLINE[protocol]) + 2)
        return [report.name, *blank[:3], f"FAILED: {report.error.splitlines()[0][:60]}", *blank[4:]]
    total = sum_memory(report.memory.values())
    simulated = bool(report.quantization and any(r.is_simulated for r in report.quantization.layers))
    seconds = next((s.seconds for s in report.stages if s.name == "evaluate"), None)
    return [
        report.name,
        _bits(report, total),
        f"{total.weights_bytes / MIB:.2f}{' (simulated)' if simulated else ''}" if total else "",
        f"{total.bytes_at_16_bit / total.weights_bytes:.2f}x" if total else "",
        *(_quality(report, m) for m in HEADLINE[protocol]),
        f"{100 * report.quantization.coverage:.1f} %" if report.quantization else "",
        f"{seconds:.1f}" if seconds is not None else "",
    ]


def _bits(report: RunReport, total: Any) -> str:
    if report.quantization is None:
        return f"{total.bits_per_weight:.2f}" if total else ""
    done = [r for r in report.quantization.layers if r.status in ("quantized", "fallback")]
    numel = sum(r.shape[0] * r.shape[1] for r in done)
    return f"{8 * sum(r.weight_bytes + r.scale_bytes for r in done) / numel:.2f}" if numel else ""


def _number(value: float) -> str:
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def _quality(report: RunReport, metric: str) -> str:
    value = report.quality.get(metric)
    if value is None:
        return ""
    text = _number(value.value)
    if value.ci_lo is not None and value.ci_hi is not None and value.ci_lo != value.ci_hi:
        text += f" ({_number(value.ci_lo)}..{_number(value.ci_hi)})"
    return text + (" ≤ floor" if inside_floor(metric, value, report.floor.get(metric)) else "")


def inside_floor(metric: str, value: MetricValue, floor: MetricValue | None) -> bool:
    """Is ``value`` no worse than the bf16 noise floor's own value?"""
    better = METRICS[metric].higher_is_better
    if floor is None or better is None or value is floor:
        return False
    return value.value >= floor.value if better else value.value <= floor.value


def terminal_table(reports: Iterable[RunReport], protocol: str, caption: str = "") -> Table:
    """The rows as a rich table."""
    table = Table(caption=Text(caption, justify="left"), caption_justify="left", pad_edge=False)
    for i, title in enumerate(columns(protocol)):
        table.add_column(Text(title), justify="left" if i == 0 else "right", overflow="fold", no_wrap=i == 0)
    for report in reports:
        style = "red" if report.status != "FINISHED" else "dim" if report.quantization is None else None
        table.add_row(*(Text(c) for c in cells(report, protocol)), style=style)
    return table


def markdown(reports: Sequence[RunReport], protocol: str) -> str:
    """The rows as a Markdown table."""
    head = columns(protocol)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    lines += ["| " + " | ".join(cells(r, protocol)) + " |" for r in reports]
    return "\n".join(lines)
