"""What the page shows beside the table: pictures as data addresses, and the maps of layers and steps."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, TypedDict

from quantlab.metrics import METRICS
from quantlab.protocols.media import DIFFERENCE_GAIN
from quantlab.report.reading import Reader, StoredRun, read_json
from quantlab.tracking.heat_map import HeatMap
from quantlab.tracking.pictures import SAMPLE_ARRAYS, kept_picture, read_samples, save_animation, shown_tiles
from quantlab.tracking.results import TEXTS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

IMAGE_BYTES = 3_000_000
"""What all pictures of a page may weigh together."""
TILE_SIZES = (256, 192, 128, 96, 64)
EXACT_PIXELS = 96
"""Tiles up to this size are kept exactly (PNG); larger ones are scaled down and compressed."""


class Strips(TypedDict):
    """One scheme's images side by side, as data addresses."""

    name: str
    candidate: str
    difference: str


class ImageFigure(TypedDict):
    """The pictures of a page; a strip has ``tiles`` tiles of at most ``pixels`` pixels, of these ``samples``."""

    reference: str
    schemes: list[Strips]
    tiles: int
    samples: list[str]
    pixels: int
    difference_gain: int
    moving: bool
    """The strips are animations."""


class SchemeTexts(TypedDict):
    """What ``texts.json`` of a run has, see :mod:`quantlab.protocols.continuations`."""

    name: str
    continuations: list[dict[str, object]]
    worst: list[dict[str, object]]


class TextFigure(TypedDict):
    """The texts of a page."""

    schemes: list[SchemeTexts]


class LayerMap(HeatMap):
    """A map of layers and schemes."""

    metric: str
    higher_is_better: bool


class StepMap(LayerMap):
    """A map of schemes and steps; ``log``: its values span orders of magnitude."""

    unit: str
    description: str
    log: bool


class CalibrationMap(HeatMap):
    """A map of layers and steps of one run."""

    name: str
    metric: str


def image_figure(reader: Reader, runs: Sequence[StoredRun]) -> ImageFigure | None:
    """Strips of all samples: the reference once, candidate and difference of each run; None without pictures.

    Pictures that would not fit into the page together are scaled down.
    """
    found = [(r, read_samples(kept_picture(partial(reader.read_artifact, r), SAMPLE_ARRAYS) or b"")) for r in runs]
    known = [(r, *samples) for r, samples in found if samples is not None]
    if not known:
        return None
    _, first, ids = known[0]
    tiles = [(r, shown_tiles(t)) for r, t, own in known if t.shape == first.shape and own == ids]
    largest = min(max(tiles[0][1].shape[-3:-1]), TILE_SIZES[0])
    for size in [largest, *(s for s in TILE_SIZES if s < largest)]:
        schemes: list[Strips] = [
            {"name": r.name, "candidate": _strip(t, 1, size), "difference": _strip(t, 2, size)} for r, t in tiles
        ]
        reference = _strip(tiles[0][1], 0, size)
        if sum(len(s["candidate"]) + len(s["difference"]) for s in schemes) + len(reference) <= IMAGE_BYTES:
            break
    return {
        "reference": reference,
        "schemes": schemes,
        "tiles": len(first),
        "samples": ids,
        "pixels": size,
        "difference_gain": DIFFERENCE_GAIN,
        "moving": first.ndim == 6,
    }


def text_figure(reader: Reader, runs: Sequence[StoredRun]) -> TextFigure | None:
    """What the reference and each scheme say; None where no run has kept it."""
    found = {run.name: read_json(reader, run, TEXTS) for run in runs}
    schemes: list[SchemeTexts] = [
        {"name": name, "continuations": known.get("continuations", []), "worst": known.get("worst", [])}
        for name, known in found.items()
        if known.get("continuations") or known.get("worst")
    ]
    return {"schemes": schemes} if schemes else None


def _strip(tiles: NDArray[np.uint8], column: int, size: int) -> str:
    """The tiles of one column side by side, each at most ``size`` pixels high and wide, as a data address.

    Of videos, which have one axis more, an animation.
    """
    from PIL import Image

    chosen, buffer = tiles[:, column], io.BytesIO()
    exact = max(chosen.shape[-3:-1]) <= EXACT_PIXELS
    if chosen.ndim == 5:
        frames = [Image.fromarray(_side_by_side(chosen[:, k], size)) for k in range(chosen.shape[1])]
        save_animation(frames, buffer, exact=exact)
        kind = "webp"
    else:
        kind = "png" if exact else "webp"
        settings = {"optimize": True} if exact else {"quality": 82}
        Image.fromarray(_side_by_side(chosen, size)).save(buffer, kind, **settings)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _side_by_side(tiles: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    import numpy as np
    from PIL import Image

    chosen = [Image.fromarray(tile) for tile in tiles]
    for tile in chosen:
        tile.thumbnail((size, size), Image.Resampling.LANCZOS)
    height = chosen[0].size[1]
    gap = np.full((height, max(1, height // 24), 3), 255, np.uint8)
    return np.concatenate([p for tile in chosen for p in (np.asarray(tile), gap)][:-1], axis=1)


def layer_figure(reader: Reader, runs: Sequence[StoredRun]) -> LayerMap | None:
    """Relative weight error of every layer under every scheme; None where no run has a layer table."""
    errors: dict[str, dict[str, float]] = {}
    for run in runs:
        table = read_json(reader, run, "layers.json")
        if not table:
            continue
        rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
        several = len({row.get("component") for row in rows}) > 1  # two denoisers have layers of the same names
        errors[run.name] = {
            f"{row['component']}: {row['name']}" if several else row["name"]: row["weight_rel_error"] for row in rows
        }
    layers = list(dict.fromkeys(layer for of_run in errors.values() for layer in of_run))
    schemes = [s for s, of_run in errors.items() if any(v is not None for v in of_run.values())]
    if not schemes:
        return None
    return {
        "title": "relative weight error by layer and scheme",
        "metric": "weight error",
        "higher_is_better": False,
        "rows": layers,
        "columns": schemes,
        "values": [[_rounded(errors[s].get(layer)) for s in schemes] for layer in layers],
    }


def calibration_figures(reader: Reader, runs: Sequence[StoredRun]) -> list[CalibrationMap]:
    """One map of layers and denoising steps for each run that was calibrated."""
    figures: list[CalibrationMap] = []
    for run in runs:
        heat = read_json(reader, run, "calibration_steps.json")
        if heat.get("rows"):
            values = [[_rounded(v) for v in row] for row in heat["values"]]
            figures.append(
                {
                    "name": run.name,
                    "metric": "output SQNR",
                    "title": heat["title"],
                    "rows": heat["rows"],
                    "columns": heat["columns"],
                    "values": values,
                }
            )
    return figures


def step_figures(reader: Reader, runs: Sequence[StoredRun]) -> list[StepMap]:
    """The metrics that are curves over the steps, each as a map of scheme and step."""
    figures: list[StepMap] = []
    found = {r.name: read_json(reader, r, "steps.json") for r in runs}
    for metric in (m for m in METRICS.values() if m.is_curve):
        curves = {r.name: found[r.name].get(metric.name) or _curve(r, f"quality/{metric.name}/") for r in runs}
        curves = {scheme: curve for scheme, curve in curves.items() if curve}
        if not curves:
            continue
        length = max(map(len, curves.values()))
        figures.append(
            {
                "title": f"{metric.name} by scheme and step",
                "metric": metric.name,
                "unit": metric.unit if metric.unit != "1" else "",
                "description": f"{metric.description[0].upper()}{metric.description[1:]}.",
                "higher_is_better": bool(metric.higher_is_better),
                "log": metric.is_log_scale,
                "rows": list(curves),
                "columns": [str(k) for k in range(length)],
                "values": [[_rounded(v) for v in curve] + [None] * (length - len(curve)) for curve in curves.values()],
            }
        )
    return figures


def _curve(run: StoredRun, prefix: str) -> list[float]:
    """The points of a run whose curves were metrics of their own."""
    points = {
        int(k.removeprefix(prefix)): v
        for k, v in run.metrics.items()
        if k.startswith(prefix) and k.removeprefix(prefix).isdigit()
    }
    return [points[k] for k in sorted(points)]


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
