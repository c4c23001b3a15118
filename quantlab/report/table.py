"""The table at the end of a request: one row a scheme, for the terminal and as Markdown.

A row is what :func:`quantlab.tracking.results.report_data` gives and what ``rows.json`` of a sweep holds, so the
terminal and the documents show the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table
from rich.text import Text

from quantlab.metrics import METRICS
from quantlab.progress import plain, printable
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.verdicts import error_metric, is_inside, largest_floor, less, with_other_batch
from quantlab.tracking.results import Measured, Row
from quantlab.vocabulary.numbers import metric_value

MIB = 1024**2
MAX_SKIPPED = 8  # rows of impossible combinations that a terminal shows
LEGEND = (
    "bits/weight: of the whole model (of its quantized layers); (low..high): 95 % interval; ° surely inside the "
    "noise floor; ~ simulated: stored wider than the dtype says"
)


def headline(protocol: str, rows: Iterable[Measured]) -> list[str]:
    """The protocol's headline metrics that a row has (of images, videos or sound); the first two of none."""
    metrics = [row["metrics"] for row in rows]
    found = [m for m in PROTOCOLS[protocol].HEADLINE if any(f"quality/{m}" in known for known in metrics)]
    return found or list(PROTOCOLS[protocol].HEADLINE[:2])


def columns(shown: Sequence[str]) -> list[str]:
    """Column titles of a table with these metrics."""
    return [
        "scheme",
        "bits/weight",
        "MiB",
        "saving",
        *(_title(m) for m in shown),
        "coverage",
        "s",
    ]


def _title(metric: str) -> str:
    row = METRICS[metric]
    arrow = {True: " ↑", False: " ↓", None: ""}[row.higher_is_better]
    unit = f" [{row.unit}]" if row.unit not in ("", "1") else ""
    return f"{metric.removesuffix('_db')}{unit}{arrow}"


def cells(row: Measured, shown: Sequence[str]) -> list[str]:
    """One row's texts, in the order of :func:`columns`."""
    metrics = row["metrics"]
    if row["status"] != "FINISHED":
        texts = [""] * (len(columns(shown)) - 2)
        texts[3] = row["status"]
        return [row["name"], *texts, ""]
    simulated = "~" if metrics.get("memory/is_simulated") else ""
    return [
        row["name"],
        _shown(metrics.get("memory/bits_per_weight_model"), "{:.2f}")
        + _shown(metrics.get("memory/bits_per_weight_quantized"), " ({:.2f})"),
        simulated + _shown(metrics.get("memory/weights_bytes"), "{:.2f}", MIB),
        _shown(metrics.get("memory/compression"), "{:.2f}x"),
        *(_quality(metrics, m) for m in shown),
        _shown(metrics.get("quantization/coverage"), "{:.1f} %", 0.01),
        _shown(metrics.get("perf/evaluate_s"), "{:.1f}"),
    ]


def _shown(value: float | None, pattern: str, unit: float = 1.0) -> str:
    return "" if value is None else pattern.format(value / unit)


def _number(value: float) -> str:
    if value != 0 and abs(value) < 1e-3:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.3g}"


def _quality(metrics: Mapping[str, float], metric: str) -> str:
    value = metrics.get(f"quality/{metric}")
    if value is None:
        return ""
    text = _number(value)
    low, high = (metrics.get(f"quality/{metric}/{bound}") for bound in ("ci_lo", "ci_hi"))
    if low is not None and high is not None and low != high:
        text += f" ({_number(low)}..{_number(high)})"
    return text + ("°" if inside_floor(metric, metrics) else "")


def inside_floor(metric: str, metrics: Mapping[str, float]) -> bool:
    """Does a quantized row surely cost no more than another execution of the reference does?"""
    error = error_metric(metric)
    known = METRICS[error].of_reference
    if known is None or f"quality/{error}" not in metrics or "quantization/coverage" not in metrics:
        return False
    floor = largest_floor(metrics, metric)
    value = with_other_batch(metric_value(metrics, f"quality/{error}"), metrics, error)
    return floor is not None and bool(is_inside(less(value, known), floor.cost))


def terminal_table(rows: Iterable[Row], protocol: str, caption: str = "") -> Table:
    """The rows as a rich table."""
    table = Table(
        caption=Text(f"{LEGEND}\n{printable(caption)}", justify="left"), caption_justify="left", pad_edge=False
    )
    rows = list(rows)
    shown = headline(protocol, rows)
    for i, title in enumerate(columns(shown)):
        table.add_column(Text(title), justify="left" if i == 0 else "right", overflow="fold", no_wrap=i == 0)
    skipped = [r for r in rows if r["status"] == "SKIPPED"]
    for row in [r for r in rows if r not in skipped] + skipped[:MAX_SKIPPED]:
        dim = "quantization/coverage" not in row["metrics"]
        style = "red" if row["status"] == "FAILED" else "dim" if dim else None
        name, *texts = cells(row, shown)
        name += " (resumed)" if row.get("resumed") else ""
        table.add_row(plain(name), *(plain(c) for c in texts), style=style)
    if len(skipped) > MAX_SKIPPED:
        table.add_row(f"and {len(skipped) - MAX_SKIPPED} more skipped (rows.json)", style="dim")
    return table


def _in_markdown(text: str) -> str:
    """One cell: nothing in it ends the cell, opens an element or a link."""
    shown = printable(text, 200)
    return "".join(f"\\{c}" if c in "|<[`*\\" else c for c in shown)


def markdown(rows: Sequence[Row], protocol: str) -> str:
    """The rows as a Markdown table."""
    shown = headline(protocol, rows)
    head = columns(shown)
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    lines += [
        "| " + " | ".join(_in_markdown(c) for c in cells(row, shown)) + " |"
        for row in rows
        if row["status"] != "SKIPPED"
    ]
    return "\n".join(lines)
