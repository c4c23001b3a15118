"""Reading runs back: for resume, comparison and replay."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

from quantlab.errors import TrackingError
from quantlab.tracking.connect import first_line, store_errors
from quantlab.tracking.events import RunSummary
from quantlab.tracking.record import records
from quantlab.tracking.store import Store
from quantlab.tracking.tags import FORMER_PARENTS, PARENT_RUN_ID
from quantlab.tracking.values import checked_tags

if TYPE_CHECKING:
    from mlflow import entities

_LOG = logging.getLogger(__name__)

_MAX_FORMER_PARENTS = 100  # as many ids as a tag holds


class RunData(TypedDict):
    """A run that was found; params and tags are text, metrics the last values."""

    run_id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    params: dict[str, str]
    tags: dict[str, str]
    metrics: dict[str, float]
    folder: NotRequired[str]
    """Of a run that was found in its own folder; the next two of one that was found in the store."""
    experiment_id: NotRequired[str]
    artifact_uri: NotRequired[str]


def find_runs(store: Store, tags: Mapping[str, str] | None = None, status: str | None = "FINISHED") -> list[RunData]:
    """Runs of the store's experiment that have all of ``tags``, newest first; ``status=None``: however they ended.

    None where the store was not reached or is lost. Raises TrackingError where it fails now.
    """
    if store.is_lost:
        return []
    where = _where(tags or {}, status)
    try:
        return [_data(run) for run in store.search(where)]
    except store_errors() as error:
        store.lose(error)
        raise store.unreadable(error) from error


def find_records(runs_dir: Path, tags: Mapping[str, str], status: str | None = "FINISHED") -> list[RunData]:
    """The same from the runs' own folders, for a store that is lost: runs that have all of ``tags``."""
    found: list[RunData] = []
    for record in records(runs_dir):
        known = record.summary
        if known and status in (None, known["status"]) and tags.items() <= known["tags"].items():
            found.append(
                {
                    "run_id": record.run_id,
                    "name": known["name"],
                    "status": known["status"],
                    "start_ms": known["start_ms"],
                    "end_ms": known["end_ms"],
                    "params": known["params"],
                    "tags": _with_parent(known),
                    "metrics": known["metrics"],
                    "folder": str(record.folder),
                }
            )
    return sorted(found, key=lambda run: run["start_ms"], reverse=True)


def _with_parent(known: RunSummary) -> dict[str, str]:
    """The tags of a record, its parent among them as a store has it."""
    parent = known["parent_run_id"]
    return {**known["tags"], **({PARENT_RUN_ID: parent} if parent and PARENT_RUN_ID not in known["tags"] else {})}


def has_run_with_tags(store: Store, tags: Mapping[str, str]) -> bool:
    """Does any run of the experiment carry all of these tags? False for a store that is lost."""
    if store.is_lost:
        return False
    try:
        return bool(store.run_ids(_where(tags)))
    except store_errors():
        return False


def get_run(store: Store, run_id: str) -> RunData | None:
    """One run by its id, of whichever experiment; None where the store has none such, or it is deleted.

    Raises TrackingError where the store fails.
    """
    try:
        run = store.client.get_run(run_id)
    except store_errors() as error:
        if getattr(error, "error_code", None) in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise store.unreadable(error) from error
    return _data(run) if run.info.lifecycle_stage == "active" else None


def experiment_runs(store: Store, experiment_id: str, tags: Mapping[str, str]) -> list[RunData]:
    """All runs of an experiment that have all of ``tags``, newest first; in a value, ``%`` stands for any text.

    Raises TrackingError where the store fails.
    """
    try:
        return [_data(run) for run in store.search(_where(tags), experiment_id)]
    except store_errors() as error:
        raise store.unreadable(error) from error


def newest_run(store: Store, experiment_ids: Sequence[str], tags: Mapping[str, str]) -> RunData | None:
    """The newest finished run of these experiments that has all of ``tags``; TrackingError where the store fails."""
    try:
        found = store.client.search_runs([*experiment_ids], _where(tags, "FINISHED"), max_results=1)
    except store_errors() as error:
        raise store.unreadable(error) from error
    return next(map(_data, found), None)


def experiments(store: Store) -> dict[str, str]:
    """Name -> id of all experiments; TrackingError where the store fails."""
    found: dict[str, str] = {}
    token = None
    try:
        while True:
            page = store.client.search_experiments(max_results=1000, page_token=token)
            found |= {e.name: str(e.experiment_id) for e in page}
            token = page.token
            if not token:
                return found
    except store_errors() as error:
        raise store.unreadable(error) from error


def adopt(store: Store, run_id: str, parent_run_id: str) -> None:
    """Make a run the child of another parent; a tag keeps the ids of its earlier ones.

    Of runs that the store has not taken, nothing changes.
    """
    if store.is_lost or run_id.startswith("local-") or parent_run_id.startswith("local-"):
        return
    from mlflow.entities import RunTag

    try:
        there = store.client.get_run(run_id).data.tags
        before = there.get(PARENT_RUN_ID, "")
        if before == parent_run_id:
            return
        former = dict.fromkeys([*there.get(FORMER_PARENTS, "").split(), before])
        kept = [parent for parent in former if parent and parent != parent_run_id][-_MAX_FORMER_PARENTS:]
        tags = {FORMER_PARENTS: " ".join(kept), PARENT_RUN_ID: parent_run_id}
        store.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])
    except store_errors() as error:
        _LOG.warning("%s: run %s stays under its earlier parent (%s)", store.uri, run_id, first_line(error))


def annotate(store: Store, run_id: str, metrics: Mapping[str, float], tags: Mapping[str, str]) -> bool:
    """Add numbers and tags to a run that has ended; False, with a word, where the store does not take them."""
    if store.is_lost or run_id.startswith("local-"):
        return False
    try:
        for key, value in checked_tags(tags).items():
            store.client.set_tag(run_id, key, value)
        for name, number in metrics.items():
            store.client.log_metric(run_id, name, number)
    except store_errors() as error:
        _LOG.warning("%s: run %s is not told of its export (%s)", store.uri, run_id, first_line(error))
        return False
    return True


def get_artifact(store: Store, run_id: str, name: str, folder: Path) -> Path:
    """Copy one artifact of a run into ``folder`` and return its path there; TrackingError where there is none such."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return Path(store.client.download_artifacts(run_id, name, str(folder)))
    except store_errors() as error:
        raise TrackingError(
            f"{name}: run {run_id} has no such artifact ({first_line(error)}); its page in MLflow lists those it has"
        ) from error


def _where(tags: Mapping[str, str], status: str | None = None) -> str:
    """The words of MLflow's search language for runs that have all of ``tags``; ``%`` stands for any text."""
    wanted = {**({"attributes.status": status} if status else {}), **{f"tags.`{k}`": v for k, v in tags.items()}}
    for name, value in wanted.items():
        if "'" in value or "\\" in value:
            raise TrackingError(f"{name}={value}: a run is not found by a value with a quote or backslash")
    return " and ".join(f"{name} {'LIKE' if '%' in value else '='} '{value}'" for name, value in wanted.items())


def _data(run: entities.Run) -> RunData:
    return {
        "run_id": run.info.run_id,
        "name": run.info.run_name or "",
        "status": run.info.status,
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": dict(run.data.tags),
        "start_ms": run.info.start_time or 0,
        "end_ms": run.info.end_time,
        "experiment_id": str(run.info.experiment_id),
        "artifact_uri": run.info.artifact_uri or "",
    }
