"""Search: which points of a grid are run is chosen by what the points before them showed, by Optuna's ask-and-tell.

The space is the valid combinations only. A sampler that knows the axes proposes; what is impossible or has been
measured is thrown away and asked again, so the proposals are the sampler's own distribution, restricted to what can
still be learned. The study lives in memory: what makes it last is the tracked runs, which are told to it at the next
start.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from quantlab.planning.job import Job
from quantlab.planning.space import MAXIMIZE
from quantlab.report.pareto import pareto_front
from quantlab.vocabulary.numbers import flat_metrics
from quantlab.vocabulary.reports import RunReport
from quantlab.vocabulary.schema import SearchConfig

MAX_ASKED = 50
"""Proposals that are thrown away in a row before the nearest point that is left is taken."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One point of the space and what is known of it."""

    job: Job
    report: RunReport
    values: tuple[float, ...] | None
    """One number an objective; None for a point that failed."""
    is_told: bool = False
    """Known from an earlier sweep before anything was asked."""


@dataclass
class Search:
    """A study under way: the points that are left, and the trials so far."""

    config: SearchConfig
    objectives: Mapping[str, str]
    space: Sequence[Job]
    trials: list[Trial] = field(default_factory=list)
    num_thrown_away: int = 0

    @property
    def reports(self) -> list[RunReport]:
        """One row a trial, in the order of the space."""
        place = {job.name: i for i, job in enumerate(self.space)}
        return [t.report for t in sorted(self.trials, key=lambda t: place[t.job.name])]

    def data(self) -> dict[str, Any]:
        """The study as JSON data."""
        found = set(front_of([t.values for t in self.trials], self.objectives))
        return {
            "sampler": self.config.sampler,
            "seed": self.config.seed,
            "objectives": dict(self.objectives),
            "num_points": len(self.space),
            "num_thrown_away": self.num_thrown_away,
            "trials": [
                {
                    "number": i,
                    "name": trial.job.name,
                    "point": dict(trial.job.point),
                    "run_id": trial.report.run_id,
                    "state": "failed" if trial.values is None else "told" if trial.is_told else "measured",
                    "values": trial.values,
                    "on_front": i in found,
                }
                for i, trial in enumerate(self.trials)
            ],
            "front": [trial.job.name for i, trial in enumerate(self.trials) if i in found],
        }


# -- the answer


def front_of(values: Sequence[Sequence[float] | None], objectives: Mapping[str, str]) -> list[int]:
    """Indices of the points on the Pareto front of ``objectives`` (name -> direction)."""
    return pareto_front(values, [direction == MAXIMIZE for direction in objectives.values()])


def values_of(report: RunReport, objectives: Mapping[str, str]) -> tuple[float, ...] | None:
    """A row's numbers of the objectives; None where it failed, or has not all of them."""
    metrics = flat_metrics(report)
    found = [metrics.get(name, math.nan) for name in objectives]
    return tuple(found) if report.status == "FINISHED" and all(map(math.isfinite, found)) else None


# -- ask and tell


def run_search(
    search: Search,
    known: Mapping[str, RunReport],
    measure: Callable[[Sequence[Job]], Sequence[RunReport]],
    batch_size: int,
    on_trial: Callable[[int, int, int], None],
) -> None:
    """Fill ``search.trials``: first what is known by job name, then ``num_trials`` points in all, none of them twice.

    ``measure`` runs jobs and returns their rows, ``on_trial(done, total, failed)`` is called before each batch. A space
    that is no larger than ``num_trials`` is run whole, without a sampler.
    """
    for job in search.space:
        if job.name in known:
            _add(search, job, known[job.name], is_told=True)
    total = min(search.config.num_trials, len(search.space))
    study = None if total == len(search.space) else Study(search)
    while (num_left := total - len(search.trials)) > 0:
        on_trial(len(search.trials), total, sum(t.values is None for t in search.trials))
        done = {t.job.name for t in search.trials}
        left = [job for job in search.space if job.name not in done]
        size = min(batch_size, num_left)
        asked = study.ask(left, size) if study else left[:size]
        for job, report in zip(asked, measure(asked), strict=True):
            trial = _add(search, job, report)
            if study:
                study.tell(trial)


def _add(search: Search, job: Job, report: RunReport, is_told: bool = False) -> Trial:
    trial = Trial(job=job, report=report, values=values_of(report, search.objectives), is_told=is_told)
    search.trials.append(trial)
    return trial


class Study:
    """Optuna's study of a space, in memory (its database storage and MLflow's do not go together)."""

    def __init__(self, search: Search) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._search = search
        self._random = random.Random(search.config.seed)
        self._asked: dict[str, Any] = {}
        axes: dict[str, list[str]] = {}
        for job in search.space:
            for key, value in job.point.items():
                axes.setdefault(key, [])
                axes[key] += [value] if value not in axes[key] else []
        self._axes = {
            key: optuna.distributions.CategoricalDistribution(values) for key, values in axes.items() if len(values) > 1
        }
        directions: list[Any] = list(search.objectives.values())
        self._study = optuna.create_study(directions=directions, sampler=_sampler(optuna, search.config))
        for trial in search.trials:
            self._take(trial.job)
            self.tell(trial)

    def ask(self, left: Sequence[Job], size: int) -> list[Job]:
        """``size`` different points among those that are left (at least so many)."""
        by_point = {self._place(job): job for job in left}
        chosen: list[Job] = []
        for _ in range(size):
            job = self._proposed(by_point)
            del by_point[self._place(job)]
            chosen.append(job)
        return chosen

    def tell(self, trial: Trial) -> None:
        """What a point that was asked for showed; a failed one is told as failed, and nothing is learned from it."""
        asked = self._asked.pop(trial.job.name)
        if trial.values is None:
            self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, list(trial.values))

    def _proposed(self, by_point: Mapping[tuple[str, ...], Job]) -> Job:
        """The first proposal that is valid and new; after many, the point that is left with most values in common."""
        for _ in range(MAX_ASKED):
            trial = self._ask()
            place = tuple(trial.params[key] for key in self._axes)
            if place in by_point:
                self._asked[by_point[place].name] = trial
                return by_point[place]
            self._search.num_thrown_away += 1
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        near = [sum(a == b for a, b in zip(place, other, strict=True)) for other in by_point]
        best = [p for p, common in zip(by_point, near, strict=True) if common == max(near)]
        job = by_point[self._random.choice(best)]
        self._take(job)
        return job

    def _take(self, job: Job) -> None:
        """Make a point a trial that was asked for, whatever the sampler would have proposed."""
        self._study.enqueue_trial(dict(zip(self._axes, self._place(job), strict=True)))
        self._asked[job.name] = self._ask()

    def _ask(self) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of features that Optuna calls experimental
            return self._study.ask(dict(self._axes))

    def _place(self, job: Job) -> tuple[str, ...]:
        return tuple(job.point[key] for key in self._axes)


def _sampler(optuna: Any, config: SearchConfig) -> Any:
    """TPE models the axes jointly, after a third of the trials (at most 10) have been random."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if config.sampler == "tpe":
            start = max(2, min(10, config.num_trials // 3))
            return optuna.samplers.TPESampler(seed=config.seed, multivariate=True, n_startup_trials=start)
        if config.sampler == "nsga2":
            size = max(4, min(50, config.num_trials // 4))
            return optuna.samplers.NSGAIISampler(seed=config.seed, population_size=size)
        return optuna.samplers.RandomSampler(seed=config.seed)
