"""The view of MLflow's runs by which a scheme is chosen: columns and charts, saved as that page saves its shared ones.

They are tags of the experiment in the page's own form (looked at with MLflow 3.17). A page that does not know the form
says so and shows its usual table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from quantlab.progress import say
from quantlab.tracking.store import Store
from quantlab.tracking.tags import PARENT_RUN_ID

PREFIX = "mlflow.sharedViewState."
BYTES = ("memory/weights_bytes", "memory/bits_per_weight_model", "memory/compression")

EDGES, LETTER = 36, 7
"""Pixels of a heading of the table: beside its name, and of a letter of it. Without them names are cut."""


def view_name(sweep_id: str) -> str:
    """The name of the view of a sweep's runs."""
    return f"quantlab-{sweep_id[:12]}"


def saved_view(store: Store, metrics: Mapping[str, Sequence[float]], sweep_id: str, images: Sequence[str] = ()) -> str:
    """The address, within MLflow, of the view of a sweep's runs by ``metrics`` (tracked names, the most telling first,
    and the runs' values) in the store's experiment, with a card for each key of its runs' ``images``; it is saved where
    there is none yet. Empty where the store does not take it, which is told.
    """
    from mlflow.exceptions import MlflowException

    name = view_name(sweep_id)
    try:
        if f"{PREFIX}{name}" not in store.client.get_experiment(store.experiment_id).tags:
            state = json.dumps(view_state(metrics, sweep_id, images))
            store.client.set_experiment_tag(store.experiment_id, f"{PREFIX}{name}", state)
    except MlflowException as error:
        say(f"the saved view of the runs: {str(error)[:200]}", "warning")
        return ""
    return f"#/experiments/{store.experiment_id}/runs?viewStateShareKey={name}&compareRunsMode=CHART"


def view_state(metrics: Mapping[str, Sequence[float]], sweep_id: str, images: Sequence[str] = ()) -> dict[str, object]:
    """What the page keeps of a view: of a sweep's runs each metric against bytes and by scheme, and the columns of its
    table; two charts side by side, since of three the names are cut. Runs of other sweeps have other samples, and those
    whose sweep is folded up would be in no chart. A bar has two decimals written on it: where that would read 0.00 of
    what is not 0, the metric has none.
    """
    told = [name for name, values in metrics.items() if all(value == 0 or abs(value) >= 0.005 for value in values)]
    section = {"uuid": "quantlab", "name": "quality against bytes", "display": True, "isReordered": True, "columns": 2}
    kept = {"metricSectionId": "quantlab", "deleted": False, "isGenerated": False, "runsCountToCompare": 100}
    x = {"key": BYTES[0], "type": "METRIC"}
    charts = [
        *(
            {"type": "SCATTER", "uuid": f"bytes {m}", **kept, "xaxis": x, "yaxis": {"key": m, "type": "METRIC"}}
            for m in metrics
        ),
        *({"type": "BAR", "uuid": m, **kept, "metricKey": m} for m in (*told, BYTES[0])),
        *(
            {"type": "IMAGE", "uuid": f"image {key}", **kept, "imageKeys": [key], "step": 0, "showRunParams": False}
            for key in images
        ),
    ]
    columns = {f"metrics.`{name}`": EDGES + LETTER * len(name) for name in (*metrics, *BYTES)}
    return {
        "searchFilter": f"tags.`{PARENT_RUN_ID}` = '{sweep_id}'",
        "selectedColumns": [*columns],
        "columnOrder": [*columns],  # without it widths are not used
        "columnWidths": columns,
        "compareRunCharts": charts,
        "compareRunSections": [section],
        "isAccordionReordered": True,  # else the page puts sections of its own before it
        "runsHiddenMode": "SHOW_ALL",
        "hideEmptyCharts": True,
    }
