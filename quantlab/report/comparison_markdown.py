"""A comparison as Markdown, for issues, model cards and the description of a sweep in MLflow."""

from __future__ import annotations

from collections.abc import Sequence

from quantlab.progress import in_markdown
from quantlab.report.attribution import attribution_sheet
from quantlab.report.compare import Comparison
from quantlab.report.comparison_data import failure_data, in_order, unquantized
from quantlab.report.comparison_table import (
    answer_lines,
    as_measured,
    front_text,
    method,
    method_of_p,
    p_text,
    verdict_text,
)
from quantlab.report.selection import Selection, is_candidate
from quantlab.report.table import cells, columns, headline, legend
from quantlab.tracking.results import Measured

MAX_ROWS = 60
"""A longer table is no help to who reads it in a description; the page and the CSV file have all."""


def comparison_markdown(groups: Sequence[Comparison], selection: Selection, most: int = MAX_ROWS) -> str:
    """Tables of at most ``most`` rows (the front first), answers and method of all groups, then what failed."""
    parts = [_group(group, most) for group in groups]
    failed = [failure_data(run) for run in selection.failed]
    lines = [f"- {_text(f['name'])} at {_text(f['stage'])}: {_text(f['error'])}" for f in failed]
    if lines:
        parts.append("\n".join(["**Failed**", "", *lines]))
    return "\n\n".join(parts)


def _group(group: Comparison, most: int) -> str:
    runs = in_order(group)
    first = sorted(runs, key=lambda r: r.name not in group.front and is_candidate(r))[:most]
    kept, off = [r for r in runs if r in first], max(0, len(runs) - most)
    measured = as_measured(kept)
    shown = list(dict.fromkeys([group.metric, *headline(group.protocol, measured)]))
    head = [*columns(shown)[:-2], "front", f"verdict on {group.metric}"]  # without coverage and seconds
    table, marks = [], []
    for row in measured:
        found = cells(row, shown)[:-2]
        v = group.verdicts.get(row["name"])
        p = p_text(v.p_holm if v else None)
        said = f"{verdict_text(v, group)}{f' (p {p})' if p else ''}" if v else ""
        marks.append(found)
        table.append([*found, "★" if row["name"] in group.front else "", said])
    lines = [f"**{_text(group.label)}**", ""] if group.label else []
    lines += [f"{_text(line)}." for line in unquantized(group.runs)]
    lines += [*(f"- {_text(line)}" for line in answer_lines(group)), ""]
    lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 3) + "---|---|"]
    lines += ["| " + " | ".join(in_markdown(c) for c in row) + " |" for row in table]
    lines += _costs(measured, group.metric)
    more = [f"and {off} more rows"] if off else []
    told = [
        *more,
        *group.notes,
        f"★ {front_text(group)}",
        "; ".join(filter(None, (method(group), method_of_p(group)))),
        legend(marks),
    ]
    return "\n".join([*lines, "", *(f"- {_text(line)}" for line in told if line)])


def _costs(rows: Sequence[Measured], metric: str) -> list[str]:
    """A table of what each component costs alone; nothing where none was measured so."""
    sheet = attribution_sheet(rows, [metric], is_plain=True)
    if sheet is None:
        return []
    head = [column.title for column in sheet.columns]
    lines = ["", f"**{sheet.title[0]}**", "", "| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    lines += ["| " + " | ".join(in_markdown(c) for c in row) + " |" for row in sheet.rows]
    return [*lines, "", *(_text(line) for line in sheet.caption if line)]


def _text(text: str) -> str:
    """A line of prose: nothing in it is an element, a link, code or emphasis."""
    return in_markdown(text, 1000)
