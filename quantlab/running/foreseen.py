"""What a dry run can say beforehand: which jobs an earlier sweep has finished, and how long the others may take.

Read from the store (or the runs' folders) and from what earlier processes noted; no weights, and without torch.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.backends.table import offers
from quantlab.errors import ConfigError, TrackingError
from quantlab.planning.job import Job, Plan
from quantlab.progress import counted
from quantlab.report.reading import Reader, StoredRun, open_reader
from quantlab.report.selection import scheme_nodes
from quantlab.running.first_look import amount, first_look
from quantlab.running.known import Known, recall_each, reference_of
from quantlab.running.once import Once
from quantlab.running.resume import content_key
from quantlab.tracking.tags import JOB_KEY, KIND, PARENT_RUN_ID
from quantlab.tracking.values import flatten
from quantlab.vocabulary.axes import QuantizationAxes, resolve_axes
from quantlab.vocabulary.native import canonical_json

STAGES = (
    "calibrate",
    "quantize",
    "compile",
    "warm_up",
    "evaluate",
    "own_kernels",
    "weigh",
    "evidence",
    "attribute",
    "speed",
)
"""Of a job alone; loading the model and making the reference are the sweep's."""
_SAME = ("model.", "dataset.", "evaluation.")
"""Parameters of the jobs whose times are compared."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """How long jobs may take, by earlier ones of the same model and evaluation."""

    seconds: float
    num_jobs: int
    """Of so many jobs; of the others no earlier one is known."""
    num_alike: int
    """For so many of them there are earlier jobs of the same backends and algorithms: their median. For the others it
    is the mean of all."""
    rests_on: int
    """So many earlier jobs."""


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What is known of a request before it runs."""

    resumed: frozenset[str] = frozenset()
    """Names of the jobs that are not run again."""
    num_left: int = 0
    """Jobs that would be run."""
    estimate: Estimate | None = None
    store: str = ""
    merged: str = ""
    """What is said of jobs that are one scheme on this model."""
    untimed: str = ""
    """What is said where no earlier job tells how long any may take."""

    def lines(self, num_jobs: int) -> list[str]:
        """What is said of it."""
        told = [self.merged] if self.merged else []
        if self.resumed:
            num = len(self.resumed)
            are = (
                "is resumed: an earlier sweep has finished it"
                if num == 1
                else "are resumed: an earlier sweep has finished them"
            )
            told.append(f"{num} of {counted(num_jobs, 'job')} {are}")
        found = self.estimate
        if found is not None:
            whole = f"about {found.seconds / 60:.1f} min" if found.seconds >= 60 else f"about {found.seconds:.0f} s"
            whole = whole if found.seconds >= 1 else "less than a second"
            jobs = counted(self.num_left, "job")
            jobs = f"{found.num_jobs} of {jobs}" if found.num_jobs < self.num_left else jobs
            other = found.num_jobs - found.num_alike
            how = "by the median of the same backend and algorithm" if found.num_alike else "by their mean"
            how += f" ({counted(other, 'job')} by the mean of all)" if other and found.num_alike else ""
            told.append(
                f"{whole} for {jobs}: {how}, of {counted(found.rests_on, 'earlier job')} of this model "
                f"and evaluation in {self.store}; without loading the model, the reference, its floors and the "
                "tracking"
            )
        elif self.untimed:
            told.append(self.untimed)
        return told


def foreseen(request: Plan) -> Foreseen:
    """What the store of a request knows of its jobs; nothing where it cannot be read.

    Raises TrackingError for a server that the run would refuse.
    """
    config = request.jobs[0].config
    with contextlib.suppress(TrackingError):
        try:
            reader = open_reader(config.tracking, Path.cwd(), config.output_dir)
        except TrackingError as error:
            if config.tracking.required and config.tracking.uri.startswith("http"):
                raise ConfigError(str(error)) from error
            raise
        runs = _jobs(reader, config.tracking.experiment)
        known = recall_each(request.jobs, Path(config.output_dir).expanduser().absolute() / "cache")
        resumes = request.is_sweep and not config.sweep.force
        resumed = frozenset(_resumed(request, runs, known)) if resumes else frozenset()
        once = Once()
        jobs = [job for job in request.jobs if not _is_again(once, known[reference_of(job)], job)]
        left = [job for job in jobs if job.name not in resumed]
        if config.sweep.search.num_trials:
            num_known = sum(job.name in resumed for job in jobs)  # they are told to the study, and count
            left = left[: max(0, config.sweep.search.num_trials - num_known)]
        return Foreseen(
            resumed=resumed,
            num_left=len(left),
            untimed=_untimed(request) if left else "",
            estimate=_estimate(left, runs),
            store=reader.uri,
            merged=once.said,
        )
    return Foreseen(untimed=_untimed(request))


def _untimed(request: Plan) -> str:
    """Of a request that no earlier job tells of: how much it runs, by which its user can judge, and how to run less."""
    config = request.jobs[0].config
    less = f"; {' '.join(words)}: a first look, with wide intervals" if (words := first_look(config)) else ""
    return (
        "how long: no earlier job of this model and evaluation tells; "
        f"each job, the reference and each floor run {amount(config)}{less}"
    )


def _jobs(reader: Reader, experiment: str) -> list[StoredRun]:
    number = reader.experiments().get(experiment)
    return reader.of_experiment(number, {KIND: "job"}) if number is not None else []


def _is_again(once: Once, known: Known | None, job: Job) -> bool:
    return job.comes_along or known is not None and once.is_again(known, job)


def _resumed(request: Plan, runs: Sequence[StoredRun], known: Mapping[str, Known | None]) -> list[str]:
    """Jobs whose key a finished run of a sweep has; none of a model that no earlier process noted the same of."""
    statuses = ("FINISHED",) if request.jobs[0].config.sweep.retry_failed else ("FINISHED", "FAILED")
    done = {run.tags.get(JOB_KEY) for run in runs if run.status in statuses and PARENT_RUN_ID in run.tags}
    cache_dir = Path(request.jobs[0].config.output_dir).expanduser().absolute() / "cache"
    return [
        job.name
        for job in request.jobs
        if (there := known[reference_of(job)]) is not None and content_key(there, job, cache_dir) in done
    ]


def _estimate(jobs: Sequence[Job], runs: Sequence[StoredRun]) -> Estimate | None:
    """Of all jobs by earlier ones; None where no earlier one tells anything."""
    measured = [(run, seconds) for run in runs if (seconds := _seconds_of(run)) is not None]
    known: dict[str, dict[_Kind, list[float]]] = {}
    total, num_jobs, num_alike = 0.0, 0, 0
    used: set[str] = set()
    for job in jobs:
        wanted = _of_the_model(flatten(job.resolved))
        key = canonical_json(wanted)
        if key not in known:
            known[key] = {}
            for run, seconds in measured:
                if _of_the_model(run.params).items() <= wanted.items():
                    known[key].setdefault(_kind_of(run.params), []).append(seconds)
                    used.add(run.run_id)
        times, kind = known[key], frozenset((s.axes.backend, s.axes.algorithm) for s in job.schemes.values())
        if not times:
            continue
        num_jobs += 1
        num_alike += kind in times
        every = [seconds for some in times.values() for seconds in some]
        total += statistics.median(times[kind]) if kind in times else statistics.mean(every)
    return Estimate(seconds=total, num_jobs=num_jobs, num_alike=num_alike, rests_on=len(used)) if num_jobs else None


_Kind = frozenset[tuple[str, str]]
"""Backend and algorithm of each scheme of a job: a calibrated one may take ten times one that rounds."""


def _kind_of(params: Mapping[str, str]) -> _Kind:
    found = set()
    for node, backend in scheme_nodes(params).items():
        dtype, algorithm = (params.get(f"{node}.{name}", "auto") for name in ("dtype", "algorithm"))
        with contextlib.suppress(ConfigError):  # of another version, or of a backend that is not there any more
            asked = QuantizationAxes(backend=backend, dtype=dtype, algorithm=algorithm)
            found.add((backend, resolve_axes(asked, offers()).algorithm))
    return frozenset(found)


def _seconds_of(run: StoredRun) -> float | None:
    """Of a finished job of a scheme: all its own stages."""
    if run.status != "FINISHED" or "quantization/coverage" not in run.metrics:
        return None
    found = [run.metrics[f"perf/{stage}_s"] for stage in STAGES if f"perf/{stage}_s" in run.metrics]
    return sum(found) if found else None


def _of_the_model(params: Mapping[str, str]) -> dict[str, str]:
    """Without seeds, with which a job takes as long."""
    return {k: v for k, v in params.items() if k.startswith(_SAME) and not k.endswith("seed")}
