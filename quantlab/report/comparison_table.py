"""A comparison as a table for the terminal, as JSON data and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from quantlab.errors import ConfigError
from quantlab.metrics import METRICS
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.compare import Comparison, Verdict, answers, bytes_of
from quantlab.report.reading import StoredRun
from quantlab.report.selection import Selection, is_candidate
from quantlab.report.table import LEGEND, MIB, cells, columns
from quantlab.tracking.tags import FAILURE, STAGE

MAX_SHOWN = 60
STYLES = {"inside the floor": "green", "better": "green", "worse": "yellow"}


def shown_metrics(group: Comparison) -> list[str]:
    """The metric that was asked for, and the protocol's headline metrics."""
    return list(dict.fromkeys([group.metric, *PROTOCOLS[group.protocol].HEADLINE]))


def in_order(group: Comparison) -> list[StoredRun]:
    """The reference and the floors, then the candidates by bytes."""
    return [*(r for r in group.runs if not is_candidate(r)), *sorted(group.candidates, key=bytes_of)]


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
    table = Table(title=group.label or None, caption=caption, caption_justify="left", pad_edge=False)
    titles = columns(group.protocol)[:-1]
    extra = [] if group.metric in PROTOCOLS[group.protocol].HEADLINE else [group.metric]
    for i, title in enumerate([*titles, *extra, "front", "p (Holm)", f"verdict on {group.metric}"]):
        text = i == 0 or title.startswith("verdict")
        table.add_column(Text(title), justify="left" if text else "right", overflow="fold", no_wrap=i == 0)
    for run in shown:
        row = {"name": run.name, "status": run.status, "metrics": run.metrics, "error": ""}
        v = group.verdicts.get(run.name)
        more = [f"{run.metrics[f'quality/{m}']:.3g}" for m in extra]
        front = "*" if run.name in group.front else ""
        texts = [*cells(row, group.protocol)[:-1], *more, front, p_text(v.p_holm if v else None), v.text if v else ""]
        table.add_row(*map(Text, texts), style=STYLES.get(v.text) if v else "dim")
    return table


def pair_lines(group: Comparison) -> list[str]:
    """The pairs as sentences, those that cannot be told apart first."""
    order = {"not distinguishable": 0, "too few samples": 1, "inside the floor": 2, "inside the margin": 3}
    return [pair_text(v, group.metric) for v in sorted(group.pairs, key=lambda v: order.get(v.text, 4))]


def twin_lines(group: Comparison) -> list[str]:
    """What each algorithm buys over the plain one on the same bits, as sentences."""
    return [pair_text(v, group.metric) for v in group.twins]


def pair_text(v: Verdict, metric: str) -> str:
    """One pair as a sentence."""
    d = v.difference
    interval = "" if d.ci_lo is None else f" ({d.ci_lo:.2g}..{d.ci_hi:.2g})"
    what = {"better": f"{v.a} is better than {v.b}", "worse": f"{v.b} is better than {v.a}"}
    said = what.get(v.text, f"{v.a} and {v.b}: {v.text}")
    return f"{said}; {metric} differs by {d.value:.2g}{interval}, p {p_text(v.p_holm) or '-'}"


def _method(group: Comparison) -> str:
    margin = f", margin {group.margin:g}" if group.margin else ""
    return (
        f"* on the Pareto front of bytes and {group.metric}; n = {group.n}{margin}; p: paired, Holm-adjusted over "
        f"{len(group.verdicts) + len(group.pairs) + len(group.twins)} comparisons"
    )


# -- data


def comparison_data(groups: Sequence[Comparison], selection: Selection) -> dict[str, Any]:
    """Everything as JSON data."""
    return {
        "title": selection.title,
        "groups": [group_data(g) for g in groups],
        "failed": [failure_data(r) for r in selection.failed],
        "skipped": [dict(s) for s in selection.skipped],
    }


def group_data(group: Comparison) -> dict[str, Any]:
    """One comparable group."""
    metric = METRICS[group.metric]
    return {
        "label": group.label,
        "protocol": group.protocol,
        "metric": group.metric,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "n": group.n,
        "margin": group.margin,
        "floor": group.floor,
        "front": list(group.front),
        "answers": [{"question": q, "name": name} for q, name in answers(group)],
        "notes": list(group.notes),
        "rows": [_row(r, group) for r in in_order(group)],
        "pairs": [{"a": v.a, "b": v.b, **_verdict(v)} for v in group.pairs],
        "twins": [{"a": v.a, "b": v.b, **_verdict(v)} for v in group.twins],
    }


def failure_data(run: StoredRun) -> dict[str, str]:
    """A job without a result: where and why."""
    return {
        "name": run.name,
        "run_id": run.run_id,
        "status": run.status,
        "stage": run.tags.get(STAGE, ""),
        "error": run.tags.get(FAILURE, "" if run.status != "RUNNING" else "has not ended"),
    }


def _row(run: StoredRun, group: Comparison) -> dict[str, Any]:
    m = run.metrics
    v = group.verdicts.get(run.name)
    return {
        "name": run.name,
        "run_id": run.run_id,
        "role": "candidate" if is_candidate(run) else "baseline",
        "backend": run.params.get("quantization.backend", ""),
        "weights_bytes": m.get("memory/weights_bytes"),
        "bits_per_weight": m.get("memory/bits_per_weight", m.get("memory/bits_per_weight_model")),
        "compression": m.get("memory/compression"),
        "is_simulated": bool(m.get("memory/is_simulated")),
        "coverage": m.get("quantization/coverage"),
        "metrics": {name: _numbers(m, name) for name in shown_metrics(group) if f"quality/{name}" in m},
        "on_front": run.name in group.front,
        **(_verdict(v) if v else {}),
    }


def _numbers(metrics: Mapping[str, float], name: str) -> dict[str, float | None]:
    bounds = {k: metrics.get(f"quality/{name}/{k}") for k in ("ci_lo", "ci_hi")}
    return {"value": metrics[f"quality/{name}"], **bounds, "floor": metrics.get(f"quality/floor/{name}")}


def _verdict(v: Verdict) -> dict[str, Any]:
    d = v.difference
    return {
        "difference": d.value,
        "ci_lo": d.ci_lo,
        "ci_hi": d.ci_hi,
        "se": d.se,
        "test": v.test,
        "p": v.p,
        "p_holm": v.p_holm,
        "verdict": v.text,
    }


def write_csv(data: Mapping[str, Any], path: Path) -> None:
    """One line a run, those without a result included; the group's label tells unlike runs apart.

    ConfigError where the file cannot be written.
    """
    lines = []
    for group in data["groups"]:
        for row in group["rows"]:
            flat = {k: v for k, v in row.items() if k != "metrics"}
            numbers = {
                name if k == "value" else f"{name}/{k}": x
                for name, parts in row["metrics"].items()
                for k, x in parts.items()
            }
            lines.append({"group": group["label"], "status": "FINISHED", **flat, **numbers, "metric": group["metric"]})
    lines += [dict(failure) for failure in data["failed"]]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for line in lines for k in line)))
            writer.writeheader()
            writer.writerows(lines)
    except OSError as error:
        raise ConfigError(f"--csv {path}: cannot be written ({error}); name another file") from error


def answer_lines(group: Comparison) -> list[str]:
    """The answers with their bytes, for the terminal."""
    runs = {r.name: r for r in group.runs}
    lines = []
    for question, name in answers(group):
        saving = runs[name].metrics.get("memory/compression") if name else None
        size = f" ({bytes_of(runs[name]) / MIB:.2f} MiB, {saving:.2f}x)" if saving else ""
        lines.append(f"{question}: {name}{size}" if name else question)
    return lines
