"""A comparison for the terminal: its table, and its answers and pairs as sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from quantlab.metrics import METRICS
from quantlab.metrics.significance import ALPHA
from quantlab.progress import counted
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.attribution import attribution_sheet
from quantlab.report.compare import Comparison, answers
from quantlab.report.comparison_data import failure_data, in_order, unquantized
from quantlab.report.reading import StoredRun
from quantlab.report.selection import is_candidate
from quantlab.report.table import (
    asked_columns,
    cells,
    headline,
    legend,
    number_cell,
    sheet_columns,
    stored_mib,
    with_interval,
    with_marks,
)
from quantlab.report.terminal import Column, Sheet, show, tell
from quantlab.report.verdicts import (
    BETTER,
    BETTER_BY_RANK,
    IN_FLOOR,
    IN_MARGIN,
    NEAR_FLOOR,
    SAME,
    TOO_FEW,
    WORSE,
    WORSE_BY_RANK,
    Verdict,
    num_tested,
    pair_said,
)
from quantlab.tracking.results import Measured
from quantlab.vocabulary.reports import MetricValue

MAX_SHOWN = 60
MAX_PAIRS = 10
MANY = 4
"""From so many pairs on they are a table: as sentences they are a wall."""
RANKED = "worse on: the samples on which the first is worse, and the p of a rank test, where differences are skewed"
STYLES = {IN_FLOOR: "green", BETTER: "green", WORSE: "yellow", WORSE_BY_RANK: "yellow"}


def p_text(p: float | None) -> str:
    """A p-value for people."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def show_groups(
    console: Console,
    groups: Sequence[Comparison],
    failed: Sequence[StoredRun],
    *,
    is_plain: bool = False,
    wide: bool = False,
    more: Sequence[str] = (),
) -> None:
    """Print comparisons: tables (with ``more`` columns), answers, pairs, and what failed. ``is_plain``: the tables
    alone, tab-separated."""
    for told in told_groups(groups, failed, is_plain=is_plain, more=more):
        if isinstance(told, Sheet):
            show(console, told, is_plain=is_plain, wide=wide)
        else:
            tell(console, told)


def told_groups(
    groups: Sequence[Comparison], failed: Sequence[StoredRun], *, is_plain: bool = False, more: Sequence[str] = ()
) -> Iterator[Sheet | str]:
    """The tables and sentences of comparisons, in their order; ``is_plain``: the tables of schemes alone."""
    for group in groups:
        yield comparison_sheet(group, more, is_plain=is_plain)
        apart = attribution_sheet(as_measured(in_order(group)), [group.metric], is_plain=is_plain)
        yield from [apart] if apart else []
        if is_plain:
            continue
        yield from answer_lines(group)
        for pairs in (told_pairs(group), group.twins):
            if len(pairs) >= MANY:
                yield pairs_sheet(pairs, group.metric)
            else:
                yield from (pair_text(v, group.metric) for v in pairs)
        yield from group.notes
    for failure in [] if is_plain else map(failure_data, failed):
        yield f"failed: {failure['name']} at {failure['stage']}: {failure['error']}"


def as_measured(runs: Iterable[StoredRun]) -> list[Measured]:
    """What tables show of runs."""
    return [{"name": r.name, "status": r.status, "metrics": r.metrics} for r in runs]


def comparison_sheet(group: Comparison, more: Sequence[str] = (), *, is_plain: bool = False) -> Sheet:
    """One group for a terminal, with ``more`` columns (metrics); of more than 60 runs, the reference, the floors and
    the front."""
    runs = in_order(group)
    shown = runs if len(runs) <= MAX_SHOWN else [r for r in runs if not is_candidate(r) or r.name in group.front]
    first = [*([group.label] if group.label else []), *unquantized(group.runs)]
    measured = as_measured(shown)
    metrics = headline(group.protocol, measured)
    extra = [] if group.metric in PROTOCOLS[group.protocol].HEADLINE else [group.metric]
    has_pairs = bool(
        told_pairs(group) or group.twins
    )  # whose p is told below the table, where the column may be hidden
    has_p = any(v.p_holm is not None for v in group.verdicts.values())
    columns = [
        *sheet_columns(metrics, group.metric)[:-1],  # without the seconds
        *(Column(title=m, keep=8) for m in extra),
        Column(title="front", keep=6, caption=f"* {front_text(group)}"),
        *([] if not has_p else [Column(title="p (Holm)", keep=3, caption="" if has_pairs else method_of_p(group))]),
        Column(title=f"verdict on {group.metric}", is_text=True, may_wrap=True),
    ]
    rows, styles = [], {}
    for i, (run, row) in enumerate(zip(shown, measured, strict=True)):
        v = group.verdicts.get(run.name)
        others = [with_interval(run.metrics, f"quality/{m}") for m in extra]
        front = "*" if run.name in group.front else ""
        said = verdict_text(v, group) if v else ""
        p = [p_text(v.p_holm if v else None)] if has_p else []
        rows.append([*cells(row, metrics, bounds=False)[:-1], *others, front, *p, said])
        styles[i] = STYLES.get(v.text, "") if v else "dim"
    further, absent = asked_columns(measured, rows, more, is_plain=is_plain)
    columns += further
    off = len(runs) - len(shown)
    caption = (
        *absent,
        "; ".join(filter(None, (method(group), method_of_p(group) if has_pairs else ""))),
        f"{off} runs off the front are in the page and in --csv FILE" if off else "",
    )
    return Sheet(columns=with_marks(columns, rows), rows=rows, styles=styles, title=first, caption=caption)


def verdict_text(v: Verdict, group: Comparison) -> str:
    """A verdict against the reference; without a floor each loss is ``worse``, and that is said."""
    return f"{v.text} (no floor)" if v.text == WORSE and group.floor is None else v.text


def told_pairs(group: Comparison) -> list[Verdict]:
    """The pairs, those that cannot be told apart first; of too few samples the answers tell already, of an algorithm
    and its plain twin the twins."""
    order = (SAME, IN_FLOOR, IN_MARGIN, NEAR_FLOOR, BETTER_BY_RANK, WORSE_BY_RANK)
    place = {text: i for i, text in enumerate(order)}
    twins = {frozenset((v.a, v.b)) for v in group.twins}
    told = [v for v in group.pairs if v.text != TOO_FEW and frozenset((v.a, v.b)) not in twins]
    return sorted(told, key=lambda v: place.get(v.text, len(order)))


def pairs_sheet(pairs: Sequence[Verdict], metric: str) -> Sheet:
    """Pairs as a table."""
    told = f"difference: {metric} of the first less that of the second"
    marks = legend(("", _difference(v.difference, metric)) for v in pairs[:MAX_PAIRS])
    columns = [
        Column(title="scheme", is_text=True),
        Column(title="against", is_text=True),
        Column(title="difference", keep=8, caption="; ".join(filter(None, (told, marks)))),
        Column(title="p (Holm)", keep=7),
        Column(title="worse on", keep=6, caption=RANKED),
        Column(title="verdict", is_text=True),
    ]
    rows = [
        [v.a, v.b, _difference(v.difference, metric), p_text(v.p_holm) or "-", _share(v), pair_said(v)]
        for v in pairs[:MAX_PAIRS]
    ]
    if not any(row[4] for row in rows):
        columns, rows = [*columns[:4], columns[5]], [[*row[:4], row[5]] for row in rows]
    left = len(pairs) - MAX_PAIRS
    return Sheet(columns=columns, rows=rows, caption=[f"{left} more pairs are in --json"] if left > 0 else [])


def _difference(d: MetricValue, metric: str) -> str:
    text = number_cell(d, METRICS[metric].bounds_of_difference)
    return text if text.startswith(("-", "0 ")) or not d.value else f"+{text}"


def pair_text(v: Verdict, metric: str) -> str:
    """One pair as a sentence."""
    what = {BETTER: f"{v.a} is better than {v.b}", WORSE: f"{v.b} is better than {v.a}"}
    said = what.get(v.text, f"{v.a} and {v.b}: {pair_said(v)}")
    less = f"{metric} of {v.a} less that of {v.b}"
    differs = f"{less}: {_difference(v.difference, metric)}, p {p_text(v.p_holm) or '-'}"
    return f"{said}; {differs}{_ranked(v)}"


def _share(v: Verdict) -> str:
    if v.p_rank is None or v.share_worse is None:
        return ""
    return f"{100 * v.share_worse:.0f} %, p {p_text(v.p_rank)}"


def _ranked(v: Verdict) -> str:
    if v.p_rank is None or v.share_worse is None:
        return ""
    return f"; {v.a} is worse on {100 * v.share_worse:.0f} % of the samples, rank test p {p_text(v.p_rank)}"


def method(group: Comparison) -> str:
    """How the verdicts were found, in a line."""
    margin = f", margin {group.margin:g}" if group.margin else ""
    floor = f"; floor: {group.floor.name}" if group.floor else "; no floor is known"
    return f"n = {group.n}{margin}{floor}"


def method_of_p(group: Comparison) -> str:
    """What the p beside a verdict and in a pair is; "" where there is none."""
    found = [*group.verdicts.values(), *group.pairs, *group.twins]
    if all(v.p_holm is None for v in found):
        return ""
    num, alone = num_tested(found), num_tested(group.verdicts.values())
    parts = f" ({alone} with the reference, {num - alone} of pairs)" if num > alone else ""
    odd = any(v.text == SAME and v.p_holm is not None and v.p_holm < ALPHA for v in found)
    both = f"; {SAME} at any p where the interval holds 0" if odd else ""
    return f"p: paired, Holm-adjusted over {counted(num, 'comparison')}{parts}{both}"


def front_text(group: Comparison) -> str:
    """What it means to be marked in the column ``front``."""
    is_sure = any(v.text != TOO_FEW for v in group.verdicts.values())
    said = "surely better than all smaller schemes there" if is_sure else "as measured no scheme is smaller and better"
    return f"on the front of bytes and {group.metric}: {said}"


def answer_lines(group: Comparison) -> list[str]:
    """The answers with their bytes, for the terminal."""
    runs = {r.name: r for r in group.runs}
    lines = []
    for question, name in answers(group):
        saving = runs[name].metrics.get("memory/compression") if name else None
        size = f" ({stored_mib(runs[name].metrics)} MiB, {saving:.2f}x)" if saving else ""
        lines.append(f"{question}: {name}{size}" if name else question)
    return lines
