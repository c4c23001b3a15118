"""A forecast as tables: where the bytes go, what each phase of a run needs, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from quantlab.report.table import MARKS
from quantlab.report.terminal import Column, Sheet
from quantlab.vocabulary.amounts import GIB, MIB, some_of
from quantlab.vocabulary.prices import Kept, Phase, Price
from quantlab.vocabulary.reports import bits_per_weight

MAX_KEPT = 6
MAX_MODULES = 3
SIMULATED = MARKS["~"]
ESTIMATE = "weights exactly, activations estimated"


def price_tables(prices: Sequence[Price]) -> Iterator[Sheet | str]:
    """Sheets and lines of text, in the order in which they are printed."""
    possible = [p for p in prices if p.components]
    if len(possible) == 1:
        yield from _one(possible[0])
    elif possible:
        yield _grid(possible)
        yield from dict.fromkeys(reason for p in possible for reason in _refusals(p))
        yield from dict.fromkeys(f"{p.name}: {p.advice}" for p in possible if p.advice)
        yield from dict.fromkeys(told for p in possible for told in p.left_out.values())
    for price in prices:
        if not price.components:
            yield f"impossible: {price.name}: {price.refused[0]}"


def _one(price: Price) -> Iterator[Sheet | str]:
    yield _parts(price)
    for component in price.components:
        if component.scheme and component.kept:
            yield f"{component.name} keeps:"
            yield from (f"  {line}" for line in _kept_lines(component.kept, unit_of(price.total_bytes)))
        if component.file_bytes is not None:
            bits = 8 * component.file_bytes / component.memory.num_parameters
            told = f"{component.file_bytes:,} bytes of tensors, {bits:.4f} bits/weight"
            yield f"{component.name} in a file of llama.cpp: {told}"
        if component.unmatched:
            yield f"unmatched in {component.name}: {', '.join(component.unmatched)}"
    yield from _refusals(price)
    yield phase_sheet(price)
    if price.shares:
        yield share_sheet(price)
    yield from verdict_lines(price)


def _parts(price: Price) -> Sheet:
    unit = unit_of(price.total_bytes)
    columns = [
        Column(title="component", is_text=True),
        Column(title="kind", is_text=True),
        Column(title="dtype", is_text=True, keep=6),
        Column(title="parameters", keep=5),
        Column(title="bytes", keep=3),
        Column(title=unit, keep=8, caption=SIMULATED if price.is_simulated else ""),
        Column(title="bits/weight", keep=7),
    ]
    rows, ends = [], []
    for part in price.components:
        kinds = [(k.what, k.dtype, k.parameters, k.num_bytes) for k in part.kinds if k.num_bytes]
        for i, (what, dtype, parameters, num_bytes) in enumerate(kinds):
            bits = f"{8 * num_bytes / parameters:.3f}" if parameters and what == "codes" else ""
            first = part.name if not i else ""
            size = _mark(part.is_simulated and what == "codes") + _said(num_bytes, unit)
            rows.append([first, what, dtype, _num(parameters), _num(num_bytes), size, bits])
        bits = f"{part.memory.bits_per_weight:.3f}"
        if part.bits_per_quantized_weight is not None:
            bits += f" ({part.bits_per_quantized_weight:.3f})"
        total = part.memory.weights_bytes
        first = "" if kinds else part.name
        size = _mark(part.is_simulated) + _said(total, unit)
        rows.append([first, "all", "", _num(part.memory.num_parameters), _num(total), size, bits])
        ends.append(len(rows) - 1)
    parameters = sum(p.memory.num_parameters for p in price.components)
    whole = bits_per_weight(p.memory for p in price.components)
    bits = f"{whole:.3f}" if whole else ""
    size = _mark(price.is_simulated) + _said(price.total_bytes, unit)
    rows.append(["total", "", "", _num(parameters), _num(price.total_bytes), size, bits])
    told = "bits/weight: of the component (of its quantized weights, scales included)"
    return Sheet(columns=columns, rows=rows, sections=frozenset(ends), title=(price.name,), caption=[told])


def _kept_lines(kept: Iterable[Kept], unit: str) -> Iterator[str]:
    rows = list(kept)
    for one in rows[:MAX_KEPT]:
        yield f"{_said(one.num_bytes, unit)} {unit}: {one.rule} ({some_of(one.modules, MAX_MODULES)})"
    if len(rows) > MAX_KEPT:
        rest = _said(sum(k.num_bytes for k in rows[MAX_KEPT:]), unit)
        yield f"{rest} {unit}: by {len(rows) - MAX_KEPT} more rules (--json)"


def _refusals(price: Price) -> Iterator[str]:
    for reason in price.why_refused:
        yield f"a run refuses it: {reason}"


def phase_sheet(price: Price) -> Sheet:
    """What each phase of each placement needs on the device and on the host."""
    columns = [
        Column(title="placement", is_text=True),
        Column(title="phase", is_text=True),
        Column(title="device"),
        Column(title="of it activations", keep=3),
        Column(title="host", keep=5),
        *([Column(title="fits", is_text=True, keep=8)] if price.budget else []),
    ]
    unit = unit_of(max((p.device_bytes for phases in price.phases.values() for p in phases), default=0))
    rows, ends = [], []
    for placement, phases in price.phases.items():
        for i, phase in enumerate(phases):
            needs = [_said(n, unit) for n in (phase.device_bytes, phase.activation_bytes, phase.host_bytes)]
            fits = [_fits(price, phase)] if price.budget else []
            rows.append(["" if i else placement, phase.name, *needs, *fits])
        ends.append(len(rows) - 1)
    return Sheet(columns=columns, rows=rows, sections=frozenset(ends), caption=[f"{unit}, {ESTIMATE}{_where(price)}"])


def share_sheet(price: Price) -> Sheet:
    """What lies on which of several devices."""
    columns = [
        Column(title="device"),
        Column(title="what lies on it", is_text=True, may_wrap=True),
        Column(title="reference", keep=5),
        Column(title="candidate", keep=6),
        Column(title="most", keep=7),
        Column(title="in phase", is_text=True, keep=4),
        *([Column(title="fits", is_text=True, keep=8)] if "device_bytes" in price.budget else []),
    ]
    rows = []
    for i, share in enumerate(price.shares):
        fullest = max(price.phases["spread"], key=lambda phase: phase.on_each[i])
        needs = map(_gib, (share.reference_bytes, share.candidate_bytes, fullest.on_each[i]))
        has_room = fullest.on_each[i] <= price.budget.get("device_bytes", 0)
        fits = ["yes" if has_room else "no"] if "device_bytes" in price.budget else []
        rows.append([str(i), ", ".join(share.parts), *needs, fullest.name, *fits])
    return Sheet(columns=columns, rows=rows, caption=[f"GiB of weights; most: {ESTIMATE}"])


def _fits(price: Price, phase: Phase) -> str:
    if not price.budget:
        return ""
    device, host = price.budget.get("device_bytes"), price.budget.get("host_bytes")
    too_large = (device is not None and phase.device_bytes > device) or (host is not None and phase.host_bytes > host)
    return "no" if too_large else "yes"


def verdict_lines(price: Price) -> Iterator[str]:
    """Whether it fits, how, and what would."""
    if not price.budget:
        return
    had = [f"{price.budget[key] / GIB:.4g} GiB on the {name}" for key, name in _PLACES if key in price.budget]
    if price.placement:
        largest = max(price.phases[price.placement], key=lambda p: p.device_bytes)
        found = (
            f"fits {' and '.join(had)}: {price.placement}, at most {_gib(largest.device_bytes)} GiB ({largest.name})"
        )
    else:
        found = f"does not fit {' and '.join(had)}"
    yield "; ".join([found, *([price.advice] if price.advice else [])])
    yield from price.left_out.values()


_PLACES = (("device_bytes", "device"), ("host_bytes", "host"))


def _grid(prices: Sequence[Price]) -> Sheet:
    placements = list(dict.fromkeys(name for p in prices for name in p.phases))
    is_limited = any(p.budget for p in prices)
    columns = [
        Column(title="scheme", is_text=True),
        Column(title="weights", keep=8, caption=SIMULATED if any(p.is_simulated for p in prices) else ""),
        Column(title="bits/weight", keep=6),
        *(Column(title=name, keep=5) for name in placements),
        *([Column(title="fits", is_text=True, keep=7)] if is_limited else []),
    ]
    unit = unit_of(max(price.total_bytes for price in prices))
    rows = []
    for price in prices:
        chosen = [c for c in price.components if c.scheme] or list(price.components)
        bits = " ".join(f"{c.memory.bits_per_weight:.3f}" for c in chosen)
        phases = [price.phases.get(name, ()) for name in placements]
        largest = [_said(max(p.device_bytes for p in known), unit) if known else "" for known in phases]
        fits = [price.placement or "no"] if price.budget else [""]
        size = _mark(price.is_simulated) + _said(price.total_bytes, unit)
        rows.append([price.name, size, bits, *largest, *(fits if is_limited else [])])
    return Sheet(columns=columns, rows=rows, caption=[f"{unit}; the phases' largest: {ESTIMATE}{_where(prices[0])}"])


def _where(price: Price) -> str:
    """On what: dtype and formats of a run are other ones on a CPU, where the one who plans may sit."""
    return "; on a CPU" if price.device == "cpu" else "; on a GPU (device=cpu: on a CPU)"


def _mark(is_simulated: bool) -> str:
    """What a row of a run begins its bytes with, too."""
    return "~" if is_simulated else ""


def _num(value: int) -> str:
    return f"{value:,}" if value else ""


def unit_of(num_bytes: int) -> str:
    """``GiB``, and ``MiB`` for what has not one: of a small model half the numbers would read 0.000."""
    return "GiB" if num_bytes >= GIB else "MiB"


def _said(num_bytes: int, unit: str) -> str:
    return f"{num_bytes / (GIB if unit == 'GiB' else MIB):.3f}"


def _gib(num_bytes: int) -> str:
    return _said(num_bytes, "GiB")


def phases_markdown(price: Price) -> str:
    """The phases as a table of Markdown, for documents."""
    lines = [
        "| placement | phase | device [GiB] | of it activations | host [GiB] | fits |",
        "|---|---|---:|---:|---:|---|",
    ]
    for placement, rows in groupby(
        ((name, phase) for name, phases in price.phases.items() for phase in phases), key=lambda row: row[0]
    ):
        for _, phase in rows:
            told = (_gib(phase.device_bytes), _gib(phase.activation_bytes), _gib(phase.host_bytes))
            lines.append(f"| {placement} | {phase.name} | {' | '.join(told)} | {_fits(price, phase)} |")
    return "\n".join([*lines, "", *verdict_lines(price), ""])
