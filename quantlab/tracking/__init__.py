"""Tracking: each job is a run of MLflow, each sweep the parent of its jobs.

The run's own folder is the record; the store (SQLite by default, or a server) is told of it and may be down. This
package is the only importer of mlflow, and imports it when a store is opened.
"""

from __future__ import annotations

from quantlab.tracking.query import (
    RunData,
    adopt,
    annotate,
    experiment_runs,
    experiments,
    find_records,
    find_runs,
    get_artifact,
    get_run,
    has_run_with_tags,
    newest_run,
)
from quantlab.tracking.recovery import all_arrived, close_orphans, end_lost_run, push_pending
from quantlab.tracking.run import Run
from quantlab.tracking.store import Store, no_store, open_store

__all__ = [
    "Run",
    "RunData",
    "Store",
    "adopt",
    "all_arrived",
    "annotate",
    "close_orphans",
    "end_lost_run",
    "experiment_runs",
    "experiments",
    "find_records",
    "find_runs",
    "get_artifact",
    "get_run",
    "newest_run",
    "has_run_with_tags",
    "no_store",
    "open_store",
    "push_pending",
]
