"""What is said of one difference, and the rules by which it is said.

The difference is that of the means on the same samples, with its interval over clusters; p is the paired t-test's on
cluster differences (exact McNemar's for a metric of 0 and 1), Holm-adjusted over all comparisons of the group. In this
order:

* **too few samples**: below 5 clusters there is no interval;
* **inside the floor**: surely no larger than what another execution of the unquantized model costs. The bound of the
  difference and that of the floor are compared, not their middles (an equivalence test), and on the metric's scale of
  errors: decibels have no zero, so PSNR is judged by the squared error behind it;
* **inside the margin**: the whole interval is inside the declared margin;
* **not distinguishable**: the interval holds 0, or the adjusted p is 0.05 or more. Where the differences are skewed and
  Wilcoxon's signed-rank test, adjusted likewise, finds that most samples lean one way, it says so: **worse by rank**,
  **better by rank**;
* **near the floor**: real, and it cannot be told whether it is larger than the floor;
* **better**, **worse**: real, and surely larger than the floor where one is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from quantlab.metrics import METRICS
from quantlab.metrics.significance import ALPHA, holm
from quantlab.vocabulary.numbers import FLOORS, OTHER_BATCH, metric_value
from quantlab.vocabulary.reports import MetricValue

BETTER, WORSE, SAME = "better", "worse", "not distinguishable"
IN_FLOOR, IN_MARGIN, TOO_FEW = "inside the floor", "inside the margin", "too few samples"
NEAR_FLOOR, BETTER_BY_RANK, WORSE_BY_RANK = "near the floor", "better by rank", "worse by rank"
RULES = {
    IN_FLOOR: "surely costs no more than another execution of the unquantized model does",
    SAME: "the interval of the difference holds 0, or its adjusted p is 0.05 or more",
    WORSE_BY_RANK: "the means cannot be told apart, but most samples are worse (Wilcoxon's signed-rank test)",
    BETTER_BY_RANK: "the means cannot be told apart, but most samples are better (Wilcoxon's signed-rank test)",
    IN_MARGIN: "the whole interval of the difference is inside the declared margin",
    NEAR_FLOOR: "a real difference, which may or may not be larger than the floor",
    BETTER: "a real difference in favour, surely larger than the floor where one is known; of two schemes: X is better",
    WORSE: "a real loss against the reference, surely larger than the floor where one is known",
    TOO_FEW: "fewer than 5 independent samples: no interval, no verdict",
}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One comparison: ``a`` less ``b``."""

    a: str
    b: str
    difference: MetricValue
    test: str
    p: float | None = None
    p_holm: float | None = None
    in_error: MetricValue | None = None
    """The difference on the metric's scale of errors, where that is another metric; None: not known."""
    p_rank: float | None = None
    """Wilcoxon's, where the differences are skewed; adjusted by Holm once judged."""
    share_worse: float | None = None
    """Share of the clusters in which ``a`` is worse than ``b``; those that are equal count half."""
    text: str = TOO_FEW


@dataclass(frozen=True, kw_only=True)
class Floor:
    """What another execution of the unquantized model costs."""

    name: str
    """Of its row: ``floor_bf16``, ``floor_batch``..."""
    value: float
    """The metric itself."""
    cost: MetricValue
    """Its distance from the reference's own value, on the metric's scale of errors."""


def largest_floor(
    metrics: Mapping[str, float], metric: str, reference: Mapping[str, float] | None = None
) -> Floor | None:
    """The largest of the floors in a row's ``metrics``; None where none was measured, or all are 0.

    ``reference`` holds the reference's own numbers, for metrics that do not know beforehand what they are for it.
    """
    error = error_metric(metric)
    known = METRICS[error].of_reference
    if known is None:
        known = (reference or {}).get(f"quality/{error}")
    if known is None:
        return None
    found = []
    for name in FLOORS:
        prefix = f"quality/{name}"
        if f"{prefix}/{metric}" in metrics and f"{prefix}/{error}" in metrics:
            cost = _distance(metric_value(metrics, f"{prefix}/{error}"), known, METRICS[error].of_reference is not None)
            found.append(Floor(name=name, value=metrics[f"{prefix}/{metric}"], cost=cost))
    largest = max(found, key=lambda f: f.cost.value, default=None)
    return largest if largest is not None and largest.cost.value > 0 else None


def floor_of_all(
    rows: Iterable[Mapping[str, float]], metric: str, reference: Mapping[str, float] | None = None
) -> Floor | None:
    """The largest that any of the rows' ``metrics`` has: all are floors of one reference."""
    found = (largest_floor(row, metric, reference) for row in rows)
    return max((floor for floor in found if floor is not None), key=lambda floor: floor.cost.value, default=None)


def error_metric(metric: str) -> str:
    """The metric on whose scale distances are judged: itself, but for decibels."""
    return METRICS[metric].error_metric or metric


def _distance(value: MetricValue, known: float, has_interval: bool) -> MetricValue:
    """``value`` as a distance from ``known``; its interval is one of the distance only where ``known`` is exact."""
    size = abs(value.value - known)
    if not has_interval or value.ci_lo is None or value.ci_hi is None:
        return MetricValue(value=size, n=value.n)
    low, high = sorted((value.ci_lo - known, value.ci_hi - known))
    return MetricValue(value=size, n=value.n, ci_lo=_least(low, high), ci_hi=max(abs(low), abs(high)))


def less(value: MetricValue, known: float) -> MetricValue:
    """``value`` as a difference from an exact number."""
    low, high = (None if bound is None else bound - known for bound in (value.ci_lo, value.ci_hi))
    return MetricValue(value=value.value - known, n=value.n, se=value.se, ci_lo=low, ci_hi=high)


def with_other_batch(value: MetricValue, metrics: Mapping[str, float], metric: str) -> MetricValue:
    """``value`` with bounds that hold the number at another batch size too, where a row has one."""
    other = metrics.get(f"{OTHER_BATCH}/{metric}")
    if other is None or value.ci_lo is None or value.ci_hi is None:
        return value
    return replace(value, ci_lo=min(value.ci_lo, other), ci_hi=max(value.ci_hi, other))


def _least(low: float, high: float) -> float:
    return 0.0 if low <= 0 <= high else min(abs(low), abs(high))


def is_inside(difference: MetricValue, floor: MetricValue) -> bool | None:
    """Is a difference surely no larger than a floor (True), surely larger (False), or neither (None)?

    The interval of |difference| less floor is put together from theirs as Zou and Donner's (Statistics in Medicine 27,
    2008, 1693-1702) for independent estimates; these share their samples and rise together, so it is rather too wide.
    """
    if difference.ci_lo is None or difference.ci_hi is None:
        return None
    size = abs(difference.value)
    least = _least(difference.ci_lo, difference.ci_hi)
    most = max(abs(difference.ci_lo), abs(difference.ci_hi))
    of_floor = (
        floor.value if floor.ci_lo is None else floor.ci_lo,
        floor.value if floor.ci_hi is None else floor.ci_hi,
    )
    middle = size - floor.value
    if middle + math.hypot(most - size, floor.value - of_floor[0]) <= 0:
        return True
    return False if middle - math.hypot(size - least, of_floor[1] - floor.value) > 0 else None


def verdict(found: Verdict, metric: str, floor: Floor | None, margin: float) -> str:
    """The verdict on one difference, whose p-values are adjusted already."""
    difference = found.difference
    low, high = difference.ci_lo, difference.ci_hi
    if low is None or high is None or found.p_holm is None:
        return TOO_FEW
    on_errors = difference if error_metric(metric) == metric else found.in_error
    inside = is_inside(on_errors, floor.cost) if floor is not None and on_errors is not None else False
    if inside:
        return IN_FLOOR
    if margin and max(abs(low), abs(high)) <= margin:
        return IN_MARGIN
    if low <= 0 <= high or found.p_holm >= ALPHA:
        return _by_rank(found)
    if inside is None:
        return NEAR_FLOOR
    return BETTER if (difference.value > 0) == METRICS[metric].higher_is_better else WORSE


def _by_rank(found: Verdict) -> str:
    if found.p_rank is None or found.share_worse is None or found.p_rank >= ALPHA or found.share_worse == 0.5:
        return SAME
    return WORSE_BY_RANK if found.share_worse > 0.5 else BETTER_BY_RANK


def pair_said(v: Verdict) -> str:
    """The verdict on two schemes, by name: neither of them is the one that is looked at."""
    if v.text.startswith((BETTER, WORSE)):
        return f"{v.a if v.text.startswith(BETTER) else v.b} is better{v.text.removeprefix(BETTER).removeprefix(WORSE)}"
    return v.text


def judged(found: Sequence[Verdict], metric: str, floor: Floor | None, margin: float) -> list[Verdict]:
    """The comparisons with Holm's p over all of them, and their verdicts; without a verdict no p stands beside it."""
    means, ranks = _adjusted(found, [v.p for v in found]), _adjusted(found, [v.p_rank for v in found])
    adjusted = [replace(v, p_holm=p, p_rank=rank) for v, p, rank in zip(found, means, ranks, strict=True)]
    told = [replace(v, text=verdict(v, metric, floor, margin)) for v in adjusted]
    return [replace(v, p_holm=None, p_rank=None) if v.text == TOO_FEW else v for v in told]


def _adjusted(found: Sequence[Verdict], p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's p over what has one: two schemes are one comparison, where they stand twice too (as pair and as twins)."""
    known = {frozenset((v.a, v.b)): p for v, p in zip(found, p_values, strict=True) if p is not None}
    adjusted = dict(zip(known, holm([*known.values()]), strict=True))
    return [None if p is None else adjusted[frozenset((v.a, v.b))] for v, p in zip(found, p_values, strict=True)]


def num_tested(found: Iterable[Verdict]) -> int:
    """How many comparisons Holm's p is over."""
    return len({frozenset((v.a, v.b)) for v in found if v.p is not None})


def distinguishable_front(front: Sequence[str], pairs: Sequence[Verdict]) -> list[str]:
    """Of a front's names, by bytes, those that are surely better than every smaller one that is kept.

    A pair that was not compared, or has too few samples, takes nothing from the front.
    """
    known = {frozenset((v.a, v.b)): v for v in pairs}
    kept: list[str] = []
    for name in front:
        against = [known.get(frozenset((name, smaller))) for smaller in kept]
        if all(v is None or v.text == TOO_FEW or v.text == (BETTER if v.a == name else WORSE) for v in against):
            kept.append(name)
    return kept
