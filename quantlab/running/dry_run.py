"""The dry run: what would run, each job as a command, and what the run would refuse."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantlab.errors import ConfigError, QuantlabError
from quantlab.planning.job import Job, Plan
from quantlab.planning.places import groups, recipes
from quantlab.planning.trust import is_trusted, question, require_trust
from quantlab.progress import counted, printable, progress_bars, under_way
from quantlab.report.terminal import tell, terminal
from quantlab.running.engines.table import check_cluster
from quantlab.running.foreseen import Foreseen, foreseen
from quantlab.running.outlined import refused_by_shape
from quantlab.running.refusals import check_request, check_surroundings, refused_here, runs_elsewhere

_OF_A_SEARCH = "sweep.search"
_NO_TEXT = ("null", "true", "false", "nan", "inf")
"""What Hydra's grammar reads as something else than text."""
_OF_THE_SWEEP = ("sweep.dry_run", "sweep.candidates", "sweep.grid")


def show_jobs(
    request: Plan, trust: bool = False, asks: bool = False, *, is_last: bool = False, as_json: bool = False
) -> int:
    """Print what a sweep would run, each job with the command that gives it alone, and what it would not run.

    The exit code is the run's: 2 where it would refuse impossible combinations, 1 where jobs would fail here. What a
    stranger's recipe decides is told last, so that it can be looked at first: ``asks`` says that the run asks whether
    the user agrees; a run that cannot ask refuses, and so does this, with ConfigError. ``is_last``: nothing else comes
    in this process; LacksPackages where one that imports all could tell more. ``as_json``: for programs.
    """
    code = _shown(request, trust, is_last, as_json)
    if trust or is_trusted(request):
        return code
    if not asks:
        require_trust(request, trust)
    print(f"{question(request)}\nthe run asks whether you agree", file=sys.stderr)
    return code


def _shown(request: Plan, trust: bool, is_last: bool, as_json: bool) -> int:
    unseen: list[str] = []
    with progress_bars():
        under_way("looking at files and the store")
        known = _known(request, trust)
        failing = {name: why for name, why in refused_here(request).items() if name not in known.resumed}
        if trust or is_trusted(request):  # it may name a model of its own
            under_way("reading configurations")
            left = [job for job in request.jobs if job.name not in {*known.resumed, *failing}]
            refused = refused_by_shape(left, runs_elsewhere(request), is_last, unseen.append)
            if refused and not request.is_sweep:
                raise next(iter(refused.values()))
            failing |= {name: str(error) for name, error in refused.items()}
    sweep = request.jobs[0].config.sweep
    trials = sweep.search.num_trials
    searched = f", of which a search runs {min(trials, len(request.jobs))}" if trials else ""
    jobs: list[dict[str, Any]] = [
        {
            "name": job.name,
            "comes_along": request.is_sweep and job.comes_along,
            "resumed": job.name in known.resumed,
            "command": alone(job, request, job.name in known.resumed, trust),
            "fails_here": failing.get(job.name),
        }
        for job in request.jobs
    ]
    told = [*known.lines(len(request.jobs)), *unseen]
    if as_json:
        merged = [{"name": one.name, "spellings": [*one.spellings]} for one in request.merged]
        impossible = [{"combination": combination, "reason": reason} for combination, reason in request.invalid]
        data = {"num_trials": trials or None, "jobs": jobs, "one_scheme": merged, "impossible": impossible}
        print(json.dumps({**data, "told": told}, indent=2))
    else:
        print(f"{counted(len(jobs), 'job')}{searched}:")
        _print(request, jobs, told)
    if not request.invalid or trials or sweep.on_invalid == "skip":
        if not failing or len(request.jobs) - len(failing) >= trials > 0:  # a search may choose the others
            return 0
        print(f"quantlab: {counted(len(failing), 'job')} of {len(request.jobs)} would fail here", file=sys.stderr)
        return QuantlabError.exit_code
    num, every = len(request.invalid), len(request.invalid) + len(request.jobs)
    print(
        f"quantlab: the run refuses {num} of {every} combinations; sweep.on_invalid=skip runs the others",
        file=sys.stderr,
    )
    return ConfigError.exit_code


def _print(request: Plan, jobs: Sequence[Mapping[str, Any]], told: Sequence[str]) -> None:
    for job in jobs:
        mark = " (comes along)" if job["comes_along"] else " (resumed)" if job["resumed"] else ""
        print(printable(f"  {job['name']}{mark}\n      {job['command']}", lines=True))
        if job["fails_here"]:
            tell(terminal(), f"      fails here: {job['fails_here']}")
    for one in request.merged:
        print(printable(f"  one scheme: {' = '.join(one.spellings)} ({one.name})"))
    for reason in dict.fromkeys(reason for _, reason in request.invalid):
        for combination in (combination for combination, own in request.invalid if own == reason):
            print(printable(f"  impossible: {combination}"))
        tell(terminal(), f"      {reason}")
    for line in told:
        tell(terminal(), line)


def _known(request: Plan, trust: bool) -> Foreseen:
    """What is known beforehand; ConfigError for what the run refuses before it works.

    What a stranger's recipe names is not asked before the user has agreed: no store, no cluster.
    """
    is_agreed = trust or is_trusted(request)
    check_request(request)
    refusal: ConfigError | None = None
    try:
        known = foreseen(request) if is_agreed else Foreseen()
    except ConfigError as error:  # a server; told after what the run finds before it
        known, refusal = Foreseen(), error
    is_left = known.num_left > 0 or not known.resumed
    check_surroundings(request, Path.cwd(), is_left)
    if refusal is not None:
        raise refusal
    if is_left and request.is_sweep and is_agreed:
        check_cluster(request.jobs[0].config.launcher)
    return known


def alone(job: Job, request: Plan, is_resumed: bool, trust: bool) -> str:
    """The command that gives one job of a request by itself, as a shell takes it: a single run always runs, and a
    sweep of one takes over what has finished."""
    recipe, sweep = request.recipe, job.config.sweep
    words = [f"recipe={recipe.stem if recipes().get(recipe.stem) == recipe else recipe}"] if recipe else []
    words += ["sweep.candidates=[]"] if recipe and sweep.candidates else []
    words += ["sweep.grid={}"] if recipe and sweep.grid else []
    words += ["sweep.search.num_trials=0"] if recipe and sweep.search.num_trials else []
    keys = {word: word.lstrip("+").partition("=")[0] for word in job.overrides}
    own = [w for w in job.overrides if keys[w] not in _OF_THE_SWEEP and not keys[w].startswith(_OF_A_SEARCH)]
    flags = [*(["-m"] if is_resumed else []), *(["--trust"] if trust and request.asked_for else [])]
    return shlex.join(["quantlab", *flags, *words, *map(_as_typed, own)])


def _as_typed(word: str) -> str:
    """A choice of a group without the quotes that Hydra's grammar wants around numbers: they are put there again. And
    any key's word that is text also without quotes."""
    key, _, value = word.partition("=")
    is_word = re.fullmatch(r"'[A-Za-z_]\w*'", value, re.ASCII) and value[1:-1].lower() not in _NO_TEXT
    is_choice = key in groups() and re.fullmatch(r"'\w+'", value)
    return f"{key}={value[1:-1]}" if is_choice or is_word else word
