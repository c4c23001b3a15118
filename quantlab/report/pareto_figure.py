"""What each bit buys, as a picture for documents: quality over stored bits a weight, one point a scheme."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.backends.table import backends
from quantlab.metrics import METRICS
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.pareto import pareto_front
from quantlab.report.verdicts import largest_floor
from quantlab.tracking.results import Row

_SEVERAL = "by component"
"""How the points are called whose components have schemes of their own."""


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A scheme: stored bits a weight, and the metric with its interval (the value alone where there is none)."""

    bits: float
    value: float
    low: float
    high: float
    is_simulated: bool


def draw_pareto(rows: Sequence[Row], file: Path) -> None:
    """Write the finished rows of a sweep (``rows.json``) to ``file`` (SVG): the first headline metric with 95 %
    intervals over stored bits a weight, the Pareto front of these points as a line, the largest floor dashed; hollow
    points are simulated, and stand where their storage is."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = [r for r in rows if r["status"] == "FINISHED" and "quantization/coverage" in r["metrics"]]
    metric = METRICS[PROTOCOLS[found[0]["protocol"]].HEADLINE[0]]
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    colours = {name: row.colour for name, row in backends().items()}
    for backend, colour in {**colours, _SEVERAL: "#666666"}.items():
        points = [_point(r["metrics"], metric.name) for r in found if _backend(r, colours) == backend]
        for simulated in (False, True):
            chosen = [p for p in points if p.is_simulated == simulated]
            if chosen:
                errors = [[p.value - p.low for p in chosen], [p.high - p.value for p in chosen]]
                axes.errorbar(
                    [p.bits for p in chosen],
                    [p.value for p in chosen],
                    yerr=errors,
                    fmt="o",
                    color=colour,
                    mfc="white" if simulated else colour,
                    ms=5,
                    lw=1,
                    label=None if simulated else backend,
                )
    every = [(p.bits, p.value) for p in (_point(r["metrics"], metric.name) for r in found)]
    front = sorted({every[i] for i in pareto_front(every, (False, bool(metric.higher_is_better)))})
    axes.plot([bits for bits, _ in front], [value for _, value in front], color="#888888", lw=1, zorder=0)
    floor = largest_floor(found[0]["metrics"], metric.name)
    if floor:
        axes.axhline(floor.value, color="#888888", lw=1, ls="--")
        axes.annotate(
            floor.name, (axes.get_xlim()[1], floor.value), ha="right", va="bottom", fontsize=8, color="#666666"
        )
    axes.set_yscale("log")
    axes.set_xlabel("stored bits per weight of the quantized layers, scales included")
    axes.set_ylabel(f"{metric.name} ({'higher' if metric.higher_is_better else 'lower'} is better)")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "quantlab", "svg.fonttype": "none"}):  # the same file from the same run
        figure.savefig(file, format="svg", metadata={"Date": None})


def _backend(row: Row, known: Mapping[str, str]) -> str:
    """The backend that a row's name begins with; a name of components begins with the first of them."""
    first = row["name"].split()[0]
    return first if first in known else _SEVERAL


def _point(metrics: Mapping[str, float], metric: str) -> _Point:
    value = metrics[f"quality/{metric}"]
    return _Point(
        bits=metrics["memory/bits_per_weight_quantized"],
        value=value,
        low=metrics.get(f"quality/{metric}/ci_lo", value),
        high=metrics.get(f"quality/{metric}/ci_hi", value),
        is_simulated=bool(metrics.get("memory/is_simulated")),
    )
