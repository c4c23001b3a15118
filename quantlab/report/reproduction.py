"""A run beside its repetition: each number identical, within its interval or different, and what has changed around it.

What is measured of the machine (seconds, peak memory) differs from run to run; it is listed apart and judged never.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypedDict

from quantlab.metrics import METRICS, bounds_of
from quantlab.metrics.statistics import wilson_interval
from quantlab.report.reading import json_object
from quantlab.report.terminal import Column, Sheet
from quantlab.tracking.tags import (
    CALIBRATION_SHA256,
    DEVICE,
    INPUTS_SHA256,
    JUDGE_SHA256,
    MODEL_PARTS,
    VERSIONS,
    WEIGHTS_SHA256,
)
from quantlab.vocabulary.numbers import CHECKPOINT_SHA256, NEEDED_BYTES

IDENTICAL, WITHIN, DIFFERENT = "identical", "within its interval", "different"
_PARTS = ("se", "ci_lo", "ci_hi", "n")
_SHARED_TAGS = (DEVICE, WEIGHTS_SHA256, INPUTS_SHA256, JUDGE_SHA256, CALIBRATION_SHA256, CHECKPOINT_SHA256)
_EXACT = ("memory/", "quantization/num", "quantization/group", "quantization/coverage")
ROUNDING = 1e-6
"""Relative difference that another order of float sums makes, added to every interval (and 1e-9 for values near 0)."""
NO_INTERVAL = 1e-3
"""Relative difference up to which a number without an uncertainty (a point of a curve, a weight error) is the same."""
_STYLES = {IDENTICAL: "green", WITHIN: "yellow", DIFFERENT: "red"}


class RunNumbers(TypedDict):
    """A run as it is compared."""

    run_id: str
    name: str
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One number of the run and of its repetition; None where a run does not have it."""

    name: str
    status: str
    was: float | None
    now: float | None
    ci_lo: float | None = None
    ci_hi: float | None = None


@dataclass(frozen=True, kw_only=True)
class Change:
    """Something around the numbers that is not what it was: a version, the hardware, a digest."""

    what: str
    was: str
    now: str


@dataclass(frozen=True, kw_only=True)
class Reproduction:
    """What a repetition showed."""

    run_id: str
    name: str
    repeated_as: str
    checks: tuple[Check, ...]
    times: tuple[Check, ...]
    """Seconds and peak memory: without a status."""
    samples: tuple[Check, ...]
    """The largest difference of the per-sample values of each metric; ``was`` is None, ``now`` the difference."""
    changes: tuple[Change, ...]
    unseen: tuple[str, ...] = ()
    """Numbers that only the repetition has."""

    @property
    def verdict(self) -> str:
        """The worst status of all numbers."""
        found = {check.status for check in self.checks}
        return next((status for status in (DIFFERENT, WITHIN) if status in found), IDENTICAL)

    def data(self) -> dict[str, Any]:
        """All of it as JSON data."""
        return {"verdict": self.verdict, **asdict(self)}


def compare_runs(
    was: RunNumbers,
    now: RunNumbers,
    samples: tuple[Mapping[str, object], Mapping[str, object]],
    environments: tuple[Mapping[str, Any], Mapping[str, Any]],
) -> Reproduction:
    """Two runs with their samples and environments as those JSON files have them, empty where there is none.

    An interval is that of the first run, never the union of both.
    """
    ours, theirs = now["metrics"], was["metrics"]
    names = [n for n in theirs if not _is_part(n, theirs) and not n.startswith("export/")]  # what was done with it
    judged = [n for n in names if not is_of_the_machine(n)]
    return Reproduction(
        run_id=was["run_id"],
        name=was["name"],
        repeated_as=now["run_id"],
        checks=tuple(sorted((_check(n, theirs, ours) for n in judged), key=lambda c: c.name)),
        times=tuple(Check(name=n, status="", was=theirs[n], now=ours.get(n)) for n in names if n not in judged),
        samples=_sample_differences(*samples),
        changes=tuple(_changes(was["tags"], now["tags"], *environments)),
        unseen=tuple(n for n in ours if n not in theirs and not _is_part(n, ours) and not is_of_the_machine(n)),
    )


def is_of_the_machine(name: str) -> bool:
    """Is this number a time, or of memory that a stage happened to find or took, which no two runs share?"""
    return name.startswith("perf/") or "/peak_" in name or "/baseline_" in name or name == NEEDED_BYTES


def _is_part(name: str, metrics: Mapping[str, float]) -> bool:
    base, _, part = name.rpartition("/")
    return part in _PARTS and base in metrics


def _check(name: str, theirs: Mapping[str, float], ours: Mapping[str, float]) -> Check:
    was, now = theirs[name], ours.get(name)
    low, high = _interval(name, theirs)
    parts = [name, *(f"{name}/{part}" for part in _PARTS)]
    if now is None:
        status = DIFFERENT
    elif all(theirs.get(p) == ours.get(p) for p in parts):
        status = IDENTICAL
    elif theirs.get(f"{name}/n") != ours.get(f"{name}/n") or name.startswith(_EXACT):
        status = DIFFERENT
    else:
        rounding = 1e-9 + ROUNDING * abs(was)
        if low is None or high is None:
            status = WITHIN if abs(now - was) <= NO_INTERVAL * abs(was) + 1e-9 else DIFFERENT
        else:
            status = WITHIN if low - rounding <= now <= high + rounding else DIFFERENT
    return Check(name=name, status=status, was=was, now=now, ci_lo=low, ci_hi=high)


def _interval(name: str, metrics: Mapping[str, float]) -> tuple[float | None, float | None]:
    """The logged interval; else 1.96 standard errors; else, of a count of images, Wilson's; else none."""
    value = metrics[name]
    low, high, se = (metrics.get(f"{name}/{part}") for part in ("ci_lo", "ci_hi", "se"))
    if low is not None and high is not None:
        return low, high
    if se is not None:
        least, most = bounds_of(name)
        return max(value - 1.96 * se, min(value, least)), min(value + 1.96 * se, max(value, most))
    n, metric = int(metrics.get(f"{name}/n", 0)), METRICS.get(name.rpartition("/")[2])
    if metric is not None and metric.unit == "images" and n:
        share = wilson_interval(round(value), n)
        if share.ci_lo is not None and share.ci_hi is not None:
            return n * share.ci_lo, n * share.ci_hi
    return None, None


def _sample_differences(was: Mapping[str, object], now: Mapping[str, object]) -> tuple[Check, ...]:
    if not was or not now:
        return ()
    found = []
    for name, theirs in was.items():
        ours = now.get(name)
        if name in ("sample_id", "clusters", "strata", "seeds") or not isinstance(theirs, list):
            continue
        if not isinstance(ours, list) or len(ours) != len(theirs):
            found.append(Check(name=name, status=DIFFERENT, was=None, now=None))
            continue
        largest = max((abs(a - b) for a, b in zip(theirs, ours, strict=True)), default=0.0)
        found.append(Check(name=name, status=IDENTICAL if theirs == ours else "differs", was=None, now=largest))
    return tuple(found)


def _changes(
    was: Mapping[str, str], now: Mapping[str, str], old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[Change]:
    """Differences of digests, package versions, code and hardware, in this order."""
    found = [(tag.removeprefix("quantlab."), was.get(tag), now.get(tag)) for tag in _SHARED_TAGS]
    parts, ours = (json_object(tags.get(MODEL_PARTS, "")) for tags in (was, now))
    found += [(f"the model's {k}", parts.get(k), ours.get(k)) for k in {**parts, **ours} if parts]
    old = old or {"versions": json_object(was.get(VERSIONS, ""))}
    for part in ("versions", "git", "hardware"):
        theirs, ours = old.get(part) or {}, new.get(part) or {}
        found += [(_label(part, k), theirs.get(k), ours.get(k)) for k in {**theirs, **ours} if theirs]
    return [Change(what=k, was=_text(a), now=_text(b)) for k, a, b in found if a != b]


def _label(part: str, key: str) -> str:
    return key if part == "versions" else f"code {key}" if part == "git" else key.replace("_", " ")


def _text(value: object) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


# -- for the terminal


def summary_lines(found: Reproduction) -> list[str]:
    """The answer in sentences."""
    counts = {s: sum(c.status == s for c in found.checks) for s in (IDENTICAL, WITHIN, DIFFERENT)}
    told = ", ".join(f"{n} {status}" for status, n in counts.items())
    lines = [f"{found.name} ({found.run_id}): {told}; repeated as {found.repeated_as}"]
    if found.samples:
        others = [c.name for c in found.samples if c.status != IDENTICAL]
        differ = f"; they differ in {', '.join(others)}" if others else ""
        same = len(found.samples) - len(others)
        lines.append(f"per-sample values: {same} of {len(found.samples)} metrics identical in every sample{differ}")
    lines += [f"changed: {c.what}: {c.was} -> {c.now}" for c in found.changes]
    if not found.changes:
        lines.append("versions, code, hardware, model and inputs are those of the run")
    if found.unseen:
        lines.append(f"new: {', '.join(found.unseen)}")
    return lines


def reproduction_sheets(found: Reproduction) -> list[Sheet]:
    """The numbers (identical ones of curves and floors are counted, not listed), and the times apart."""
    hidden = [c for c in found.checks if c.status == IDENTICAL and _is_detail(c.name)]
    shown = [c for c in found.checks if c not in hidden]
    rows = []
    for check in shown:
        interval = "" if check.ci_lo is None else f"{check.ci_lo:.6g}..{check.ci_hi:.6g}"
        was, now = _number(check.was), _number(check.now)
        rows.append([check.name, was, interval, "=" if check.status == IDENTICAL and now == was else now, check.status])
    styles = {i: _STYLES[check.status] for i, check in enumerate(shown)}
    if hidden:
        styles[len(rows)] = "dim"
        rows.append([f"and {len(hidden)} of floors, components and steps", "", "", "", IDENTICAL])
    numbers = Sheet(
        columns=[
            Column(title="metric", is_text=True),
            Column(title="was"),
            Column(title="interval", keep=3),
            Column(title="now"),
            Column(title="verdict", is_text=True),
        ],
        rows=rows,
        styles=styles,
    )
    times = Sheet(
        title=("measured on the machine, not judged",),
        columns=[Column(title="number", is_text=True), Column(title="was"), Column(title="now")],
        rows=[[c.name, _number(c.was), _number(c.now)] for c in found.times],
        styles=dict.fromkeys(range(len(found.times)), "dim"),
    )
    return [numbers, times]


def _is_detail(name: str) -> bool:
    return name.count("/") > 1


def _number(value: float | None) -> str:
    if value is None:
        return "missing"
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e15 else f"{value:.9g}"
