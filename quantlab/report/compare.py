"""Which scheme is better, and is the difference real: every candidate against the reference, and pairs of candidates.

Compared are each candidate and the reference, the pairs among the Pareto front (among all candidates where runs were
named one by one), and each algorithm and the plain one on the same bits; :mod:`quantlab.report.verdicts` has the rules.
Against the reference the logged intervals are used: a fidelity metric is itself the paired difference.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from quantlab.backends.table import backends
from quantlab.errors import ConfigError, TrackingError, nearest
from quantlab.metrics import METRICS
from quantlab.metrics.significance import is_skewed, mcnemar_exact, rank_test, t_test
from quantlab.metrics.statistics import (
    MIN_CLUSTERS,
    cluster_means,
    degrees_of_freedom,
    less_rounding,
    paired_differences,
    within,
)
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.elsewhere import said_elsewhere
from quantlab.report.pareto import pareto_front
from quantlab.report.reading import Reader, StoredRun, read_json
from quantlab.report.selection import (
    ComparisonRequest,
    Selection,
    backends_of,
    group_labels,
    is_candidate,
    scheme_nodes,
)
from quantlab.report.verdicts import (
    IN_FLOOR,
    TOO_FEW,
    Floor,
    Verdict,
    distinguishable_front,
    error_metric,
    floor_of_all,
    judged,
    less,
    with_other_batch,
)
from quantlab.vocabulary.numbers import REFERENCE, metric_value
from quantlab.vocabulary.reports import MetricValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_PAIRED = 20
PLAIN = ("auto", "max")
"""Algorithms that take each scale from the largest weight."""
SAME_BITS = (
    *("backend", "dtype", "group_size", "activation_dtype", "compute_dtype"),
    *("layer_kinds", "on_mismatch", "replace_default_exclusions"),
)
"""Settings in which a run and its twin of the plain algorithm agree, beside the exclusions."""
LAYOUT = ("sample_id", "clusters", "strata")
_Columns = dict[str, dict[str, list[Any]]]
"""Run id -> the columns of its samples."""
Labels = list[int] | None
"""The cluster, or the stratum, of each sample; None: each is its own, or all are of one."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparable runs under one metric. ``verdicts`` are by run name, against the reference; ``label`` tells groups
    apart."""

    request: ComparisonRequest
    label: str
    protocol: str
    metric: str
    margin: float
    n: int
    floor: Floor | None
    """The largest that was measured; None: none is known."""
    runs: tuple[StoredRun, ...]
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    front: tuple[str, ...] = ()
    """Names of the candidates that are surely better than every smaller one on it, by bytes."""
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
        alone = (
            "; each unquantized model is its own reference, also with another model.dtype: backend=none dtype=bfloat16 "
            "is a cast that is compared with it"
        )
        raise TrackingError(
            f"{request.typed}: no finished run of a quantized model to compare{there_are}"
            f"{alone if selection.groups else ''}; run a recipe first, or choose another sweep"
        )
    return [_compare_group(request, g, label, reader) for g, label in zip(groups, group_labels(groups), strict=True)]


def by_metrics(group: Comparison, metrics: Iterable[str], reader: Reader) -> Iterator[Comparison]:
    """The same runs under other metrics, without those in which they cannot be paired; no margin, it has a unit."""
    known: _Columns = {}
    for metric in metrics:
        with contextlib.suppress(ConfigError, TrackingError):
            request = replace(group.request, metric=metric, margin=0.0)
            yield _compare_group(request, group.runs, group.label, reader, known)


def _compare_group(
    request: ComparisonRequest, runs: Sequence[StoredRun], label: str, reader: Reader, known: _Columns | None = None
) -> Comparison:
    every = sorted((r for r in runs if is_candidate(r)), key=bytes_of)
    protocol = next(filter(None, map(protocol_of, every)), "")
    if not protocol:
        raise TrackingError(f"{request.typed}: {every[0].name!r} has no quality number; choose runs that ended")
    metric = request.metric or PROTOCOLS[protocol].HEADLINE[0]
    samples = _Samples(request.typed, reader, metric, {} if known is None else known)
    candidates = _with_metric(metric, protocol, every, samples)
    lacking = [r for r in every if r not in candidates]
    runs = [r for r in runs if r not in lacking]
    points = front_of(candidates, metric)
    paired, notes = _paired(request, candidates, points)
    if lacking:
        notes.append(f"left out, without {metric}: {', '.join(r.name for r in lacking)}")
    among = _among(paired, samples)
    found = [*_against_reference(candidates, runs, samples), *among, *_twins(candidates, samples)]
    reference = reference_run(runs)
    floor = floor_of_all([r.metrics for r in candidates], metric, reference.metrics if reference else None)
    verdicts = judged(found, metric, floor, request.margin)
    rest = verdicts[len(candidates) :]
    pairs = rest[: len(among)]
    front = distinguishable_front([r.name for r in points], pairs)
    if len(front) < len(points):
        alike = ", ".join(r.name for r in points if r.name not in front)
        beyond = " by more than the floor" if floor is not None else ""  # where pairs, too, are inside it
        told = f"no better than a smaller scheme{beyond}, as far as can be told"
        notes.append(f"not on the front, since {told}: {alike}")
    notes += said_elsewhere(((run.name, backends_of(run.params), run.metrics) for run in candidates), protocol)
    if floor is None:
        notes.append("no floor is known: no other execution of the reference was measured, or each gave its outputs")
    return Comparison(
        request=request,
        label=label,
        protocol=protocol,
        metric=metric,
        margin=request.margin,
        floor=floor,
        runs=tuple(runs),
        n=int(candidates[0].metrics.get(f"quality/{metric}/n", 0)),
        verdicts={v.a: v for v in verdicts[: len(candidates)]},
        pairs=tuple(pairs),
        twins=tuple(rest[len(among) :]),
        front=tuple(front),
        notes=tuple(notes),
    )


def protocol_of(run: StoredRun) -> str:
    """The protocol whose first headline metric the run has."""
    return next((p for p, row in PROTOCOLS.items() if f"quality/{row.HEADLINE[0]}" in run.metrics), "")


def reference_run(runs: Sequence[StoredRun]) -> StoredRun | None:
    """The unquantized model's own row, if it was tracked."""
    return next((r for r in runs if r.name.split(" #")[0] == REFERENCE and not is_candidate(r)), None)


def bytes_of(run: StoredRun) -> float:
    """The model's bytes as stored; infinite where they were not measured."""
    return run.metrics.get("memory/weights_bytes", math.inf)


def front_of(runs: Sequence[StoredRun], metric: str) -> list[StoredRun]:
    """The runs that no other run beats in bytes and in ``metric``, by bytes."""
    points = [(bytes_of(r), r.metrics[f"quality/{metric}"]) for r in runs]
    front = pareto_front(points, (False, bool(METRICS[metric].higher_is_better)))
    return [runs[i] for i in sorted(front, key=points.__getitem__)]


# -- the comparisons


@dataclass(frozen=True)
class _Common:
    """Values of several runs on the samples that all of them have."""

    metric: str
    values: list[list[float]]
    errors: list[list[float]] | None
    """The same on the metric's scale of errors, where that is another metric."""
    clusters: Labels
    strata: Labels


class _Samples:
    """Per-sample values of one metric, and of the one behind it, read once a run."""

    def __init__(self, typed: str, reader: Reader, metric: str, known: _Columns) -> None:
        self.typed, self.metric, self._reader, self._known = typed, metric, reader, known

    def of(self, run: StoredRun) -> dict[str, list[Any]]:
        """The columns of samples.json; empty where it is missing."""
        if run.run_id not in self._known:
            self._known[run.run_id] = read_json(self._reader, run, "samples.json")
        return self._known[run.run_id]

    def common(self, runs: Sequence[StoredRun]) -> _Common:
        """The runs' values on the samples that all have, in one order, with their clusters and strata."""
        columns = [self.of(r) for r in runs]
        if lacking := [r.name for r, c in zip(runs, columns, strict=True) if self.metric not in c]:
            raise TrackingError(
                f"{self.typed}: of {lacking[0]!r} there is no {self.metric} of each sample (samples.json is gone, or "
                "changed); run the job again, or choose a metric that needs none"
            )
        ids = [c.get("sample_id", list(range(len(c[self.metric])))) for c in columns]
        kept = set(ids[0]).intersection(*ids[1:])
        order = [i for i in ids[0] if i in kept]
        if not order:
            raise TrackingError(
                f"{self.typed}: {runs[0].name!r} and the others have no sample in common; choose runs of one sweep"
            )
        rows = [{name: n for n, name in enumerate(own)} for own in ids]
        labels = [[columns[0][k][rows[0][i]] for i in order] if k in columns[0] else None for k in LAYOUT[1:]]

        def of(metric: str) -> list[list[float]]:
            return [[c[metric][at[i]] for i in order] for c, at in zip(columns, rows, strict=True)]

        error = error_metric(self.metric)
        has_errors = error != self.metric and all(error in c for c in columns)
        return _Common(self.metric, of(self.metric), of(error) if has_errors else None, labels[0], labels[1])


def _with_metric(metric: str, protocol: str, runs: Sequence[StoredRun], samples: _Samples) -> list[StoredRun]:
    """Those of the runs that have the metric; ConfigError where none has it, or it cannot be compared."""
    of_protocol = [m.name for m in METRICS.values() if protocol in m.protocols and not m.is_curve]
    known = [name for name in of_protocol if any(f"quality/{name}" in r.metrics for r in runs)]
    if metric not in known:
        near = nearest(metric, [*known, *(name.removesuffix("_db") for name in known)])
        if not near and (meant := metric if metric in METRICS else nearest(metric, METRICS)[15:-1]):
            near = f"; {meant} is of {' and '.join(METRICS[meant].protocols)}, and these are of {protocol}"
        raise ConfigError(f"metric={metric}: these runs have no such metric; they have {', '.join(known)}{near}")
    if METRICS[metric].higher_is_better is None:
        raise ConfigError(
            f"metric={metric}: neither direction of it is better; choose metric={PROTOCOLS[protocol].HEADLINE[0]}"
        )
    found = [r for r in runs if f"quality/{metric}" in r.metrics]
    columns = samples.of(found[0])
    if columns and metric not in columns:
        raise ConfigError(
            f"metric={metric}: is not a mean over samples, so two runs cannot be paired by it; choose "
            f"another, like metric={PROTOCOLS[protocol].HEADLINE[0]}"
        )
    return found


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
    with_samples = next((c for c in map(samples.of, candidates) if c.get(metric)), {})
    found = []
    for run in candidates:
        shifted = less(_logged(run, metric), known)
        columns, n = samples.of(run) or with_samples, shifted.n  # all of a group have the same samples
        same = len(columns.get(metric, ())) == n
        degrees = degrees_of_freedom(n, columns.get("clusters"), columns.get("strata")) if same else n - 1
        p = t_test(shifted, degrees)
        in_error = _logged_error(run, metric)
        found.append(Verdict(a=run.name, b=REFERENCE, difference=shifted, test="paired t", p=p, in_error=in_error))
    return found


def _logged(run: StoredRun, metric: str) -> MetricValue:
    known = within(metric_value(run.metrics, f"quality/{metric}"), METRICS[metric].bounds)
    return with_other_batch(known, run.metrics, metric)


def _logged_error(run: StoredRun, metric: str) -> MetricValue | None:
    """The run's distance from the reference on the metric's scale of errors; None where it was not logged."""
    error = error_metric(metric)
    known = METRICS[error].of_reference
    if known is None or f"quality/{error}" not in run.metrics:
        return None
    return less(_logged(run, error), known)


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
            found += _tested([run, reference], [(0, 1)], samples, b_name=REFERENCE)
        else:
            alone = samples.common([run])
            own = [float(known or 0)] * len(alone.values[0])
            found += _test([run.name, REFERENCE], replace(alone, values=[*alone.values, own], errors=None), [(0, 1)])
    if known is None:
        return found
    possible = METRICS[metric].at_least - known, METRICS[metric].at_most - known  # of a difference to a known number
    return [replace(v, difference=within(v.difference, possible)) for v in found]


def _among(runs: Sequence[StoredRun], samples: _Samples) -> list[Verdict]:
    with_samples = [r for r in runs if samples.of(r).get(samples.metric)]
    pairs = [(i, j) for i in range(len(with_samples)) for j in range(i + 1, len(with_samples))]
    return _tested(with_samples, pairs, samples) if pairs else []


def _twins(candidates: Sequence[StoredRun], samples: _Samples) -> list[Verdict]:
    """Each run of an algorithm less its twin, where both have samples."""
    plain = {_bits(r): r for r in candidates if _is_plain(r)}
    found = []
    for run in candidates:
        twin = plain.get(_bits(run))
        if twin is not None and not _is_plain(run) and all(samples.of(r).get(samples.metric) for r in (run, twin)):
            found += _tested([run, twin], [(0, 1)], samples)
    return found


def _is_plain(run: StoredRun) -> bool:
    return all(run.params.get(f"{node}.algorithm") in PLAIN for node in scheme_nodes(run.params))


def _bits(run: StoredRun) -> tuple[str | None, ...]:
    found: list[str | None] = []
    for node, name in scheme_nodes(run.params).items():
        backend = backends().get(name)
        keys = (*SAME_BITS, *(backend.same_bits if backend else ()))
        found += [node, *(run.params.get(f"{node}.{k}") for k in keys)]
        excluded = sorted(i for i in run.params.items() if i[0].startswith(f"{node}.modules_to_not_convert"))
        found += [text for item in excluded for text in item]
    return (*found, run.params.get("evaluation.compile"))


def _tested(
    runs: Sequence[StoredRun], pairs: Sequence[tuple[int, int]], samples: _Samples, b_name: str = ""
) -> list[Verdict]:
    names = [r.name for r in runs[:-1]] + [b_name or runs[-1].name]
    return _test(names, samples.common(runs), pairs)


def _test(names: Sequence[str], common: _Common, pairs: Sequence[tuple[int, int]]) -> list[Verdict]:
    values, clusters, strata = common.values, common.clusters, common.strata
    alone = clusters is None or len(set(clusters)) == len(clusters)
    binary = METRICS[common.metric].is_binary and alone  # McNemar's test is for independent samples
    degrees = degrees_of_freedom(len(values[0]), clusters, strata)
    differences = _differences(common.metric, values, pairs, common)
    errors = error_metric(common.metric)
    in_error = _differences(errors, common.errors, pairs, common) if common.errors else [None] * len(pairs)
    means = [cluster_means(v, clusters) for v in values]
    found = []
    for (i, j), difference, error in zip(pairs, differences, in_error, strict=True):
        p = mcnemar_exact(values[i], values[j]) if binary else t_test(difference, degrees)
        by_cluster = less_rounding(means[i], means[j])
        ranked = not binary and is_skewed(by_cluster)
        found.append(
            Verdict(
                a=names[i],
                b=names[j],
                difference=difference,
                test="McNemar" if binary else "paired t",
                p=p,
                in_error=error,
                p_rank=rank_test(by_cluster) if ranked else None,
                share_worse=_share_worse(by_cluster, common.metric) if ranked else None,
            )
        )
    return found


def _differences(
    metric: str, values: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]], common: _Common
) -> list[MetricValue]:
    found = paired_differences(values, pairs, common.clusters, common.strata)
    return [within(difference, METRICS[metric].bounds_of_difference) for difference in found]


def _share_worse(differences: NDArray[np.float64], metric: str) -> float:
    """Share of the clusters in which the first is worse; equal ones count half."""
    up = 1 if METRICS[metric].higher_is_better else -1
    return float((differences * up < 0).mean() + (differences == 0).mean() / 2)


# -- the answer


def answers(group: Comparison) -> list[tuple[str, str]]:
    """(question, run name) of the schemes that a reader asks for first; a question without an answer is left out."""
    by_bytes = sorted(group.candidates, key=lambda r: (bytes_of(r), _distance(group, r)))
    lossless = [r.name for r in by_bytes if group.verdicts[r.name].text == IN_FLOOR]
    found = [("smallest without measurable loss (inside the floor)", lossless[0])] if lossless else []
    if group.margin:
        inside = (v.a for v in map(group.verdicts.__getitem__, (r.name for r in by_bytes)) if _within(v, group.margin))
        found += [(f"smallest that is surely inside the margin of {group.margin:g}", name) for name in [*inside][:1]]
    if group.front:
        found += [("closest to the reference", _closest(group)), ("smallest on the Pareto front", group.front[0])]
    if by_bytes and group.verdicts[by_bytes[0].name].text == TOO_FEW:
        found.append((f"too few samples for a verdict: take {MIN_CLUSTERS} or more", ""))
    return found


def _closest(group: Comparison) -> str:
    return min(group.candidates, key=lambda r: _distance(group, r)).name


def _distance(group: Comparison, run: StoredRun) -> float:
    """By how much a candidate's metric differs from the reference's."""
    return abs(group.verdicts[run.name].difference.value)


def _within(v: Verdict, margin: float) -> bool:
    """Non-inferiority: the whole interval is inside the margin."""
    low, high = v.difference.ci_lo, v.difference.ci_hi
    return low is not None and high is not None and max(abs(low), abs(high)) <= margin
