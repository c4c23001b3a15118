"""A comparison for the terminal: its table, and its answers and pairs as sentences."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from quantlab.progress import plain
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.compare import Comparison, answers, bytes_of
from quantlab.report.comparison_data import in_order, unquantized
from quantlab.report.selection import is_candidate
from quantlab.report.table import LEGEND, MIB, cells, columns, headline
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
)
from quantlab.tracking.results import Measured

MAX_SHOWN = 60
STYLES = {IN_FLOOR: "green", BETTER: "green", WORSE: "yellow", WORSE_BY_RANK: "yellow"}


def p_text(p: float | None) -> str:
    """A p-value for people."""
    return "" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def comparison_table(group: Comparison) -> Table:
    """One group as a rich table; of more than 60 runs, the reference, the floors and the front."""
    runs = in_order(group)
    shown = runs if len(runs) <= MAX_SHOWN else [r for r in runs if not is_candidate(r) or r.name in group.front]
    lines = [LEGEND, _method(group)]
    if len(shown) < len(runs):
        lines.append(f"{len(runs) - len(shown)} runs off the front are in the page and in --csv FILE")
    caption = Text("\n".join(lines), justify="left")
    first = [*([group.label] if group.label else []), *unquantized(group.runs)]
    table = Table(
        title=plain("\n".join(first), 2000) if first else None,
        title_justify="left",
        caption=caption,
        caption_justify="left",
        pad_edge=False,
    )
    measured: list[Measured] = [{"name": r.name, "status": r.status, "metrics": r.metrics} for r in shown]
    metrics = headline(group.protocol, measured)
    titles = columns(metrics)[:-1]
    extra = [] if group.metric in PROTOCOLS[group.protocol].HEADLINE else [group.metric]
    for i, title in enumerate([*titles, *extra, "front", "p (Holm)", f"verdict on {group.metric}"]):
        text = i == 0 or title.startswith("verdict")
        table.add_column(Text(title), justify="left" if text else "right", overflow="fold", no_wrap=i == 0)
    for run, row in zip(shown, measured, strict=True):
        v = group.verdicts.get(run.name)
        more = [f"{run.metrics[f'quality/{m}']:.3g}" for m in extra]
        front = "*" if run.name in group.front else ""
        texts = [*cells(row, metrics)[:-1], *more, front, p_text(v.p_holm if v else None), v.text if v else ""]
        table.add_row(*map(plain, texts), style=STYLES.get(v.text) if v else "dim")
    return table


def pair_lines(group: Comparison) -> list[str]:
    """The pairs as sentences, those that cannot be told apart first."""
    order = (SAME, TOO_FEW, IN_FLOOR, IN_MARGIN, NEAR_FLOOR, BETTER_BY_RANK, WORSE_BY_RANK)
    place = {text: i for i, text in enumerate(order)}
    return [pair_text(v, group.metric) for v in sorted(group.pairs, key=lambda v: place.get(v.text, len(order)))]


def twin_lines(group: Comparison) -> list[str]:
    """What each algorithm buys over the plain one on the same bits, as sentences."""
    return [pair_text(v, group.metric) for v in group.twins]


def pair_text(v: Verdict, metric: str) -> str:
    """One pair as a sentence."""
    d = v.difference
    interval = "" if d.ci_lo is None else f" ({d.ci_lo:.2g}..{d.ci_hi:.2g})"
    what = {BETTER: f"{v.a} is better than {v.b}", WORSE: f"{v.b} is better than {v.a}"}
    said = what.get(v.text, f"{v.a} and {v.b}: {v.text}")
    ranked = ""
    if v.p_rank is not None and v.share_worse is not None:
        ranked = f"; {v.a} is worse on {100 * v.share_worse:.0f} % of the samples, rank test p {p_text(v.p_rank)}"
    return f"{said}; {metric} differs by {d.value:.2g}{interval}, p {p_text(v.p_holm) or '-'}{ranked}"


def _method(group: Comparison) -> str:
    margin = f", margin {group.margin:g}" if group.margin else ""
    floor = f"; floor: {group.floor.name}" if group.floor else "; no floor is known"
    front = f"* on the front of bytes and {group.metric}: surely better than all smaller schemes there"
    num = len(group.verdicts) + len(group.pairs) + len(group.twins)
    return f"{front}; n = {group.n}{margin}{floor}; p: paired, Holm-adjusted over {num} comparisons"


def answer_lines(group: Comparison) -> list[str]:
    """The answers with their bytes, for the terminal."""
    runs = {r.name: r for r in group.runs}
    lines = []
    for question, name in answers(group):
        saving = runs[name].metrics.get("memory/compression") if name else None
        size = f" ({bytes_of(runs[name]) / MIB:.2f} MiB, {saving:.2f}x)" if saving else ""
        lines.append(f"{question}: {name}{size}" if name else question)
    return lines
