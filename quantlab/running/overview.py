"""What a sweep's run shows of its jobs: settings that they share, the best rows' numbers, the table and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from quantlab.errors import in_words, is_disk_full
from quantlab.metrics import METRICS
from quantlab.planning.job import Plan
from quantlab.progress import headline_of, say
from quantlab.protocols.table import PROTOCOLS
from quantlab.report.compare import Comparison, compare
from quantlab.report.comparison_markdown import comparison_markdown
from quantlab.report.comparison_table import as_measured
from quantlab.report.html import page_data, write_page
from quantlab.report.reading import reader_of
from quantlab.report.selection import Selection, parse_request, scheme_nodes, select
from quantlab.report.table import headline, inside_floor
from quantlab.tracking import Run, Store, annotate, get_run
from quantlab.tracking.results import IMAGE_KEY, Row, report_data
from quantlab.tracking.saved_view import saved_view
from quantlab.tracking.tags import FORMER_PARENTS, INPUTS_SHA256, LOGGED_IMAGES, NOTE
from quantlab.tracking.used import used_params
from quantlab.tracking.values import flatten
from quantlab.vocabulary.numbers import is_scheme
from quantlab.vocabulary.reports import RunReport

SHARED = ("recipe", "device", "model.", "dataset.", "evaluation.")
BYTES = ("memory/weights_bytes", "memory/compression", "memory/bits_per_weight_model")
PAGE = Path("reports", "overview.html")
_TAKEN_OVER, _TAKEN_OVER_END = "What had finished is by now among the runs of", ", and its charts are there.\n\n"
MAX_DESCRIPTION = 4800
"""Characters; a longer description would be cut in the middle of a table."""


def log_overview(store: Store, parent: Run, plan: Plan, reports: Sequence[RunReport]) -> None:
    """Log it all; what fails here costs the overview and never the sweep, whose rows are kept already."""
    try:
        rows = [report_data(r) for r in reports]
        with parent.together():
            parent.log_params(shared_settings(plan))
            _log_data(parent, plan)
            for question, row in best_rows(rows).items():
                metrics, params = row_numbers(row)
                parent.log_metrics({f"{question}/{name}": value for name, value in metrics.items()})
                parent.log_params({f"{question}.{name}": value for name, value in params.items()})
        is_new = not all(r["resumed"] for r in rows)  # a sweep that was there already has its page at its first run
        if is_new and not store.is_lost and _finished(rows):
            _log_page(store, parent)
    except Exception as error:  # noqa: BLE001  a picture of results is no reason to lose them
        if is_disk_full(error):
            raise
        why = headline_of(in_words(error), 300)
        say(f"the overview of the sweep: {why}; quantlab compare sweep={parent.run_id} makes it", "warning")


def _log_data(parent: Run, plan: Plan) -> None:
    """The data that all jobs were evaluated on, where they are the same."""
    digest = parent.record.summary["tags"].get(INPUTS_SHA256)
    asked = {(job.config.dataset.name, job.config.dataset.path, job.config.dataset.seed) for job in plan.jobs}
    if digest and len(asked) == 1:
        [(name, path, _)] = asked
        source = {"uri": str(Path(path).expanduser().absolute())} if path else {"dataset": name}
        parent.log_input(Path(path).name if path else name, digest, "evaluation", source, {})


def shared_settings(plan: Plan) -> dict[str, str]:
    """What all jobs were asked for alike, by parameter."""
    each = [used_params(flatten(job.resolved), job.needs_data) for job in plan.jobs]
    first = each[0] if each else {}
    return {k: v for k, v in first.items() if k.startswith(SHARED) and all(p.get(k) == v for p in each)}


def best_rows(rows: Sequence[Row]) -> dict[str, Row]:
    """``best``: the scheme closest to the reference; ``smallest_in_floor``: the smallest without measurable loss."""
    done = [r for r in _finished(rows) if r["protocol"]]
    asked = [{k: v for k, v in flatten(r["params"]).items() if k.startswith(SHARED)} for r in done]
    if not done or any(settings != asked[0] for settings in asked):  # rows on other inputs have no best one
        return {}
    metric = METRICS[PROTOCOLS[done[0]["protocol"]].HEADLINE[0]]
    measured = [r for r in done if f"quality/{metric.name}" in r["metrics"]]
    lossless = [r for r in measured if inside_floor(metric.name, r["metrics"])]
    up = 1 if metric.higher_is_better else -1
    found = {}
    if measured:
        found["best"] = max(measured, key=lambda r: up * r["metrics"][f"quality/{metric.name}"])
    if lossless:
        # of schemes of one size the one that is closer to the reference, as the page and export.winner take it
        found["smallest_in_floor"] = min(
            lossless,
            key=lambda r: (
                r["metrics"].get("memory/weights_bytes", float("inf")),
                -up * r["metrics"][f"quality/{metric.name}"],
            ),
        )
    return found


def _finished(rows: Sequence[Row]) -> list[Row]:
    return [r for r in rows if r["status"] == "FINISHED" and is_scheme(r["name"], r["metrics"])]


def row_numbers(row: Row) -> tuple[dict[str, float], dict[str, str]]:
    """A row's headline metrics and bytes, and its scheme's parameters, by short names."""
    names = [f"quality/{m}" for m in PROTOCOLS[row["protocol"]].HEADLINE]
    metrics = {k.rpartition("/")[2]: row["metrics"][k] for k in (*names, *BYTES) if k in row["metrics"]}
    return metrics, {"scheme": row["name"], **_scheme(used_params(flatten(row["params"])))}


def _scheme(params: Mapping[str, str]) -> dict[str, str]:
    nodes = scheme_nodes(params)
    found: dict[str, str] = {}
    for node in nodes:
        prefix = "" if len(nodes) == 1 else f"{node.rpartition('.')[2]}."
        found |= {f"{prefix}{k}": params[f"{node}.{k}"] for k in _AXES if f"{node}.{k}" in params}
    return found


_AXES = ("backend", "dtype", "group_size", "activation_dtype", "algorithm")


def _log_page(store: Store, parent: Run) -> None:
    """The page among the sweep's artifacts, and the table as its description."""
    request = parse_request([f"sweep={parent.run_id}"])
    reader = reader_of(store)
    selection = select(request, reader)
    groups = compare(request, selection, reader)
    page = parent.record.folder / PAGE
    write_page(page_data(groups, selection, reader), page)
    parent.log_artifact(page, PAGE.parent.as_posix())
    metrics = headline(groups[0].protocol, as_measured(groups[0].runs))
    images = [IMAGE_KEY] if any(LOGGED_IMAGES in run.tags for run in groups[0].candidates) else []
    names = [f"quality/{name}" for name in metrics]
    values = {name: [run.metrics[name] for run in groups[0].runs if name in run.metrics] for name in names}
    view = saved_view(store, values, parent.run_id, images)
    parent.set_tags({NOTE: description(groups, selection, store.experiment_id, parent.run_id, view)})
    of = (run.tags.get(FORMER_PARENTS, "").split() for group in groups for run in group.runs)
    for earlier in dict.fromkeys(run_id for ids in of for run_id in ids):
        _tell_taken_over(store, earlier, parent.run_id)


def _tell_taken_over(store: Store, earlier: str, run_id: str) -> None:
    """First in the description of an earlier sweep: its view is of runs that are a later one's by now."""
    found = get_run(store, earlier)
    if found is not None:
        own = found["tags"].get(NOTE, "").rpartition(_TAKEN_OVER_END)[2]
        told = f"{_TAKEN_OVER} [a later sweep](#/experiments/{store.experiment_id}/runs/{run_id}){_TAKEN_OVER_END}{own}"
        annotate(store, earlier, {}, {NOTE: told})


def description(
    groups: Sequence[Comparison], selection: Selection, experiment_id: str, run_id: str, view: str = ""
) -> str:
    """Where the page and the saved ``view`` are, with links as MLflow's own pages make them (the first lines are
    shown), and the table."""
    page = PAGE.as_posix()
    link = f"#/experiments/{experiment_id}/runs/{run_id}/artifacts/{page}"
    first = f"**[The page with all of it]({link})**: `{page}` among the artifacts."
    first += f" [Charts and columns of these runs]({view})\n\n" if view else "\n\n"
    tables = (comparison_markdown(groups, selection, most) for most in (60, 30, 15, 8))
    return first + next((text for text in tables if len(first + text) <= MAX_DESCRIPTION), "")
