"""A sweep on the nodes of an engine, as the process sees it that submits it: no model is loaded, no torch imported.

The reference with its floors is a job of its own, once for each model and inputs. By what it wrote, or by what an
earlier one is known to have found, the sweep knows its jobs' keys; only then are they looked up, and those that have
not finished are handed over. A sweep that leaves hands them over behind the reference's job.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from quantlab import tracking
from quantlab.errors import QuantlabError
from quantlab.models.table import family_of
from quantlab.planning.job import Job
from quantlab.progress import headline_of, say
from quantlab.running.apart import Floors, Handed, collect
from quantlab.running.attempts import LOG, RESULT, read
from quantlab.running.handing import SUBMITTED, handed, run_handed
from quantlab.running.known import (
    Known,
    bench_key,
    known_of,
    recall,
    remember,
    request_digest,
    where_of,
)
from quantlab.running.once import Once
from quantlab.running.resume import content_key, earlier_report
from quantlab.running.rows import failed_row, floors_of
from quantlab.running.scheduler import Counts
from quantlab.running.workbench import Session
from quantlab.tracking import Run
from quantlab.tracking.provenance import code_digest
from quantlab.tracking.tags import DEVICE, JUDGE_SHA256, MODEL_ARTIFACT, STAGE, WEIGHTS_SHA256
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import CalibrationConfig

NAME = "reference and floors"
"""Of the job."""
JOBS_STAGE = "jobs"
"""The stage of a sweep whose jobs run, here or elsewhere, each of which has a run of its own."""


@dataclass
class Group:
    """Jobs that share a reference, by their places in the sweep."""

    jobs: dict[int, Job]
    known: Known | None = None
    floor_rows: list[RunReport] = field(default_factory=list)
    rows: dict[int, RunReport] = field(default_factory=dict)
    error: str = ""
    """Why there is no reference."""
    was_asked_again: bool = False
    files: str | None = None
    """Digest of what its reference is of, when that was asked for."""

    @property
    def first(self) -> Job:
        """Its reference's settings are those of all."""
        return next(iter(self.jobs.values()))

    @property
    def protocol(self) -> str:
        """Of its model."""
        return self.known.protocol if self.known is not None else family_of(self.first.config.model).protocol

    @property
    def floors(self) -> Floors:
        """What its floors cost."""
        return floors_of(self.floor_rows, self.known is not None and self.known.is_brought)

    def hand_over(self, session: Session, place: int, key: str, behind: Path | None = None) -> Handed:
        """One of its jobs, once the reference is known, or ``behind`` the reference's job."""
        job, floors = self.jobs[place], None if self.known is None else self.floors
        one = handed(session, job, key, self.protocol, floors, claim=_claim(job), known=self.known, behind=behind)
        return replace(one, place=place)


def groups_of(jobs: Sequence[Job]) -> list[Group]:
    """The jobs by their references, in order."""
    found: dict[str, Group] = {}
    for place, job in enumerate(jobs):
        found.setdefault(bench_key(job.config), Group(jobs={})).jobs[place] = job
    return list(found.values())


def run_far(session: Session, jobs: Sequence[Job], parent: Run) -> list[RunReport]:
    """The rows of a sweep's jobs, each reference's and its floors' before the first job that is compared with it.

    Where a reference fails, the rows of its jobs say so. Raises :class:`EngineError` where the engine takes no job.
    """
    groups = groups_of(jobs)
    begun = [one for group in groups for one in begin(session, group, parent, look_up)]
    run_all(session, groups, begun, parent, look_up)
    rows: list[RunReport] = []
    told: set[int] = set()
    for place in range(len(jobs)):
        group = next((group for group in groups if place in group.jobs), None)
        if group is None:  # one scheme with another job
            continue
        if id(group) not in told:
            told.add(id(group))
            rows += group.floor_rows
        rows += [group.rows[place]] if place in group.rows else []  # none of a floor
    return rows


def references(session: Session, jobs: Sequence[Job], parent: Run) -> list[Group]:
    """The groups of jobs, with their references and floors; nothing else is run.

    Raises QuantlabError where a reference fails.
    """
    groups = groups_of(jobs)
    begun = [one for group in groups for one in begin(session, group, parent, _nothing)]
    run_all(session, groups, begun, parent, _nothing)
    for group in groups:
        if group.error:
            raise QuantlabError(f"{group.first.name}: {group.error}")
    return groups


def _nothing(session: Session, group: Group) -> list[Handed]:
    return []


Settle = Callable[[Session, Group], list[Handed]]
"""Called when a group's reference is known; what is then to be run."""


def begin(session: Session, group: Group, parent: Run, settle: Settle) -> list[Handed]:
    """What a group begins with: its jobs where its reference is known with its floors, else the reference's job."""
    config, cache = group.first.config, session.output_dir / "cache"
    known = None if config.sweep.force else recall(config, cache)
    if known is not None:
        wanted = known.floor_jobs(config)
        rows = [earlier_report(session, known.protocol, one, content_key(known, one, cache)) for one in wanted]
        found = [row for row in rows if row is not None]
        if len(found) == len(wanted):
            _know(session, group, parent, known, found)
            return settle(session, group)
    group.files = request_digest(config, cache)
    reference = replace(group.first, name=NAME)
    calibrations: list[CalibrationConfig] = []
    for job in group.jobs.values():
        if job.needs_data and job.config.calibration not in calibrations:
            calibrations.append(job.config.calibration)
    claim = _claim(reference)
    one = handed(session, reference, "", group.protocol, None, claim=claim, calibrations=calibrations)
    one = replace(one, place=min(group.jobs))
    if config.launcher.detach and not one.is_elsewhere:
        own = [place for place, job in group.jobs.items() if not job.comes_along]  # the rest is that job's work
        return [one, *(group.hand_over(session, place, "", one.folder) for place in own or group.jobs)]
    return [one]


def run_all(session: Session, groups: Sequence[Group], begun: Sequence[Handed], parent: Run, settle: Settle) -> None:
    """Run what was begun and what comes after it; groups hold their rows afterwards, or why they have none."""

    def group_of(one: Handed) -> Group:
        return next(group for group in groups if one.place in group.jobs)

    def more(one: Handed, row: RunReport) -> list[Handed]:
        group = group_of(one)
        if not one.is_no_row:
            group.rows[one.place] = row
            if row.status == "FAILED":
                say(f"{row.name} at {row.failed_stage}: {headline_of(row.error, 500)}", "failed")
            return []
        if row.status == SUBMITTED:
            return []
        return _after_reference(session, group, one, row, parent, settle)

    def progress(counts: Counts) -> None:
        done, num = (sum(map(len, each)) for each in ((g.rows for g in groups), (g.jobs for g in groups)))
        session.advance("jobs", done, num, f"{counts.running} running, {counts.failed} failed")

    if begun:
        run_handed(session, begun, begun[0].job.config, progress, more)


def look_up(session: Session, group: Group) -> list[Handed]:
    """The jobs of a group whose reference is known that have not finished; the rows of those that have."""
    assert group.known is not None
    left, once = [], Once()
    for place, job in [*group.jobs.items()]:
        if once.is_again(group.known, job):
            if len(group.jobs) > 1:  # else they were all floors, which keep its place
                del group.jobs[place]
            continue
        key = content_key(group.known, job, session.output_dir / "cache")
        earlier = earlier_report(session, group.protocol, job, key)
        if earlier is not None:
            group.rows[place] = earlier
        else:
            left.append(group.hand_over(session, place, key))
    once.tell()
    return left


def _after_reference(
    session: Session, group: Group, one: Handed, row: RunReport, parent: Run, settle: Settle
) -> list[Handed]:
    """What comes after a reference's job: its group's jobs, or the job again where another sweep's left nothing."""
    result = {} if one.is_elsewhere else read(one.folder, RESULT)
    if row.status == "FINISHED" and result:
        known, config, cache = known_of(result["known"]), group.first.config, session.output_dir / "cache"
        if not one.job_id and group.files in (None, request_digest(config, cache)):  # the files of its beginning
            remember(config, cache, known)  # where the node's cache is another one
        _know(session, group, parent, known, _floor_rows(session, group, known, one.folder, result["rows"]))
        return settle(session, group)
    if row.status == "FINISHED" and not group.was_asked_again:  # it was another sweep's
        group.was_asked_again = True
        return begin(session, group, parent, settle)
    group.error = f"its reference failed: {row.error or 'it left nothing'}; its log is {one.folder / LOG}"
    say(group.error, "failed")
    group.rows |= {
        place: failed_row(job, group.protocol, group.error, "reference") for place, job in group.jobs.items()
    }
    return []


def _floor_rows(session: Session, group: Group, known: Known, folder: Path, keys: dict[str, str]) -> list[RunReport]:
    """The rows that the reference's job measured, each a run of its own in its folder, and those that it found."""
    rows = []
    for floor in known.floor_jobs(group.first.config):
        if floor.name not in keys:
            continue
        key, place = keys[floor.name], folder / floor.name
        if place.is_dir():
            row = collect(session, Handed(job=floor, key=key, protocol=known.protocol, folder=place))
        else:
            row = earlier_report(session, known.protocol, floor, key) or failed_row(
                floor, known.protocol, "its run is gone; give the command again", "floors"
            )
        if row.run_id and session.parent_run_id:
            tracking.adopt(session.store, row.run_id, session.parent_run_id)
        rows.append(row)
    return rows


def _know(session: Session, group: Group, parent: Run, known: Known, floor_rows: list[RunReport]) -> None:
    """From here on a group's reference is known; the sweep's run says of what it is."""
    group.known, group.floor_rows = known, floor_rows
    parent.set_tags({**known.tags, DEVICE: str(known.made["device"]), STAGE: JOBS_STAGE})
    config, digest = group.first.config.model, known.tags[WEIGHTS_SHA256]
    trained = family_of(config).trained
    held = {MODEL_ARTIFACT: digest, **{k: v for k, v in known.tags.items() if k == JUDGE_SHA256}}
    if trained is None or config.path is not None or tracking.has_run_with_tags(session.store, held):
        return
    folder = session.output_dir / "cache" / "models" / trained.cache_key(config)
    for path in sorted(folder.glob("*.*")):  # none where the node's cache is not ours
        parent.log_artifact(path, f"model/{digest.removeprefix('sha256:')[:16]}")
        parent.set_tags({MODEL_ARTIFACT: digest})


def _claim(job: Job) -> str:
    """By what a job is claimed whose key is not known yet: all that it is asked for, and by which code."""
    said = [bench_key(job.config), sorted(job.config.components)] if job.name == NAME else job.whole_yaml
    asked: list[Any] = [job.name, said, where_of(job.config), job.config.sweep.floors, code_digest()]
    return hashlib.sha256(canonical_json(asked).encode()).hexdigest()[:32]
