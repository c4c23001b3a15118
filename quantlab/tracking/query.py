"""Reading runs back: for resume, comparison and replay."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantlab.errors import TrackingError
from quantlab.tracking.connect import first_line, store_errors
from quantlab.tracking.record import Record, folders_with_records
from quantlab.tracking.store import Store
from quantlab.tracking.tags import FORMER_PARENTS, JOB_KEY, PARENT_RUN_ID

_LOG = logging.getLogger(__name__)

_MAX_FORMER_PARENTS = 100  # as many ids as a tag holds

RunData = dict[str, Any]
"""``run_id name status params metrics tags start_ms end_ms``: params and tags are text, metrics the last values."""


def find_runs(
    store: Store,
    *,
    key: str | None = None,
    parent_run_id: str | None = None,
    status: str | None = "FINISHED",
    tags: Mapping[str, str] | None = None,
) -> list[RunData]:
    """Runs of the store's experiment, newest first; none where the store was not reached or is lost.

    ``key`` is the tag ``quantlab.key`` (a candidate's content key), ``parent_run_id`` the sweep, ``status=None`` any.
    ``tags`` are others that a run must have.
    """
    if store.is_lost:
        return []
    wanted = {
        f"tags.`{JOB_KEY}`": key,
        f"tags.`{PARENT_RUN_ID}`": parent_run_id,
        "attributes.status": status,
        **{f"tags.`{name}`": value for name, value in (tags or {}).items()},
    }
    terms = []
    for name, value in wanted.items():
        if value is not None:
            if "'" in value or "\\" in value:
                raise TrackingError(f"{name}={value}: a run is not found by a value with a quote or backslash")
            terms.append(f"{name} = '{value}'")
    try:
        return [_data(run) for run in store.search(" and ".join(terms))]
    except store_errors() as error:
        store.lose(error)
        raise _unreadable(store, error) from error


def find_records(runs_dir: Path, tags: Mapping[str, str], status: str | None = "FINISHED") -> list[RunData]:
    """The same from the runs' own folders, for a store that is lost: runs that have all of ``tags``."""
    found = []
    for folder in folders_with_records(runs_dir):
        record = Record.load(folder)
        known = record.summary
        if known and status in (None, known["status"]) and tags.items() <= known["tags"].items():
            names = ("name", "status", "params", "metrics", "tags", "start_ms", "end_ms")
            found.append({"run_id": record.run_id, "folder": str(folder), **{n: known[n] for n in names}})
    return sorted(found, key=lambda run: run["start_ms"], reverse=True)


def has_run_with_tags(store: Store, tags: Mapping[str, str]) -> bool:
    """Does any run of the experiment carry all of these tags? False for a store that is lost."""
    if store.is_lost:
        return False
    try:
        return bool(store.run_ids(" and ".join(f"tags.`{name}` = '{value}'" for name, value in tags.items())))
    except store_errors():
        return False


def adopt(store: Store, run_id: str, parent_run_id: str) -> None:
    """Make a run the child of another parent; a tag keeps the ids of its earlier ones.

    Of runs that the store has not taken, nothing changes.
    """
    if store.is_lost or run_id.startswith("local-") or parent_run_id.startswith("local-"):
        return
    try:
        tags = store.client.get_run(run_id).data.tags
        before = tags.get(PARENT_RUN_ID, "")
        if before == parent_run_id:
            return
        former = dict.fromkeys([*tags.get(FORMER_PARENTS, "").split(), before])
        kept = [parent for parent in former if parent and parent != parent_run_id][-_MAX_FORMER_PARENTS:]
        store.client.set_tag(run_id, FORMER_PARENTS, " ".join(kept))
        store.client.set_tag(run_id, PARENT_RUN_ID, parent_run_id)
    except store_errors() as error:
        _LOG.warning("%s: run %s stays under its earlier parent (%s)", store.uri, run_id, first_line(error))


def get_run(store: Store, run_id: str) -> RunData:
    """One run by its id; TrackingError where the store has none such."""
    return _data(_raw_run(store, run_id))


def get_curve(store: Store, run_id: str, name: str) -> list[float]:
    """The values of a metric over its steps, in order; empty where the run has no such metric."""
    _raw_run(store, run_id)
    try:
        points = store.client.get_metric_history(run_id, name)
    except store_errors() as error:
        raise _unreadable(store, error) from error
    return [point.value for point in sorted(points, key=lambda p: (p.step, p.timestamp))]


def get_artifact(store: Store, run_id: str, name: str, folder: Path) -> Path:
    """Copy one artifact of a run into ``folder`` and return its path there; TrackingError where there is none such."""
    _raw_run(store, run_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(store.client.download_artifacts(run_id, name, str(folder)))
    except store_errors() as error:
        raise TrackingError(
            f"{name}: run {run_id} has no such artifact ({first_line(error)}); its page in MLflow lists those it has"
        ) from error


def _raw_run(store: Store, run_id: str) -> Any:
    if store.client is None:
        raise TrackingError(f"tracking.uri={store.uri}: was not reached; start the server, or name another store")
    try:
        return store.client.get_run(run_id)
    except store_errors() as error:
        if getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise TrackingError(
                f"run_id={run_id}: no such run in {store.uri}; `mlflow ui --backend-store-uri "
                f"{store.uri}` shows those it has, or set tracking.uri=..."
            ) from error
        raise _unreadable(store, error) from error


def _unreadable(store: Store, error: Exception) -> TrackingError:
    return TrackingError(
        f"tracking.uri={store.uri}: cannot be read ({first_line(error)}); try again when it answers, "
        "or set tracking.uri=..."
    )


def _data(run: Any) -> RunData:
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": dict(run.data.tags),
        "start_ms": run.info.start_time,
        "end_ms": run.info.end_time,
    }
