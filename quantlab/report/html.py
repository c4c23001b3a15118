"""The page: one HTML file with its data, styles, script and pictures inside, which loads nothing from anywhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypedDict

from quantlab.errors import ConfigError
from quantlab.metrics import METRICS
from quantlab.report.compare import Comparison, bytes_of
from quantlab.report.comparison_data import Failure, GroupData, failure_data, group_data
from quantlab.report.figures import (
    CalibrationMap,
    ImageFigure,
    LayerMap,
    StepMap,
    calibration_figures,
    image_figure,
    layer_figure,
    step_figures,
)
from quantlab.report.reading import Reader, StoredRun
from quantlab.report.selection import Selection
from quantlab.report.verdicts import RULES
from quantlab.tracking.results import Skipped
from quantlab.tracking.tags import DEVICE, GIT_COMMIT

MAX_DETAILED = 24
"""So many schemes are in the pictures and maps; the front comes first."""
MAX_RECIPES = 1000


class PageGroup(GroupData):
    """One comparable group with its pictures, maps and recipes."""

    facts: dict[str, str]
    images: ImageFigure | None
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
    data = group_data(group)
    if len(detailed) < len(group.candidates):
        some = f"{len(detailed)} of {len(group.candidates)}"
        data["notes"].append(f"pictures and maps show {some} schemes, the front first")
    return {
        **data,
        "facts": _facts(group),
        "images": image_figure(reader, detailed),
        "layers": layer_figure(reader, detailed),
        "steps": step_figures(detailed),
        "calibrated": calibration_figures(reader, detailed),
        "recipes": _recipes(reader, group.runs[:MAX_RECIPES]),
    }


def page(data: PageData) -> str:
    """The HTML text; nothing in the data can end the element that holds it."""
    folder = Path(__file__).parent
    text = {name: (folder / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    safe = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    title = f"{data['title']}: which scheme?".replace("&", "&amp;").replace("<", "&lt;")
    parts = {"title": title, "style": text["css"], "script": text["js"], "data": safe}
    pieces = text["html"].split("{{")
    return pieces[0] + "".join(parts[name] + rest for name, _, rest in (p.partition("}}") for p in pieces[1:]))


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
