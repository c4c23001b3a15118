"""Which component costs what quality and saves what bytes: runs that measured each alone (``evaluation.attribute``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from quantlab.metrics import METRICS
from quantlab.report.table import MARKS, MIB, headline, short_number, title_of, with_half_width
from quantlab.report.terminal import Column, Sheet
from quantlab.tracking.results import Row
from quantlab.vocabulary.numbers import ALONE, ON_TOP, metric_value
from quantlab.vocabulary.reports import MetricValue


def components_in(metrics: Mapping[str, float]) -> list[str]:
    """The components that were measured alone, in the order of the run."""
    found = (name.removeprefix(f"{ALONE}/").partition("/")[0] for name in metrics if name.startswith(f"{ALONE}/"))
    return list(dict.fromkeys(found))


def attribution_sheets(rows: Iterable[Row]) -> list[Sheet]:
    """A sheet for each row whose components were measured apart, with a line a component."""
    return [_sheet(row, components_in(row["metrics"])) for row in rows if components_in(row["metrics"])]


def _sheet(row: Row, names: Sequence[str]) -> Sheet:
    metrics, protocol = row["metrics"], row["protocol"]
    shown = [m for m in headline(protocol, [row]) if any(f"{ALONE}/{name}/{m}" in metrics for name in names)]
    columns = [Column(title="component", is_text=True), Column(title="MiB", keep=4), Column(title="saves MiB", keep=8)]
    for i, metric in enumerate(shown):  # of the first metric both columns outlast those of the others
        title, later = title_of(metric), 4 * bool(i)
        columns += [Column(title=f"{title} alone", keep=7 - later), Column(title=f"{title} + others", keep=6 - later)]
    rows = [[name, *_bytes(metrics, name), *_qualities(metrics, name, shown)] for name in names]
    together = [_text(metrics, f"quality/{m}") for m in shown]
    saved = sum(metrics.get(f"memory/{name}/saved_bytes", 0) for name in names)
    whole = [f"{metrics['memory/weights_bytes'] / MIB:.2f}", f"{saved / MIB:.2f}"]
    rows.append(["all together", *whole, *(text for value in together for text in (value, ""))])
    told = "alone: the others unquantized; + others: all together less the component alone, paired by sample"
    interval = MARKS["±"] if any("±" in text for cells in rows for text in cells) else ""
    title = f"{row['name']}: which component costs what"
    return Sheet(columns=columns, rows=rows, title=(title,), caption=(told, interval))


def _bytes(metrics: Mapping[str, float], name: str) -> tuple[str, str]:
    weights, saved = metrics.get(f"memory/{name}/weights_bytes", 0), metrics.get(f"memory/{name}/saved_bytes", 0)
    return f"{weights / MIB:.2f}", f"{saved / MIB:.2f}"


def _qualities(metrics: Mapping[str, float], name: str, shown: Sequence[str]) -> Iterator[str]:
    for metric in shown:
        yield _text(metrics, f"{ALONE}/{name}/{metric}")
        yield _text(metrics, f"{ON_TOP}/{name}/{metric}", signed=True)


def _text(metrics: Mapping[str, float], key: str, signed: bool = False) -> str:
    """A cell of a terminal."""
    if key not in metrics:
        return ""
    value = metric_value(metrics, key)
    bounds = (value.ci_lo, value.ci_hi)
    half = max(abs(value.value - bound) for bound in bounds if bound is not None) if None not in bounds else 0.0
    text = with_half_width(value.value, half)
    return f"+{text}" if signed and value.value > 0 else text


def _in_words(metrics: Mapping[str, float], key: str, signed: bool = False) -> str:
    return _said(metric_value(metrics, key), signed)


def _said(value: MetricValue, signed: bool = False) -> str:
    text = short_number(value.value)
    text = f"+{text}" if signed and value.value > 0 else text
    if value.ci_lo is None or value.ci_hi is None or value.ci_lo == value.ci_hi:
        return text
    return f"{text} ({short_number(value.ci_lo)}..{short_number(value.ci_hi)})"


def attribution_lines(name: str, metrics: Mapping[str, float], metric: str) -> list[str]:
    """The same as sentences, under one metric: for a comparison and its page."""
    lines = []
    for component in components_in(metrics):
        alone, on_top = f"{ALONE}/{component}/{metric}", f"{ON_TOP}/{component}/{metric}"
        if alone not in metrics:
            continue
        saved = metrics.get(f"memory/{component}/saved_bytes", 0) / MIB
        unit = METRICS[metric].unit
        others = f"; the others change that by {_in_words(metrics, on_top, signed=True)}" if on_top in metrics else ""
        of = f" {unit}" if unit not in ("", "1") else ""
        lines.append(
            f"{name}: {component} alone: {metric} {_in_words(metrics, alone)}{of}, and saves {saved:.2f} MiB{others}"
        )
    return lines
