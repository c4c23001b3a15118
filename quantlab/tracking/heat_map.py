"""A map of layers and denoising steps as a picture, for the pages of trackers that show no maps of their own."""

from __future__ import annotations

from pathlib import Path
from typing import TypedDict

MAX_LABELS = 60
"""More rows than this are labelled in part."""


class HeatMap(TypedDict):
    """A number for each row and column; None where there is none."""

    title: str
    rows: list[str]
    columns: list[str]
    values: list[list[float | None]]


def draw_heat_map(heat: HeatMap, file: Path) -> None:
    """Write ``heat`` to ``file`` as PNG; None stays blank."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns = heat["rows"], heat["columns"]
    values = np.array([[np.nan if v is None else v for v in row] for row in heat["values"]], dtype=float)
    figure = Figure(figsize=(4 + 0.3 * len(columns), 1.5 + 0.16 * min(len(rows), 4 * MAX_LABELS)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="cividis", interpolation="nearest")
    every = -(-len(rows) // MAX_LABELS)
    axes.set_yticks(range(0, len(rows), every), rows[::every], fontsize=6)
    axes.set_xticks(range(0, len(columns), -(-len(columns) // 25)), columns[:: -(-len(columns) // 25)], fontsize=7)
    axes.set_xlabel("denoising step")
    axes.set_title(heat["title"], fontsize=8)
    figure.colorbar(image, label="dB; larger is better")
    figure.savefig(file, dpi=110)
