"""The page: one HTML file with its data, styles, script and pictures inside, which loads nothing from anywhere."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict
from urllib.parse import quote, urlsplit, urlunsplit

from quantlab.errors import ConfigError
from quantlab.metrics import METRICS
from quantlab.report.compare import Comparison, bytes_of
from quantlab.report.comparison_data import (
    Failure,
    RowData,
    failure_data,
    group_data,
    in_order,
    metric_numbers,
)
from quantlab.report.figures import (
    CalibrationMap,
    ImageFigure,
    LayerMap,
    StepMap,
    TextFigure,
    calibration_figures,
    image_figure,
    layer_figure,
    step_figures,
    text_figure,
)
from quantlab.report.reading import Reader, StoredRun
from quantlab.report.selection import Selection
from quantlab.report.table import headline
from quantlab.report.verdicts import RULES
from quantlab.report.views import Axis, View, axes, axis_values, kinds, views
from quantlab.tracking.results import Skipped
from quantlab.tracking.tags import DEVICE, GIT_COMMIT

MAX_DETAILED = 24
"""So many schemes are in the pictures and maps; the front comes first."""
MAX_RECIPES = 1000
SCRIPTS = ("elements", "state", "plot", "tables", "maps", "pictures", "texts", "page")
"""The page's script, in the order in which its parts need one another."""


class PageRow(RowData):
    """A run with all its metrics, its place on each axis, and its address."""

    axes: dict[str, float]
    link: str | None
    """Of the run's page in MLflow, where the store is a server."""


class PageGroup(TypedDict):
    """One comparable group with its views, pictures, maps and recipes."""

    label: str
    protocol: str
    metric: str
    n: int
    unquantized: list[str]
    headline: list[str]
    rows: list[PageRow]
    views: dict[str, View]
    axes: list[Axis]
    kinds: dict[str, dict[str, str]]
    """What colours can tell apart -> a candidate's name -> its word; the first is shown first."""
    facts: dict[str, str]
    images: ImageFigure | None
    texts: TextFigure | None
    layers: LayerMap | None
    steps: list[StepMap]
    calibrated: list[CalibrationMap]
    recipes: dict[str, str]


class MetricWords(TypedDict):
    """What the page says of a metric."""

    unit: str
    description: str
    higher_is_better: bool | None


class PageData(TypedDict):
    """What the page shows."""

    title: str
    groups: list[PageGroup]
    failed: list[Failure]
    skipped: list[Skipped]
    metrics: dict[str, MetricWords]
    rules: dict[str, str]
    store: str
    commits: list[str]
    created: str


def page_data(groups: Sequence[Comparison], selection: Selection, reader: Reader) -> PageData:
    """The comparison, its pictures, maps and recipes, as JSON data."""
    return {
        "title": selection.title,
        "groups": [_page_group(group, reader) for group in groups],
        "failed": [failure_data(r) for r in selection.failed],
        "skipped": list(selection.skipped),
        "metrics": {
            m.name: {"unit": m.unit, "description": m.description, "higher_is_better": m.higher_is_better}
            for m in METRICS.values()
        },
        "rules": RULES,
        "store": reader.uri,
        "commits": sorted({r.tags[GIT_COMMIT][:8] for g in groups for r in g.runs if GIT_COMMIT in r.tags}),
        "created": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _page_group(group: Comparison, reader: Reader) -> PageGroup:
    detailed = _detailed(group)
    data, found = group_data(group), views(group, reader)
    if len(detailed) < len(group.candidates):
        some = f"{len(detailed)} of {len(group.candidates)}"
        for view in found.values():
            view["notes"].append(f"pictures and maps show {some} schemes, the front first")
    return {
        "label": data["label"],
        "protocol": data["protocol"],
        "metric": group.metric,
        "n": data["n"],
        "unquantized": data["unquantized"],
        "headline": headline(
            group.protocol, [{"name": r.name, "status": r.status, "metrics": r.metrics} for r in group.runs]
        ),
        "rows": [_page_row(row, run, reader.uri) for row, run in zip(data["rows"], in_order(group), strict=True)],
        "views": found,
        "axes": axes(group.candidates),
        "kinds": kinds(group.candidates),
        "facts": _facts(group),
        "images": image_figure(reader, detailed),
        "layers": layer_figure(reader, detailed),
        "steps": step_figures(reader, detailed),
        "texts": text_figure(reader, detailed),
        "calibrated": calibration_figures(reader, detailed),
        "recipes": _recipes(reader, group.runs[:MAX_RECIPES]),
    }


def _page_row(row: RowData, run: StoredRun, uri: str) -> PageRow:
    names = [m.name for m in METRICS.values() if f"quality/{m.name}" in run.metrics and not m.is_curve]
    metrics = {**row["metrics"], **{name: metric_numbers(run.metrics, name) for name in names}}
    return {**row, "metrics": metrics, "axes": axis_values(run), "link": run_address(uri, run)}


def run_address(uri: str, run: StoredRun) -> str | None:
    """The run's page in MLflow; None where the store is no server of the web."""
    parts = urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return None
    server = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
    return f"{server.rstrip('/')}/#/experiments/{quote(run.experiment_id)}/runs/{quote(run.run_id)}"


_TURNS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Marks that turn what follows around: a name that holds one is read as another. They are written out."""


def page(data: PageData) -> str:
    """The HTML text; nothing in the data can end the element that holds it, or turn its words around."""
    text = {name: _piece(f"page.{name}") for name in ("html", "css")}
    safe = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    safe = _TURNS.sub(lambda found: f"\\\\u{ord(found[0]):04x}", safe)
    title = _TURNS.sub("", f"{data['title']}: which scheme?").replace("&", "&amp;").replace("<", "&lt;")
    parts = {
        "title": title,
        "style": text["css"],
        "script": "\n".join(_piece(f"{name}.js") for name in SCRIPTS),
        "data": safe,
    }
    pieces = text["html"].split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (p.partition("}}") for p in pieces[1:]))


def _piece(name: str) -> str:
    return (Path(__file__).parent / "page" / name).read_text(encoding="utf-8")


def write_page(data: PageData, path: Path) -> None:
    """Write the page; ConfigError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page(data), encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written ({error}); name another file") from error


def _detailed(group: Comparison) -> list[StoredRun]:
    """The schemes of the pictures and maps, by bytes."""
    chosen = sorted(group.candidates, key=lambda r: r.name not in group.front)[:MAX_DETAILED]
    return sorted(chosen, key=bytes_of)


def _facts(group: Comparison) -> dict[str, str]:
    """What all rows share, for the line under the title."""
    run = group.candidates[0]
    model = run.params.get("model.path") or "null"
    family = run.params.get("model.family", "")
    facts = {
        "model": family if model == "null" else model,
        "data": run.params.get("dataset.name", ""),
        "samples": str(group.n),
        "device": run.tags.get(DEVICE, ""),
    }
    return {k: v for k, v in facts.items() if v}


def _recipes(reader: Reader, runs: Sequence[StoredRun]) -> dict[str, str]:
    """The recipe that repeats each run, by run id."""
    found = {r.run_id: reader.read_artifact(r, "recipe.yaml") for r in runs}
    return {run_id: text.decode("utf-8", "replace") for run_id, text in found.items() if text}
