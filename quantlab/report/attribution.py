"""Which component costs what quality and saves what bytes: runs that measured each alone (``evaluation.attribute``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from quantlab.metrics import bounds_of
from quantlab.report.table import MARKS, number_cell, stored_mib, title_of
from quantlab.report.terminal import Column, Sheet
from quantlab.tracking.results import Measured
from quantlab.vocabulary.amounts import mib
from quantlab.vocabulary.numbers import ALONE, ON_TOP, metric_value


def components_in(metrics: Mapping[str, float]) -> list[str]:
    """The components that were measured alone, in the order of the run."""
    found = (name.removeprefix(f"{ALONE}/").partition("/")[0] for name in metrics if name.startswith(f"{ALONE}/"))
    return list(dict.fromkeys(found))


def attribution_sheet(rows: Iterable[Measured], metrics: Sequence[str], *, is_plain: bool = False) -> Sheet | None:
    """Of each row whose components were measured apart, a line for the scheme and one a component; None without any.

    ``is_plain``: with the scheme in a column of its own, for other programs.
    """
    measured = [(row, parts) for row in rows if (parts := components_in(row["metrics"]))]
    shown = [
        m for m in metrics if any(f"{ALONE}/{part}/{m}" in row["metrics"] for row, parts in measured for part in parts)
    ]
    if not shown:
        return None
    columns = [Column(title="MiB", keep=4), Column(title="saves MiB", keep=8)]
    for i, metric in enumerate(shown):  # of the first metric both columns outlast those of the others
        title, later = title_of(metric), 4 * bool(i)
        columns += [Column(title=f"{title} alone", keep=7 - later), Column(title=f"{title} + others", keep=6 - later)]
    names = ["scheme", "component"] if is_plain else ["component"]
    lines: list[list[str]] = []
    ends = []
    for row, parts in measured:
        found = row["metrics"]
        saved = sum(found.get(f"memory/{name}/saved_bytes", 0) for name in parts)
        whole = [stored_mib(found), mib(saved)]
        for metric in shown:
            whole += [_text(found, f"quality/{metric}"), ""]
        before = [row["name"]] if is_plain else []
        lines.append([*before, _TOGETHER if is_plain else row["name"], *whole])
        of = "" if is_plain else "- "
        lines += [[*before, f"{of}{name}", *_bytes(found, name), *_qualities(found, name, shown)] for name in parts]
        ends.append(len(lines) - 1)
    told = (
        f"{'' if is_plain else 'at a scheme: all components together; '}alone: the others unquantized; + others: all "
        "together less the component alone, paired by sample; saves MiB: against the reference as it was loaded"
    )
    interval = "; ".join(
        MARKS[mark] for mark in ("±", "..", "~") if any(mark in text for cells in lines for text in cells)
    )
    return Sheet(
        columns=[*(Column(title=name, is_text=True) for name in names), *columns],
        rows=lines,
        sections=frozenset(ends),
        title=("which component costs what",),
        caption=(told, interval),
    )


_TOGETHER = "all together"


def _bytes(metrics: Mapping[str, float], name: str) -> tuple[str, str]:
    weights, saved = metrics.get(f"memory/{name}/weights_bytes", 0), metrics.get(f"memory/{name}/saved_bytes", 0)
    return f"{'~' if metrics.get(f'memory/{name}/is_simulated') else ''}{mib(weights)}", mib(saved)


def _qualities(metrics: Mapping[str, float], name: str, shown: Sequence[str]) -> Iterator[str]:
    for metric in shown:
        yield _text(metrics, f"{ALONE}/{name}/{metric}")
        yield _text(metrics, f"{ON_TOP}/{name}/{metric}", signed=True)


def _text(metrics: Mapping[str, float], key: str, signed: bool = False) -> str:
    """A cell of a terminal; ``signed``: a difference."""
    if key not in metrics:
        return ""
    value = metric_value(metrics, key)
    text = number_cell(value, bounds_of(key))
    return f"+{text}" if signed and value.value > 0 else text
