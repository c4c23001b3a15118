"""A comparison as JSON data, which the page holds and ``--json`` prints, and as CSV."""

from __future__ import annotations

import contextlib
import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from quantlab.errors import ConfigError
from quantlab.metrics import METRICS
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.attribution import components_in
from quantlab.report.compare import Comparison, answers, bytes_of
from quantlab.report.reading import StoredRun
from quantlab.report.said_first import said_first
from quantlab.report.selection import is_candidate, scheme_nodes
from quantlab.report.verdicts import Verdict, largest_floor, num_tested, pair_said
from quantlab.tracking.tags import FAILURE, STAGE, UNQUANTIZED
from quantlab.vocabulary.numbers import ALONE, FLOORS, ON_TOP, REFERENCE


class Numbers(TypedDict):
    """A metric with its interval, and what the largest floor has."""

    value: float
    ci_lo: float | None
    ci_hi: float | None
    floor: float | None


class VerdictData(TypedDict, total=False):
    """One comparison; a row that is no candidate has none."""

    difference: float
    ci_lo: float | None
    ci_hi: float | None
    se: float | None
    test: str
    p: float | None
    p_holm: float | None
    p_rank: float | None
    """Wilcoxon's, adjusted; only where the differences are skewed."""
    share_worse: float | None
    verdict: str


class PairData(VerdictData):
    """``a`` less ``b``."""

    a: str
    b: str
    said: str
    """The verdict by name, as terminal and page show it: which of the two is better."""


class RowData(VerdictData):
    """One run; the verdict is against the reference."""

    name: str
    run_id: str
    role: str
    backend: str
    weights_bytes: float | None
    bits_per_weight_model: float | None
    """Stored bits a weight of the whole components: what the bytes say."""
    bits_per_weight_quantized: float | None
    """Of the quantized layers alone: what the format says."""
    compression: float | None
    is_simulated: bool
    coverage: float | None
    metrics: dict[str, Numbers]
    on_front: bool


class Answer(TypedDict):
    """A question, and the name of the run that answers it."""

    question: str
    name: str


class Cost(TypedDict):
    """What a component of a scheme costs by itself, and what the others cost on top of it."""

    scheme: str
    component: str
    weights_bytes: float | None
    saved_bytes: float | None
    is_simulated: bool
    alone: Numbers
    on_top: Numbers | None


class GroupData(TypedDict):
    """One comparable group."""

    label: str
    protocol: str
    metric: str
    unit: str
    higher_is_better: bool | None
    n: int
    margin: float
    floor: float | None
    floor_name: str | None
    """Row of the largest floor; None: none is known."""
    num_comparisons: int
    """Over which ``p_holm`` is adjusted: those with the reference, and the different ones of pairs and twins."""
    front: list[str]
    answers: list[Answer]
    unquantized: list[str]
    """What is said before the numbers: what stays unquantized under which schemes."""
    notes: list[str]
    rows: list[RowData]
    pairs: list[PairData]
    twins: list[PairData]
    costs: list[Cost]
    """Of schemes whose components were measured apart."""


class Failure(TypedDict):
    """A job without a result: where and why."""

    name: str
    run_id: str
    status: str
    stage: str
    error: str


def group_data(group: Comparison) -> GroupData:
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
        "floor": group.floor.value if group.floor else None,
        "floor_name": group.floor.name if group.floor else None,
        "num_comparisons": num_tested([*group.verdicts.values(), *group.pairs, *group.twins]),
        "front": list(group.front),
        "answers": [{"question": q, "name": name} for q, name in answers(group)],
        "unquantized": unquantized(group.runs),
        "notes": list(group.notes),
        "rows": [_row(r, group) for r in in_order(group)],
        "pairs": [pair_data(v) for v in group.pairs],
        "twins": [pair_data(v) for v in group.twins],
        "costs": costs(group.candidates, group.metric),
    }


def costs(runs: Sequence[StoredRun], metric: str) -> list[Cost]:
    """A row a component, of the runs that measured each alone under ``metric``."""
    return [
        {
            "scheme": run.name,
            "component": name,
            "weights_bytes": run.metrics.get(f"memory/{name}/weights_bytes"),
            "saved_bytes": run.metrics.get(f"memory/{name}/saved_bytes"),
            "is_simulated": bool(run.metrics.get(f"memory/{name}/is_simulated")),
            "alone": _at(run, f"{ALONE}/{name}/{metric}"),
            "on_top": _at(run, on_top) if (on_top := f"{ON_TOP}/{name}/{metric}") in run.metrics else None,
        }
        for run in runs
        for name in components_in(run.metrics)
        if f"{ALONE}/{name}/{metric}" in run.metrics
    ]


def _at(run: StoredRun, key: str) -> Numbers:
    known = run.metrics
    bounds = known.get(f"{key}/ci_lo"), known.get(f"{key}/ci_hi")
    return {"value": known[key], "ci_lo": bounds[0], "ci_hi": bounds[1], "floor": None}


def unquantized(runs: Iterable[StoredRun]) -> list[str]:
    """What stays unquantized under which of the runs, where that is much."""
    return said_first((r.name, _sentences(r.tags.get(UNQUANTIZED, "[]"))) for r in runs if is_candidate(r))


def _sentences(text: str) -> list[str]:
    """A tag's list; empty for what somebody else made of it."""
    with contextlib.suppress(ValueError):
        found = json.loads(text)
        return [str(s) for s in found] if isinstance(found, list) else []
    return []


def failure_data(run: StoredRun) -> Failure:
    """A job without a result: where and why."""
    return {
        "name": run.name,
        "run_id": run.run_id,
        "status": run.status,
        "stage": run.tags.get(STAGE, ""),
        "error": run.tags.get(FAILURE, "" if run.status != "RUNNING" else "has not ended"),
    }


def _row(run: StoredRun, group: Comparison) -> RowData:
    m = run.metrics
    v = group.verdicts.get(run.name)
    row: RowData = {
        "name": run.name,
        "run_id": run.run_id,
        "role": "candidate" if is_candidate(run) else "floor" if run.name.split(" ")[0] in FLOORS else REFERENCE,
        "backend": " + ".join(sorted(set(scheme_nodes(run.params).values()))),
        "weights_bytes": m.get("memory/weights_bytes"),
        "bits_per_weight_model": m.get("memory/bits_per_weight_model"),
        "bits_per_weight_quantized": m.get("memory/bits_per_weight_quantized"),
        "compression": m.get("memory/compression"),
        "is_simulated": bool(m.get("memory/is_simulated")),
        "coverage": m.get("quantization/coverage"),
        "metrics": {name: metric_numbers(m, name) for name in shown_metrics(group) if f"quality/{name}" in m},
        "on_front": run.name in group.front,
    }
    return {**row, **verdict_data(v)} if v else row


def metric_numbers(metrics: Mapping[str, float], name: str) -> Numbers:
    """A metric that a run has."""
    floor = largest_floor(metrics, name)
    return {
        "value": metrics[f"quality/{name}"],
        "ci_lo": metrics.get(f"quality/{name}/ci_lo"),
        "ci_hi": metrics.get(f"quality/{name}/ci_hi"),
        "floor": floor.value if floor else None,
    }


def pair_data(v: Verdict) -> PairData:
    return {"a": v.a, "b": v.b, "said": pair_said(v), **verdict_data(v)}


def verdict_data(v: Verdict) -> VerdictData:
    """One comparison."""
    d = v.difference
    return {
        "difference": d.value,
        "ci_lo": d.ci_lo,
        "ci_hi": d.ci_hi,
        "se": d.se,
        "test": v.test,
        "p": v.p,
        "p_holm": v.p_holm,
        "p_rank": v.p_rank,
        "share_worse": v.share_worse,
        "verdict": v.text,
    }


def _cell(value: object) -> object:
    """Text that a spreadsheet would take for a formula begins with an apostrophe, as in the page's own file."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value


def write_csv(groups: Sequence[GroupData], failed: Sequence[Failure], path: Path) -> None:
    """One line a run, those without a result included; the group's label tells unlike runs apart.

    ConfigError where the file cannot be written.
    """
    lines = []
    for group in groups:
        for row in group["rows"]:
            flat = {k: v for k, v in row.items() if k != "metrics"}
            numbers = {
                name if k == "value" else f"{name}/{k}": x
                for name, parts in row["metrics"].items()
                for k, x in parts.items()
            }
            lines.append({"group": group["label"], "status": "FINISHED", **flat, **numbers, "metric": group["metric"]})
    lines += [dict(failure) for failure in failed]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(k for line in lines for k in line)))
            writer.writeheader()
            writer.writerows([{k: _cell(v) for k, v in line.items()} for line in lines])
    except OSError as error:
        raise ConfigError(f"--csv {path}: cannot be written ({error}); name another file") from error


def shown_metrics(group: Comparison) -> list[str]:
    """The metric that was asked for, and the protocol's headline metrics."""
    return list(dict.fromkeys([group.metric, *PROTOCOLS[group.protocol].HEADLINE]))


def in_order(group: Comparison) -> list[StoredRun]:
    """The reference and the floors, then the candidates by bytes."""
    return [*(r for r in group.runs if not is_candidate(r)), *sorted(group.candidates, key=bytes_of)]
