"""A forecast as tables: where the bytes go, what each phase of a run needs, and whether it fits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from rich.console import RenderableType
from rich.table import Table

from quantlab.progress import plain
from quantlab.vocabulary.prices import ComponentPrice, Kept, Phase, Price

GIB = 2**30
MAX_KEPT = 6
MAX_MODULES = 3
ESTIMATE = "weights exactly, activations estimated"


def price_tables(prices: Sequence[Price]) -> Iterator[RenderableType | str]:
    """Tables and lines of text, in the order in which they are printed."""
    possible = [p for p in prices if p.components]
    if len(possible) == 1:
        yield from _one(possible[0])
    elif possible:
        yield _grid(possible)
        yield from dict.fromkeys(reason for p in possible for reason in _refusals(p))
        yield from dict.fromkeys(f"{p.name}: {p.advice}" for p in possible if p.advice)
    for price in prices:
        if not price.components:
            yield f"impossible: {price.name}: {price.refused[0]}"


def _one(price: Price) -> Iterator[RenderableType | str]:
    yield _parts(price)
    for component in price.components:
        if component.scheme and component.kept:
            yield f"{component.name} keeps:"
            yield from (f"  {line}" for line in _kept_lines(component.kept))
        if component.file_bytes is not None:
            bits = 8 * component.file_bytes / component.memory.num_parameters
            told = f"{component.file_bytes:,} bytes of tensors, {bits:.4f} bits/weight"
            yield f"{component.name} in a file of llama.cpp: {told}"
        if component.unmatched:
            yield f"unmatched in {component.name}: {', '.join(component.unmatched)}"
    yield from _refusals(price)
    yield phase_table(price)
    yield from verdict_lines(price)


def _parts(price: Price) -> Table:
    table = Table(pad_edge=False, title=plain(price.name, 200), title_justify="left")
    for name in ("component", "kind", "dtype"):
        table.add_column(name, overflow="fold")
    for name in ("parameters", "bytes", "GiB", "bits/weight"):
        table.add_column(name, justify="right")
    for part in price.components:
        rows = [(k.what, k.dtype, k.parameters, k.num_bytes) for k in part.kinds]
        for i, (what, dtype, parameters, num_bytes) in enumerate(rows):
            bits = f"{8 * num_bytes / parameters:.3f}" if parameters and what == "codes" else ""
            told = (part.name if not i else "", what, dtype, _num(parameters), _num(num_bytes), _gib(num_bytes), bits)
            table.add_row(*map(plain, told))
        bits = f"{part.memory.bits_per_weight:.3f}"
        if part.bits_per_quantized_weight is not None:
            bits += f" ({part.bits_per_quantized_weight:.3f})"
        total = part.memory.weights_bytes
        told = ("", "all", "", _num(part.memory.num_parameters), _num(total), _gib(total), bits)
        table.add_row(*map(plain, told), end_section=True)
    parameters = sum(p.memory.num_parameters for p in price.components)
    at_16_bits = sum(p.memory.bytes_at_16_bit for p in price.components)
    bits = f"{16 * price.total_bytes / at_16_bits:.3f}" if at_16_bits else ""
    told = ("total", "", "", _num(parameters), _num(price.total_bytes), _gib(price.total_bytes), bits)
    table.add_row(*map(plain, told))
    table.caption = "bits/weight: of the component (of its quantized weights, scales included)"
    table.caption_justify = "left"
    return table


def _kept_lines(kept: Iterable[Kept]) -> Iterator[str]:
    rows = list(kept)
    for one in rows[:MAX_KEPT]:
        more = f", and {len(one.modules) - MAX_MODULES} more" if len(one.modules) > MAX_MODULES else ""
        yield f"{_gib(one.num_bytes)} GiB: {one.rule} ({', '.join(one.modules[:MAX_MODULES])}{more})"
    if len(rows) > MAX_KEPT:
        yield f"{_gib(sum(k.num_bytes for k in rows[MAX_KEPT:]))} GiB: by {len(rows) - MAX_KEPT} more rules (--json)"


def _refusals(price: Price) -> Iterator[str]:
    for reason in (*price.refused, *(r for c in price.components for r in c.refused)):
        yield f"a run refuses it: {reason}"


def phase_table(price: Price) -> Table:
    """What each phase needs on the device and on the host, a column a placement."""
    table = Table(pad_edge=False, caption=f"GiB, {ESTIMATE}", caption_justify="left")
    table.add_column("placement")
    table.add_column("phase")
    for name in ("device", "of it activations", "host"):
        table.add_column(name, justify="right")
    table.add_column("fits")
    for placement, rows in price.phases.items():
        for i, phase in enumerate(rows):
            first = "" if i else placement
            needs = (phase.device_bytes, phase.activation_bytes, phase.host_bytes)
            told = (first, phase.name, *map(_gib, needs), _fits(price, phase))
            table.add_row(*map(plain, told), end_section=i == len(rows) - 1)
    return table


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
        yield f"fits {' and '.join(had)}: {price.placement}, at most {_gib(largest.device_bytes)} GiB ({largest.name})"
    else:
        yield f"does not fit {' and '.join(had)}{f'; {price.advice}' if price.advice else ''}"


_PLACES = (("device_bytes", "device"), ("host_bytes", "host"))


def _grid(prices: Sequence[Price]) -> Table:
    table = Table(pad_edge=False, caption=f"GiB; the phases' largest: {ESTIMATE}", caption_justify="left")
    table.add_column("combination", overflow="fold")
    for name in ("weights", "bits/weight", *dict.fromkeys(name for p in prices for name in p.phases)):
        table.add_column(name, justify="right")
    if any(p.budget for p in prices):
        table.add_column("fits")
    for price in prices:
        chosen = [c for c in price.components if c.scheme] or list(price.components)
        bits = " ".join(_bits(c) for c in chosen)
        largest = [_gib(max(p.device_bytes for p in rows)) for rows in price.phases.values()]
        fits = [price.placement or "no"] if price.budget else []
        table.add_row(plain(price.name, 200), *map(plain, (_gib(price.total_bytes), bits, *largest, *fits)))
    return table


def _bits(component: ComponentPrice) -> str:
    return f"{component.memory.bits_per_weight:.3f}"


def _num(value: int) -> str:
    return f"{value:,}" if value else ""


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.3f}"


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
