"""Which scheme is better, and is the difference real: every candidate against the reference, and pairs of candidates.

Rules (one comparison, metric m, reference or other candidate r):

* the difference is that of the means on the same samples, with its bootstrap interval over clusters;
* p is the paired t-test's on cluster differences, exact McNemar's for a metric of 0 and 1, and Holm-adjusted over all
  comparisons of the group: each candidate against the reference, the pairs among the Pareto front (among all
  candidates where runs were named one by one), and each algorithm against the plain one on the same bits;
* **not distinguishable**: the interval holds 0, or the adjusted p is 0.05 or more;
* **inside the floor**: real, and not larger than what casting the reference to bf16 costs;
* **inside the margin**: real, and not larger than the declared margin;
* **better**, **worse**: none of these; **too few samples**: below 10 clusters there is no interval.

Against the reference the logged intervals are used: a fidelity metric is itself the paired difference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from quantlab.backends.table import backends
from quantlab.errors import ConfigError, TrackingError, nearest
from quantlab.metrics import METRICS
from quantlab.metrics.statistics import (
    MIN_CLUSTERS,
    degrees_of_freedom,
    holm,
    mcnemar_exact,
    paired_differences,
    t_test,
)
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.pareto import pareto_front
from quantlab.report.reading import Reader, StoredRun, read_json
from quantlab.report.selection import ComparisonRequest, Selection, group_labels, is_candidate
from quantlab.vocabulary.reports import MetricValue

ALPHA = 0.05
MAX_PAIRED = 20
BETTER, WORSE, SAME = "better", "worse", "not distinguishable"
IN_FLOOR, IN_MARGIN, TOO_FEW = "inside the floor", "inside the margin", "too few samples"
PLAIN = ("auto", "max")
"""Algorithms that take each scale from the largest weight."""
SAME_BITS = ("backend", "dtype", "group_size", "activation_dtype")
"""Settings in which a run and its twin of the plain algorithm agree."""
LAYOUT = ("sample_id", "clusters", "strata")
Labels = list[int] | None
"""The cluster, or the stratum, of each sample; None: each is its own, or all are of one."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison: ``a`` less ``b``."""

    a: str
    b: str
    difference: MetricValue
    test: str
    p: float | None = None
    p_holm: float | None = None
    text: str = TOO_FEW


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparable runs under one metric. ``verdicts`` are by run name, against the reference; ``label`` tells groups
    apart."""

    label: str
    protocol: str
    metric: str
    margin: float
    n: int
    floor: float | None
    """The metric of the reference cast to bf16."""
    floor_cost: float | None
    """Its distance from the reference's."""
    runs: tuple[StoredRun, ...]
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    front: tuple[str, ...] = ()
    """Names of the candidates that no other beats in bytes and quality, by bytes."""
    pairs: tuple[Verdict, ...] = ()
    twins: tuple[Verdict, ...] = ()
    """Each run of an algorithm less the run of the plain algorithm that stores the same bits."""
    notes: tuple[str, ...] = ()

    @property
    def candidates(self) -> list[StoredRun]:
        """The quantized runs."""
        return [r for r in self.runs if is_candidate(r)]


def compare(request: ComparisonRequest, selection: Selection, reader: Reader) -> list[Comparison]:
    """Every comparable group of a selection.

    Raises ConfigError for a metric that these runs do not have or that cannot be paired, and TrackingError where no
    group holds a finished candidate, or runs have no sample in common.
    """
    groups = [g for g in selection.groups if any(map(is_candidate, g))]
    if not groups:
        states = ", ".join(f"{r.name} ({r.status.lower()})" for r in selection.failed[:5])
        there_are = f"; there are {states}" if states else ""
        raise TrackingError(
            f"{request.typed}: no finished run of a quantized model to compare{there_are}; run a recipe first, or "
            "choose another sweep"
        )
    return [_compare_group(request, g, label, reader) for g, label in zip(groups, group_labels(groups), strict=True)]


def _compare_group(request: ComparisonRequest, runs: Sequence[StoredRun], label: str, reader: Reader) -> Comparison:
    candidates = sorted((r for r in runs if is_candidate(r)), key=bytes_of)
    protocol = protocol_of(candidates[0])
    if not protocol:
        raise TrackingError(f"{request.typed}: {candidates[0].name!r} has no quality number; choose runs that ended")
    samples = _Samples(request.typed, reader, request.metric or PROTOCOLS[protocol].HEADLINE[0])
    metric = samples.metric
    _check_metric(metric, protocol, candidates, samples)
    front = front_of(candidates, metric)
    paired, notes = _paired(request, candidates, front)
    among = _among(paired, samples)
    found = [*_against_reference(candidates, runs, samples), *among, *_twins(candidates, samples)]
    floor = candidates[0].metrics.get(f"quality/floor/{metric}")
    reference = reference_run(runs)
    of_reference = reference.metrics.get(f"quality/{metric}") if reference else METRICS[metric].of_reference
    cost = abs(floor - of_reference) if floor is not None and of_reference is not None else None
    judged = _judged(found, metric, cost, request.margin)
    rest = judged[len(candidates) :]
    return Comparison(
        label=label,
        protocol=protocol,
        metric=metric,
        margin=request.margin,
        floor=floor,
        floor_cost=cost,
        runs=tuple(runs),
        n=int(candidates[0].metrics.get(f"quality/{metric}/n", 0)),
        verdicts={v.a: v for v in judged[: len(candidates)]},
        pairs=tuple(rest[: len(among)]),
        twins=tuple(rest[len(among) :]),
        front=tuple(r.name for r in front),
        notes=tuple(notes),
    )


def protocol_of(run: StoredRun) -> str:
    """The protocol whose first headline metric the run has."""
    return next((p for p, row in PROTOCOLS.items() if f"quality/{row.HEADLINE[0]}" in run.metrics), "")


def reference_run(runs: Sequence[StoredRun]) -> StoredRun | None:
    """The unquantized model's own row, if it was tracked."""
    return next((r for r in runs if r.name.split(" #")[0] == "reference" and not is_candidate(r)), None)


def bytes_of(run: StoredRun) -> float:
    """The model's bytes as stored; infinite where they were not measured."""
    return run.metrics.get("memory/weights_bytes", math.inf)


def logged(run: StoredRun, metric: str, prefix: str = "quality") -> MetricValue:
    """A metric as logged, with its uncertainty."""
    name = f"{prefix}/{metric}"
    se, low, high = (run.metrics.get(f"{name}/{part}") for part in ("se", "ci_lo", "ci_hi"))
    return MetricValue(value=run.metrics[name], n=int(run.metrics.get(f"{name}/n", 0)), se=se, ci_lo=low, ci_hi=high)


def front_of(runs: Sequence[StoredRun], metric: str) -> list[StoredRun]:
    """The runs that no other run beats in bytes and in ``metric``, by bytes."""
    points = [(bytes_of(r), r.metrics[f"quality/{metric}"]) for r in runs]
    front = pareto_front(points, (False, bool(METRICS[metric].higher_is_better)))
    return [runs[i] for i in sorted(front, key=points.__getitem__)]


# -- the comparisons


class _Samples:
    """Per-sample values of one metric, read once a run."""

    def __init__(self, typed: str, reader: Reader, metric: str) -> None:
        self.typed, self.metric, self._reader = typed, metric, reader
        self._known: dict[str, dict[str, list[Any]]] = {}

    def of(self, run: StoredRun) -> dict[str, list[Any]]:
        """The columns of samples.json; empty where it is missing."""
        if run.run_id not in self._known:
            data = read_json(self._reader, run, "samples.json")
            self._known[run.run_id] = {k: data[k] for k in (*LAYOUT, self.metric) if k in data}
        return self._known[run.run_id]

    def common(self, runs: Sequence[StoredRun]) -> tuple[list[list[float]], Labels, Labels]:
        """The runs' values on the samples that all have, in one order, with their clusters and strata."""
        columns = [self.of(r) for r in runs]
        ids = [c.get("sample_id", list(range(len(c[self.metric])))) for c in columns]
        kept = set(ids[0]).intersection(*ids[1:])
        order = [i for i in ids[0] if i in kept]
        if not order:
            raise TrackingError(
                f"{self.typed}: {runs[0].name!r} and the others have no sample in common; choose runs of one sweep"
            )
        rows = [{name: n for n, name in enumerate(own)} for own in ids]
        values = [[c[self.metric][at[i]] for i in order] for c, at in zip(columns, rows, strict=True)]
        labels = [[columns[0][k][rows[0][i]] for i in order] if k in columns[0] else None for k in LAYOUT[1:]]
        return values, labels[0], labels[1]


def _check_metric(metric: str, protocol: str, runs: Sequence[StoredRun], samples: _Samples) -> None:
    known = [m.name for m in METRICS.values() if protocol in m.protocols and f"quality/{m.name}" in runs[0].metrics]
    if metric not in known:
        raise ConfigError(
            f"metric={metric}: these runs have no such metric{nearest(metric, known)}; they have {', '.join(known)}"
        )
    if METRICS[metric].higher_is_better is None:
        raise ConfigError(
            f"metric={metric}: neither direction of it is better; choose metric={PROTOCOLS[protocol].HEADLINE[0]}"
        )
    missing = [r.name for r in runs if f"quality/{metric}" not in r.metrics]
    if missing:
        raise ConfigError(
            f"metric={metric}: {missing[0]!r} has no such number; choose metric={PROTOCOLS[protocol].HEADLINE[0]}"
        )
    columns = samples.of(runs[0])
    if columns and metric not in columns:
        raise ConfigError(
            f"metric={metric}: is not a mean over samples, so two runs cannot be paired by it; choose "
            f"another, like metric={PROTOCOLS[protocol].HEADLINE[0]}"
        )


def _paired(
    request: ComparisonRequest, candidates: Sequence[StoredRun], front: Sequence[StoredRun]
) -> tuple[list[StoredRun], list[str]]:
    """The candidates whose pairs are compared, and what to say of the others."""
    wanted = list(candidates if request.run_ids else front)
    if len(wanted) <= MAX_PAIRED:
        return wanted, []
    kept = [wanted[round(i * (len(wanted) - 1) / (MAX_PAIRED - 1))] for i in range(MAX_PAIRED)]
    return kept, [f"pairs are compared among {MAX_PAIRED} of {len(wanted)} candidates, spread over the sizes"]


def _against_reference(candidates: Sequence[StoredRun], runs: Sequence[StoredRun], samples: _Samples) -> list[Verdict]:
    """Each candidate less the reference: from the logged interval where the reference's value is known."""
    metric = samples.metric
    known = METRICS[metric].of_reference
    if known is None or METRICS[metric].is_binary:
        return _from_samples(candidates, runs, samples)
    columns = samples.of(candidates[0])
    found = []
    for run in candidates:
        v = logged(run, metric)
        low, high = (None if bound is None else bound - known for bound in (v.ci_lo, v.ci_hi))
        shifted = MetricValue(value=v.value - known, n=v.n, se=v.se, ci_lo=low, ci_hi=high)
        same = len(columns.get(metric, ())) == v.n
        degrees = degrees_of_freedom(v.n, columns.get("clusters"), columns.get("strata")) if same else v.n - 1
        p = t_test(shifted, degrees)
        found.append(Verdict(a=run.name, b="reference", difference=shifted, test="paired t", p=p))
    return found


def _from_samples(candidates: Sequence[StoredRun], runs: Sequence[StoredRun], samples: _Samples) -> list[Verdict]:
    """Each candidate less the reference, sample by sample."""
    metric = samples.metric
    reference = reference_run(runs)
    reference = reference if reference and samples.of(reference).get(metric) else None
    known = METRICS[metric].of_reference
    if reference is None and known is None:
        raise ConfigError(
            f"metric={metric}: needs the reference's own samples, and no run of the reference was "
            "chosen; compare a whole sweep, or choose another metric"
        )
    found = []
    for run in candidates:
        if reference is not None:
            found += _tested([run, reference], [(0, 1)], samples, b_name="reference")
        else:
            values, clusters, strata = samples.common([run])
            found += _test(
                [run.name, "reference"],
                [values[0], [float(known or 0)] * len(values[0])],
                [(0, 1)],
                clusters,
                strata,
                samples.metric,
            )
    return found


def _among(runs: Sequence[StoredRun], samples: _Samples) -> list[Verdict]:
    with_samples = [r for r in runs if samples.of(r).get(samples.metric)]
    pairs = [(i, j) for i in range(len(with_samples)) for j in range(i + 1, len(with_samples))]
    return _tested(with_samples, pairs, samples) if pairs else []


def _twins(candidates: Sequence[StoredRun], samples: _Samples) -> list[Verdict]:
    """Each run of an algorithm less its twin, where both have samples."""
    plain = {_bits(r): r for r in candidates if r.params.get("quantization.algorithm") in PLAIN}
    found = []
    for run in candidates:
        twin = plain.get(_bits(run))
        if (
            twin is not None
            and run.params.get("quantization.algorithm") not in PLAIN
            and all(samples.of(r).get(samples.metric) for r in (run, twin))
        ):
            found += _tested([run, twin], [(0, 1)], samples)
    return found


def _bits(run: StoredRun) -> tuple[str | None, ...]:
    backend = backends().get(run.params.get("quantization.backend", ""))
    keys = (*SAME_BITS, *(backend.same_bits if backend else ()))
    return tuple(run.params.get(f"quantization.{k}") for k in keys)


def _tested(
    runs: Sequence[StoredRun], pairs: Sequence[tuple[int, int]], samples: _Samples, b_name: str = ""
) -> list[Verdict]:
    values, clusters, strata = samples.common(runs)
    names = [r.name for r in runs[:-1]] + [b_name or runs[-1].name]
    return _test(names, values, pairs, clusters, strata, samples.metric)


def _test(
    names: Sequence[str],
    values: Sequence[Sequence[float]],
    pairs: Sequence[tuple[int, int]],
    clusters: Labels,
    strata: Labels,
    metric: str,
) -> list[Verdict]:
    alone = clusters is None or len(set(clusters)) == len(clusters)
    binary = METRICS[metric].is_binary and alone  # McNemar's test is for independent samples
    degrees = degrees_of_freedom(len(values[0]), clusters, strata)
    found = []
    for (i, j), difference in zip(pairs, paired_differences(values, pairs, clusters, strata), strict=True):
        p = mcnemar_exact(values[i], values[j]) if binary else t_test(difference, degrees)
        test = "McNemar" if binary else "paired t"
        found.append(Verdict(a=names[i], b=names[j], difference=difference, test=test, p=p))
    return found


def _judged(found: Sequence[Verdict], metric: str, floor: float | None, margin: float) -> list[Verdict]:
    """The comparisons with Holm's p over all of them, and their verdicts."""
    with_p = [i for i, v in enumerate(found) if v.p is not None]
    adjusted = dict(zip(with_p, holm([float(found[i].p or 0.0) for i in with_p]), strict=True))
    return [
        replace(v, p_holm=adjusted.get(i), text=verdict(v.difference, adjusted.get(i), metric, floor, margin))
        for i, v in enumerate(found)
    ]


def verdict(difference: MetricValue, p: float | None, metric: str, floor: float | None, margin: float) -> str:
    """The verdict on one difference; ``p`` is adjusted, ``floor`` what the bf16 cast of the reference costs."""
    size, low, high = abs(difference.value), difference.ci_lo, difference.ci_hi
    if low is None or high is None or p is None:
        return TOO_FEW
    if low <= 0 <= high or p >= ALPHA:
        return SAME
    if floor is not None and size <= floor:
        return IN_FLOOR
    if size <= margin:
        return IN_MARGIN
    return BETTER if (difference.value > 0) == METRICS[metric].higher_is_better else WORSE


# -- the answer


def answers(group: Comparison) -> list[tuple[str, str]]:
    """(question, run name) of the schemes that a reader asks for first; a question without an answer is left out."""
    by_bytes = sorted(group.candidates, key=bytes_of)
    cost = -1.0 if group.floor_cost is None else group.floor_cost
    lossless = [
        r.name
        for r in by_bytes
        if group.verdicts[r.name].text in (IN_FLOOR, SAME) and abs(group.verdicts[r.name].difference.value) <= cost
    ]
    found = [("smallest without measurable loss (inside the bf16 floor)", lossless[0])] if lossless else []
    if group.margin:
        near = [r.name for r in by_bytes if _surely_inside(group.verdicts[r.name], group.margin)]
        found += [(f"smallest that is surely inside the margin of {group.margin:g}", near[0])] if near else []
    if group.front:
        found += [("closest to the reference", group.front[-1]), ("smallest on the Pareto front", group.front[0])]
    if by_bytes and group.verdicts[by_bytes[0].name].text == TOO_FEW:
        found.append((f"too few samples for a verdict: take {MIN_CLUSTERS} or more", ""))
    return found


def _surely_inside(v: Verdict, margin: float) -> bool:
    """Non-inferiority: the whole interval is inside the margin."""
    low, high = v.difference.ci_lo, v.difference.ci_hi
    return low is not None and high is not None and max(abs(low), abs(high)) <= margin
