"""What a reader of the page can choose: under which metric schemes are compared, and against what they are plotted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypedDict

from quantlab.metrics import METRICS
from quantlab.report.compare import Comparison, by_metrics, front_of
from quantlab.report.comparison_data import Cost, PairData, VerdictData, costs, group_data, verdict_data
from quantlab.report.reading import Reader, StoredRun
from quantlab.report.selection import backends_of
from quantlab.report.verdicts import floor_of_all
from quantlab.tracking.used import UNSET
from quantlab.vocabulary.numbers import time_in_words

_OF_COMPONENT = re.compile(r"components\.(\w+)\.backend")
STAGE_TIMES = frozenset(
    f"perf/{stage}_s"
    for stage in (
        "load",
        "observe",
        "calibrate",
        "quantize",
        "evidence",
        "warm_up",
        "compile",
        "attribute",
        "speed",
        "track",
        "export",
    )
)
"""How long a run's own stages took is nothing that a scheme is chosen by."""
_FIRST = {
    "memory/weights_bytes": ("weights_bytes", "size of the weights", "bytes"),
    "memory/bits_per_weight_model": ("bits_per_weight_model", "bits per weight", ""),
    "memory/bits_per_weight_quantized": ("bits_per_weight_quantized", "bits per weight in quantized layers", ""),
    "memory/needed_bytes": ("needed_bytes", "memory needed on the GPU", "bytes"),
    "memory/evaluate/peak_alloc_bytes": ("peak_alloc_bytes", "peak GPU memory of the evaluation", "bytes"),
    "memory/evaluate/peak_rss_bytes": ("peak_rss_bytes", "peak memory of the evaluation", "bytes"),
    "memory/disk_bytes_model": ("disk_bytes", "size on the disk", "bytes"),
}
"""Tracked name -> the axis' key, title and unit."""
ON_A_CPU = "Times on a CPU: the order of the schemes on a GPU may be another."
IN_ONE_PROCESS = (
    "The peak also holds the process, the reference and what earlier jobs left: isolate jobs to compare it."
)


class Axis(TypedDict):
    """What a scheme's metric is plotted against; bytes are written as MiB or GiB by the page."""

    key: str
    title: str
    unit: str
    higher_is_better: bool
    note: str


class View(TypedDict):
    """The comparison under one metric."""

    metric: str
    unit: str
    higher_is_better: bool | None
    is_tested: bool
    """False: not a mean over samples, so that values are shown and differences not judged."""
    floor: float | None
    floor_name: str | None
    front: list[str]
    notes: list[str]
    verdicts: dict[str, VerdictData]
    pairs: list[PairData]
    twins: list[PairData]
    costs: list[Cost]
    """Of schemes whose components were measured apart."""


def metrics_of(group: Comparison) -> list[str]:
    """The metrics that all candidates have and that have a better direction, the comparison's own first."""
    found = [
        m.name
        for m in METRICS.values()
        if m.higher_is_better is not None
        and not m.is_curve
        and all(f"quality/{m.name}" in r.metrics for r in group.candidates)
    ]
    return list(dict.fromkeys([group.metric, *found]))


def views(group: Comparison, reader: Reader) -> dict[str, View]:
    """Metric -> the comparison under it; the comparison's own first."""
    metrics = metrics_of(group)
    tested = {g.metric: g for g in (group, *by_metrics(group, metrics[1:], reader))}
    return {m: _tested(tested[m]) if m in tested else _untested(group, m) for m in metrics}


def _tested(group: Comparison) -> View:
    data = group_data(group)
    return {
        "metric": group.metric,
        "unit": data["unit"],
        "higher_is_better": data["higher_is_better"],
        "is_tested": True,
        "floor": data["floor"],
        "floor_name": data["floor_name"],
        "front": data["front"],
        "notes": data["notes"],
        "verdicts": {name: verdict_data(v) for name, v in group.verdicts.items()},
        "pairs": data["pairs"],
        "twins": data["twins"],
        "costs": data["costs"],
    }


def _untested(group: Comparison, metric: str) -> View:
    floor = floor_of_all([r.metrics for r in group.candidates], metric)
    return {
        "metric": metric,
        "unit": METRICS[metric].unit,
        "higher_is_better": METRICS[metric].higher_is_better,
        "is_tested": False,
        "floor": floor.value if floor else None,
        "floor_name": floor.name if floor else None,
        "front": [r.name for r in front_of(group.candidates, metric)],
        "notes": [],
        "verdicts": {},
        "pairs": [],
        "twins": [],
        "costs": costs(group.candidates, metric),
    }


def axes(runs: Sequence[StoredRun]) -> list[Axis]:
    """What these candidates can be plotted against: what at least two of them have and do not all share."""
    times = sorted(
        {k for r in runs for k in r.metrics if k.startswith("perf/")} - STAGE_TIMES - {"perf/representative"}
    )
    on_cpu = any(r.metrics.get("perf/representative") == 0 for r in runs)
    found: list[Axis] = []
    for name in [*_FIRST, *times]:
        values = [r.metrics[name] for r in runs if r.metrics.get(name, 0) > 0]
        if name != "memory/weights_bytes" and (len(values) < 2 or len(set(values)) < 2):
            continue
        is_time = name.startswith("perf/")
        key, title, unit = (name.removeprefix("perf/"), *time_in_words(name)) if is_time else _FIRST[name]
        is_rate = name.removesuffix("_p90").endswith("_per_s")
        note = ON_A_CPU if is_time and on_cpu else IN_ONE_PROCESS if "/peak_" in name else ""
        found.append({"key": key, "title": title, "unit": unit, "higher_is_better": is_rate, "note": note})
    return found


def kinds(runs: Sequence[StoredRun]) -> dict[str, dict[str, str]]:
    """What colours can tell apart -> a candidate's name -> its word: the backend, a component's scheme, and axes.

    What best tells these candidates apart comes first: where components have their own schemes, that of the one which
    has most of them; else the backend, or what differs where that does not. What all share is left out.
    """
    found = {"backend": {r.name: " + ".join(sorted({*backends_of(r.params)} - {"none", ""})) or "none" for r in runs}}
    names = dict.fromkeys(m[1] for r in runs for key in sorted(r.params) if (m := _OF_COMPONENT.fullmatch(key)))
    own = {name: {r.name: _scheme_of(r, name) for r in runs} for name in names}
    for axis in ("dtype", "group_size", "algorithm"):
        found[axis] = {r.name: r.params.get(f"quantization.{axis}", "") or "none" for r in runs}
    if own:
        found = {"backend": found["backend"]}  # the axes are of the others, or of none
    by_most = sorted(own.items(), key=lambda item: -len({*item[1].values()}))
    telling = {name: words for name, words in [*by_most, *found.items()] if len({*words.values()}) > 1}
    return telling or {"backend": found["backend"]}


def _scheme_of(run: StoredRun, component: str) -> str:
    node = f"components.{component}"
    node = node if f"{node}.backend" in run.params else "quantization"
    words = [word for axis in ("backend", "dtype") if (word := run.params.get(f"{node}.{axis}", "")) not in UNSET]
    return "none" if words[:1] in ([], ["none"]) else " ".join(words)


def axis_values(run: StoredRun) -> dict[str, float]:
    """A run's place on each axis, by the axis' key."""
    named = {name: key for name, (key, _, _) in _FIRST.items()}
    return {
        named.get(k, k.removeprefix("perf/")): v
        for k, v in run.metrics.items()
        if k in named or (k.startswith("perf/") and k not in STAGE_TIMES)
    }
