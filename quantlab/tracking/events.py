"""What a run writes, event by event, and the sum of its events."""

from __future__ import annotations

from typing import Literal, TypedDict


class _Event(TypedDict, total=False):
    time_ms: int
    """Milliseconds since 1970; the record adds it."""


class Start(_Event):
    """The first event."""

    op: Literal["start"]
    record: str
    name: str
    tags: dict[str, str]
    parent_run_id: str | None
    parent_record: str | None


class Texts(_Event):
    """Parameters or tags by name."""

    op: Literal["params", "tags"]
    values: dict[str, str]


class Numbers(_Event):
    """Metrics by name."""

    op: Literal["metrics"]
    values: dict[str, float]


class Curve(_Event):
    """One metric over steps, from step 0 on."""

    op: Literal["curve"]
    name: str
    values: list[float]


class Input(_Event):
    """Data that the run looked at."""

    op: Literal["input"]
    name: str
    digest: str
    context: str
    """What it was for: ``evaluation``, ``calibration``."""
    source: dict[str, object]
    profile: dict[str, object]


class Artifact(_Event):
    """A file of the run's folder, under the name that it has in the store."""

    op: Literal["artifact"]
    name: str
    file: str
    table: bool
    """Does MLflow's page show it as a table?"""


class Finish(_Event):
    """The last event."""

    op: Literal["finish"]
    status: str
    error: str
    stage: str


Event = Start | Texts | Numbers | Curve | Input | Artifact | Finish


class RunSummary(TypedDict, total=False):
    """The sum of a run's events (``run.json``); empty before the first."""

    record: str
    name: str
    parent_run_id: str | None
    parent_record: str | None
    start_ms: int
    end_ms: int | None
    status: str
    stage: str
    error: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    curves: dict[str, list[float]]
    inputs: dict[str, str]
    """Context -> name and digest of the data."""
    artifacts: list[str]


class EndedRun(RunSummary, total=False):
    """The sum of a run's events and its id."""

    run_id: str


def add_event(summary: RunSummary, event: Event) -> None:
    """Fold one event into the sum."""
    if event["op"] == "start":
        summary.update(
            {
                "record": event["record"],
                "name": event["name"],
                "parent_run_id": event["parent_run_id"],
                "parent_record": event["parent_record"],
                "start_ms": event["time_ms"],
                "end_ms": None,
                "status": "RUNNING",
                "stage": "",
                "error": "",
                "tags": dict(event["tags"]),
                "params": {},
                "metrics": {},
                "artifacts": [],
            }
        )
    elif event["op"] == "metrics":
        summary["metrics"].update(event["values"])
    elif event["op"] == "curve":
        summary.setdefault("curves", {})[event["name"]] = event["values"]
    elif event["op"] == "input":
        summary.setdefault("inputs", {})[event["context"]] = f"{event['name']} {event['digest']}"
    elif event["op"] == "params" or event["op"] == "tags":
        summary[event["op"]].update(event["values"])
    elif event["op"] == "artifact":
        if event["name"] not in summary["artifacts"]:
            summary["artifacts"].append(event["name"])
    elif event["op"] == "finish":
        summary.update({"status": event["status"], "error": event["error"], "stage": event["stage"]})
        summary["end_ms"] = event["time_ms"]
