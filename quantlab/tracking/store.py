"""The tracking store: an MLflow client that takes the events of a run's record, now or when it answers again."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from quantlab.errors import TrackingError
from quantlab.progress import printable
from quantlab.tracking.connect import (
    ANSWER_SECONDS,
    NO_STORE,
    SLOWEST_BYTES_S,
    connect,
    first_line,
    is_refusal,
    resolved_uri,
    shown_uri,
    store_errors,
    within,
)
from quantlab.tracking.events import Artifact, Event, Input, RunSummary
from quantlab.tracking.record import Record, Sent
from quantlab.tracking.run import Run
from quantlab.tracking.tags import LOGGED_TABLES, PARENT_RUN_ID, RECORD
from quantlab.tracking.values import MAX_KEY_CHARS, MAX_PARAM_CHARS, checked_tags, shortened, this_process
from quantlab.vocabulary.schema import TrackingConfig

if TYPE_CHECKING:
    from mlflow import MlflowClient, entities

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

_FIRST_PAUSE_S = 30.0
_LONGEST_PAUSE_S = 600.0


def open_store(config: TrackingConfig, base_dir: Path, makes: bool = True) -> Store:
    """The store of ``config``, reached and ready.

    A relative SQLite path starts at ``base_dir``; its artifacts go to ``mlartifacts`` beside the database. Raises
    TrackingError for an address that is not supported, and, with ``required``, for a store that cannot be used; without
    ``required`` that is one warning, and runs are written to their folders only. Without ``makes`` a server is read,
    and no experiment is made there.
    """
    uri = resolved_uri(config.uri, base_dir)
    if uri == NO_STORE:
        return no_store(config, base_dir)
    try:
        client, experiment_id = connect(uri, config.experiment, makes)
    except TrackingError as error:
        if config.required:
            raise
        _LOG.warning("%s (runs stay in their folders until a later start reaches the store)", error)
        client, experiment_id = None, ""
    return Store(shown_uri(uri), client, experiment_id)


def no_store(config: TrackingConfig, base_dir: Path) -> Store:
    """The store of ``config``, never asked for: runs stay in their folders, and another process sends them."""
    return Store(shown_uri(resolved_uri(config.uri, base_dir)), None, "")


class Store:
    """One experiment of one MLflow store, reached or not."""

    def __init__(self, uri: str, client: MlflowClient | None, experiment_id: str) -> None:
        self.uri = uri
        self._client = client
        self.experiment_id = experiment_id
        self._records: dict[str, str] = {}  # run id -> record id, of runs that this process knows
        self.was_lost = False
        """Did it fail at any time? Then runs may be pending."""
        self._quiet_until = 0.0
        self._pause = _FIRST_PAUSE_S

    def start_run(
        self,
        name: str,
        folder: Path,
        params: Mapping[str, object],
        tags: Mapping[str, object],
        parent_run_id: str | None = None,
    ) -> Run:
        """Begin a run whose record is kept in ``folder`` (which must not hold one yet).

        ``parent_run_id`` is the ``run_id`` of the sweep's run. Raises TrackingError for names the store does not take.
        """
        parent_record = self._record_of(parent_run_id) if parent_run_id else None
        known = {**checked_tags(tags), **this_process()}
        run = Run(self, Record.create(folder, printable(name, MAX_KEY_CHARS), known, parent_run_id, parent_record))
        run.log_params(params)
        self.sync(run.record)
        self._records[run.run_id] = run.record.summary["record"]
        return run

    def sync(self, record: Record) -> bool:
        """Send what has not arrived; True where nothing is pending any more.

        A store that fails is one warning; it is left alone for a while, then tried again with everything pending.
        """
        if self.uri == NO_STORE and not record.is_open:
            record.keep_here(NO_STORE)
        if self.is_lost:
            return False
        try:
            with record.locked() as alone:
                if not alone:
                    return False
                self._send(record)
        except store_errors() as error:
            self.lose(error)
            return False
        self._pause = _FIRST_PAUSE_S
        return True

    @property
    def client(self) -> MlflowClient:
        """MLflow's client; TrackingError where the store was not reached."""
        if self._client is None:
            raise TrackingError(f"tracking.uri={self.uri}: was not reached; start the server, or name another store")
        return self._client

    @property
    def is_reached(self) -> bool:
        """Did the store answer when it was opened?"""
        return self._client is not None

    @property
    def is_lost(self) -> bool:
        """Was the store not reached, or does it rest after a failure?"""
        return self._client is None or time.monotonic() < self._quiet_until

    def lose(self, error: Exception) -> None:
        """Leave a store that failed alone for a while; the first time, say so."""
        self.was_lost = True
        self._quiet_until = time.monotonic() + self._pause
        if self._pause == _FIRST_PAUSE_S:
            _LOG.warning(
                "tracking.uri=%s: the store is lost (%s); runs go on in their folders, and are sent "
                "when it answers again, or at the next start",
                self.uri,
                first_line(error),
            )
        self._pause = min(2 * self._pause, _LONGEST_PAUSE_S)

    def wake(self) -> None:
        """End the rest of a store that failed: it is tried at the next call."""
        self._quiet_until = 0.0

    def unreadable(self, error: Exception) -> TrackingError:
        """What a user is told where a question to the store failed."""
        return TrackingError(
            f"tracking.uri={self.uri}: cannot be read ({first_line(error)}); try again when it answers, or set "
            "tracking.uri=..."
        )

    def know(self, run_id: str, record_id: str) -> None:
        """Note the record's id of another process's run, so that a parent is found again in whichever store it is."""
        self._records[run_id] = record_id

    def run_ids(self, filter_string: str) -> list[str]:
        """Ids of the experiment's runs that a filter of MLflow's search language names."""
        return [run.info.run_id for run in self.search(filter_string)]

    def search(self, filter_string: str, experiment_id: str | None = None) -> Iterator[entities.Run]:
        """MLflow's runs of this experiment, or of another one, newest first."""
        ids, token = [experiment_id or self.experiment_id], None
        while True:
            page = self.client.search_runs(ids, filter_string, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _send(self, record: Record) -> None:
        sent = record.sent()
        if sent is None or sent.uri != self.uri or sent.run_id is None:
            sent = self._arrive(record, tried=sent is not None)
        before = sent.offset
        try:
            self._send_from(record, sent)
        finally:
            if sent.offset != before:
                record.save_sent(sent)

    def _send_from(self, record: Record, sent: Sent) -> None:
        for event, offset in record.events(sent.offset):
            try:
                self._deliver(str(sent.run_id), event, record.folder)
            except store_errors() as error:
                if not is_refusal(error):
                    raise
                if not sent.refused:
                    _LOG.warning(
                        "%s: the store refuses %s (%s); it stays in the folder",
                        record.folder,
                        event["op"],
                        first_line(error),
                    )
                sent.refused.append(f"{event['op']}: {first_line(error)}")
            sent.offset, sent.done = offset, event["op"] == "finish"

    def _deliver(self, run_id: str, event: Event, folder: Path) -> None:
        """One event to the store; TimeoutError where a server takes too long for its whole answer."""
        if not self.uri.startswith("http"):
            _deliver(self.client, run_id, event, folder)
            return
        seconds = float(ANSWER_SECONDS)
        if event["op"] == "artifact" and (file := folder / event["file"]).is_file():
            seconds += file.stat().st_size / SLOWEST_BYTES_S
        within(seconds, lambda: _deliver(self.client, run_id, event, folder))

    def _arrive(self, record: Record, tried: bool) -> Sent:
        """The run of ``record`` in this store: found by its record's id after an earlier try, else created."""
        start = record.summary
        sent = Sent(self.uri)
        found = self.run_ids(f"tags.`{RECORD}` = '{start['record']}'") if tried else []
        if found:
            sent.run_id = found[0]
        else:
            record.save_sent(sent)  # a creation whose answer is lost is found by its tag the next time
            tags = {RECORD: start["record"], **self._parent_tags(start)}
            made = self.client.create_run(
                self.experiment_id, start_time=start["start_ms"], tags=tags, run_name=start["name"]
            )
            sent.run_id = made.info.run_id
        record.save_sent(sent)
        return sent

    def _parent_tags(self, start: RunSummary) -> dict[str, str]:
        parent, record_id = start["parent_run_id"], start["parent_record"]
        here = self.run_ids(f"tags.`{RECORD}` = '{record_id}'") if record_id else []
        if here:
            return {PARENT_RUN_ID: here[0]}
        return {PARENT_RUN_ID: parent} if parent and not parent.startswith("local-") else {}

    def _record_of(self, run_id: str) -> str | None:
        """The record's id of a run, by which it is found again in another store; None where it cannot be known."""
        if run_id.startswith("local-"):
            return run_id.removeprefix("local-")
        if run_id not in self._records and not self.is_lost:
            try:
                self._records[run_id] = self.client.get_run(run_id).data.tags.get(RECORD, "")
            except store_errors() as error:
                _LOG.debug("parent run %s is not found: %s", run_id, first_line(error))
        return self._records.get(run_id) or None


def _deliver(client: MlflowClient, run_id: str, event: Event, folder: Path) -> None:
    """One event to the store. Sending the same event again changes nothing there."""
    from mlflow.entities import Metric, RunTag

    if event["op"] == "start" or event["op"] == "tags":
        tags = event["tags"] if event["op"] == "start" else event["values"]
        if len(tags) == 1:  # most events: a third of what a batch takes in a database
            client.set_tag(run_id, *next(iter(tags.items())))
            return
        for some in _batches([RunTag(k, v) for k, v in tags.items()], 100):
            client.log_batch(run_id, tags=some)
    elif event["op"] == "params":
        _deliver_params(client, run_id, event["values"])
    elif event["op"] == "metrics":
        values = [Metric(k, v, event["time_ms"], 0) for k, v in event["values"].items()]
        for batch in _batches(values, 1000):
            client.log_batch(run_id, metrics=batch)
    elif event["op"] == "curve":
        points = [Metric(event["name"], v, event["time_ms"], k) for k, v in enumerate(event["values"])]
        for batch in _batches(points, 1000):
            client.log_batch(run_id, metrics=batch)
    elif event["op"] == "input":
        _deliver_input(client, run_id, event)
    elif event["op"] == "artifact":
        _deliver_artifact(client, run_id, event, folder)
    elif event["op"] == "finish":
        client.set_terminated(run_id, event["status"], event["time_ms"])


def _deliver_params(client: MlflowClient, run_id: str, values: Mapping[str, str]) -> None:
    from mlflow.entities import Param

    short = {key: shortened(value, MAX_PARAM_CHARS, f"whole in params/{key}.txt") for key, value in values.items()}
    for some in _batches([Param(k, v) for k, v in short.items()], 100):
        client.log_batch(run_id, params=some)


def _deliver_input(client: MlflowClient, run_id: str, event: Input) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    told = Dataset(
        name=event["name"],
        digest=event["digest"],
        source_type="local" if "uri" in event["source"] else "code",
        source=json.dumps(event["source"]),
        profile=json.dumps(event["profile"]),
    )
    client.log_inputs(run_id, datasets=[DatasetInput(told, [InputTag("mlflow.data.context", event["context"])])])


def _deliver_artifact(client: MlflowClient, run_id: str, event: Artifact, folder: Path) -> None:
    path = folder / event["file"]
    if not path.is_file():
        _LOG.warning("%s: the file is gone and cannot be sent to the store", path)
        return
    if not path.resolve().is_relative_to(folder.resolve()):  # a link: what it leads to is no part of the run
        _LOG.warning("%s: the file lies outside the run's folder and is not sent to the store", path)
        return
    target = Path(event["name"]).parent.as_posix()
    client.log_artifact(run_id, str(path), None if target == "." else target)
    if event["table"]:  # by this tag MLflow's page finds the tables of a run
        known = json.loads(client.get_run(run_id).data.tags.get(LOGGED_TABLES, "[]"))
        entry = {"path": event["name"], "type": "table"}
        if entry not in known:
            client.set_tag(run_id, LOGGED_TABLES, json.dumps([*known, entry]))


def _batches(items: Sequence[_T], size: int) -> Iterator[Sequence[_T]]:
    for begin in range(0, len(items), size):
        yield items[begin : begin + size]
