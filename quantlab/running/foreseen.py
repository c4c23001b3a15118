"""What a dry run can say beforehand: which jobs an earlier sweep has finished, and how long the others may take.

Read from the store (or the runs' folders) and from what earlier processes noted; no weights, and without torch.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantlab.errors import TrackingError
from quantlab.planning.job import Job, Plan
from quantlab.report.reading import Reader, StoredRun, open_reader
from quantlab.running.known import Known, bench_key, recall
from quantlab.running.resume import content_key
from quantlab.tracking.tags import JOB_KEY, KIND, PARENT_RUN_ID
from quantlab.tracking.values import flatten

STAGES = ("calibrate", "quantize", "evaluate", "weigh", "evidence", "attribute")
"""Of a job alone; loading the model and making the reference are the sweep's."""
_SAME = ("model.", "dataset.", "evaluation.")
"""Parameters of the jobs whose times are compared."""


@dataclass(frozen=True, kw_only=True)
class Foreseen:
    """What is known of a request before it runs."""

    resumed: frozenset[str] = frozenset()
    """Names of the jobs that are not run again."""
    seconds: float | None = None
    """Of all others, by the median of earlier jobs; None where there were none."""
    rests_on: int = 0
    """So many earlier jobs."""
    store: str = ""

    def lines(self, num_jobs: int) -> list[str]:
        """What is said of it."""
        told = [f"{len(self.resumed)} of {num_jobs} jobs are resumed: an earlier sweep has finished them"]
        left = num_jobs - len(self.resumed)
        if self.seconds is not None and left:
            each = self.seconds / left
            whole = f"{self.seconds / 60:.1f} min" if self.seconds >= 60 else f"{self.seconds:.0f} s"
            told.append(
                f"about {whole} for {left} jobs: {each:.1f} s is the median of {self.rests_on} earlier jobs of this "
                f"model and evaluation in {self.store}; without loading the model, the reference and its floors"
            )
        return told if self.resumed else told[1:]


def foreseen(request: Plan) -> Foreseen:
    """What the store of a request knows of its jobs; nothing where it cannot be read."""
    config = request.jobs[0].config
    with contextlib.suppress(TrackingError):
        reader = open_reader(config.tracking, Path.cwd(), config.output_dir)
        runs = _jobs(reader, config.tracking.experiment)
        resumed = frozenset(_resumed(request, runs)) if request.is_sweep and not config.sweep.force else frozenset()
        left = [job for job in request.jobs if job.name not in resumed]
        if config.sweep.search.num_trials:
            left = left[: config.sweep.search.num_trials]
        per_job, num = _seconds(left, runs)
        return Foreseen(resumed=resumed, seconds=per_job, rests_on=num, store=reader.uri)
    return Foreseen()


def _jobs(reader: Reader, experiment: str) -> list[StoredRun]:
    number = reader.experiments().get(experiment)
    return reader.of_experiment(number, {KIND: "job"}) if number is not None else []


def _resumed(request: Plan, runs: Sequence[StoredRun]) -> list[str]:
    """Jobs whose key a finished run of a sweep has; none of a model that no earlier process noted the same of."""
    statuses = ("FINISHED",) if request.jobs[0].config.sweep.retry_failed else ("FINISHED", "FAILED")
    done = {run.tags.get(JOB_KEY) for run in runs if run.status in statuses and PARENT_RUN_ID in run.tags}
    known: dict[tuple[str, ...], Known | None] = {}
    found = []
    for job in request.jobs:
        cache_dir = Path(job.config.output_dir).expanduser().absolute() / "cache"
        key = (bench_key(job.config), *sorted(job.config.components))
        if key not in known:
            known[key] = recall(job.config, cache_dir)
        noted = known[key]
        if noted is not None and content_key(noted, job, cache_dir) in done:
            found.append(job.name)
    return found


def _seconds(jobs: Sequence[Job], runs: Sequence[StoredRun]) -> tuple[float | None, int]:
    """Seconds of all jobs by the median of earlier ones of the same model and evaluation, and how many these were."""
    if not jobs:
        return None, 0
    wanted = _of_the_model(flatten(jobs[0].resolved))
    times = [
        sum(seconds)
        for run in runs
        if run.status == "FINISHED" and _of_the_model(run.params).items() <= wanted.items()
        if (seconds := [run.metrics[f"perf/{stage}_s"] for stage in STAGES if f"perf/{stage}_s" in run.metrics])
        and "quantization/coverage" in run.metrics
    ]
    return (statistics.median(times) * len(jobs), len(times)) if times else (None, 0)


def _of_the_model(params: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in params.items() if key.startswith(_SAME)}
