"""A search over a grid: valid points only, none twice, learned from, resumed from the tracked runs."""

from __future__ import annotations

import importlib.util
import json
from functools import cache

import pytest

from quantlab.errors import ConfigError, MissingPackage
from quantlab.planning.plan import plan
from quantlab.planning.space import check_space, objectives_of
from quantlab.protocols.table import PROTOCOLS
from quantlab.running.search import Search, run_search
from quantlab.tracking import find_runs
from quantlab.vocabulary.reports import MetricValue, RunReport
from quantlab.vocabulary.schema import SAMPLERS, SearchConfig
from tests.support.shell import digits_words
from tests.support.stores import artifact
from tests.support.tables import BACKENDS

OBJECTIVES = {"memory/weights_bytes": "minimize", "quality/latent_rel_mse": "minimize"}
GRID = (
    "backend=bitsandbytes,torchao,quanto,gguf",
    "dtype=int8,int4,int2,nf4,q8_0,q6_k,q5_k,q4_k,q3_k,q2_k",
    "group_size=auto,32,64",
)
BITS = {
    "int8": 8,
    "int4": 4,
    "int2": 2,
    "nf4": 4,
    "q8_0": 8.5,
    "q6_k": 6.5,
    "q5_k": 5.5,
    "q4_k": 4.5,
    "q3_k": 3.4,
    "q2_k": 2.6,
}
SMALL = ("-m", *digits_words("evaluation.num_samples=10", "backend=quanto,gguf", "dtype=int8,int4,q8_0,q4_k"))


@cache
def space():
    return plan([*GRID, "sweep.search.num_trials=1"], multirun=True).jobs


def made_up(job):
    """Bytes and error of a scheme: more bits are better and larger; one backend is a little better than the others."""
    bits = BITS[job.point["dtype"]] + {"auto": 0, "32": 0.5, "64": 0.25}[job.point["group_size"]]
    error = 4.0**-bits * (0.5 if job.point["backend"] == "gguf" else 1.0)
    return report(job.name, weights_bytes=bits * 1e6, error=error)


def report(name, weights_bytes, error, status="FINISHED"):
    return RunReport(
        name=name,
        status=status,
        protocol="diffusion",
        quality={"latent_rel_mse": MetricValue(value=error, n=10)},
        stored_metrics={"memory/weights_bytes": weights_bytes, "quality/latent_rel_mse": error}
        if status == "FINISHED"
        else {},
    )


def searched(num_trials, sampler="tpe", seed=0, known=None, measure=None, batch_size=1, objectives=None):
    batches = []

    def measure_made_up(jobs):
        batches.append([job.name for job in jobs])
        return [(measure or made_up)(job) for job in jobs]

    search = Search(SearchConfig(num_trials=num_trials, sampler=sampler, seed=seed), objectives or OBJECTIVES, space())
    run_search(search, known or {}, measure_made_up, batch_size, lambda *_: None)
    return search, batches


# -- asking


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_valid_points_only_and_none_twice(sampler):
    assert 20 <= len(space()) <= 60, "of 120 combinations"
    search, batches = searched(15, sampler)
    names = [name for batch in batches for name in batch]
    assert len(names) == len(set(names)) == 15
    assert set(names) <= {job.name for job in space()}
    assert len(search.trials) == 15
    assert search.num_thrown_away > 0


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_but_one_point_of_a_space(sampler):
    _, batches = searched(len(space()) - 1, sampler)
    assert len({name for batch in batches for name in batch}) == len(space()) - 1


def test_a_seed_gives_the_same_points():
    assert searched(12)[1] == searched(12)[1]
    assert searched(12)[1] != searched(12, seed=1)[1]


@pytest.mark.slow
def test_a_sampler_learns():
    """On one objective the best points are found with fewer trials than by chance (mean of 8 seeds)."""
    objective = {"quality/latent_rel_mse": "minimize"}
    best = sorted(made_up(job).quality["latent_rel_mse"].value for job in space())[:4]

    def found(sampler):
        trials = [searched(16, sampler, seed, objectives=objective)[0].trials for seed in range(8)]
        return sum(t.values[0] in best for some in trials for t in some)

    assert found("tpe") > 1.3 * found("random")


def test_a_grid_no_larger_than_the_trials_is_run_in_its_order():
    search, batches = searched(1000)
    assert [name for batch in batches for name in batch] == [job.name for job in space()]
    assert search.num_thrown_away == 0


def test_batches_hold_different_points():
    _, batches = searched(10, batch_size=4)
    assert [len(b) for b in batches] == [4, 4, 2]
    assert len({name for batch in batches for name in batch}) == 10


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_is_known_is_told_and_counts(sampler):
    known = {job.name: made_up(job) for job in space()[:9]}
    search, batches = searched(12, sampler, known=known)
    assert len(batches) == 3
    assert not known.keys() & {name for batch in batches for name in batch}
    assert [t["state"] for t in search.data()["trials"]] == ["told"] * 9 + ["measured"] * 3
    assert len(searched(5, sampler, known=known)[1]) == 0, "what was asked for is there already"


def test_failed_points_are_told_as_failed_and_not_run_again():
    def measure(job):
        return report(job.name, 0, 0, "FAILED") if job.point["backend"] == "gguf" else made_up(job)

    search, batches = searched(len(space()) - 2, measure=measure)
    names = [name for batch in batches for name in batch]
    assert len(names) == len(set(names)) == len(space()) - 2
    data = search.data()
    failed = {t["name"] for t in data["trials"] if t["state"] == "failed"}
    assert failed
    assert all(name.startswith("gguf") for name in failed)
    assert not failed & set(data["front"])


def test_only_failures_end_too():
    _, batches = searched(6, measure=lambda job: report(job.name, 0, 0, "FAILED"))
    assert len({name for batch in batches for name in batch}) == 6


def test_two_spellings_of_a_scheme_are_one_point():
    words = ["backend=gguf", "dtype=q4_k", "group_size=auto,32"]
    assert [j.name for j in plan(words, multirun=True).jobs] == ["gguf q4_k"]
    assert [j.name for j in plan([*words, "sweep.search.num_trials=1"], multirun=True).jobs] == ["gguf q4_k"]
    words = ["backend=torchao", "dtype=int4", "group_size=32,64", "sweep.search.num_trials=1"]
    assert len(plan(words, multirun=True).jobs) == 2


# -- the front


def test_the_front_of_a_search_is_that_of_its_trials():
    search, _ = searched(20)
    data = search.data()
    costs = {t.job.name: t.values for t in search.trials}
    for name in costs:
        beaten = any(
            all(a <= b for a, b in zip(o, costs[name], strict=True)) and o != costs[name] for o in costs.values()
        )
        assert (name in data["front"]) == (not beaten)


def test_default_objectives_follow_the_protocol():
    assert objectives_of(SearchConfig(), "diffusion") == OBJECTIVES
    assert objectives_of(SearchConfig(), "language") == {
        "memory/weights_bytes": "minimize",
        "quality/kld_mean": "minimize",
    }
    assert objectives_of(SearchConfig(), "encoder") == {
        "memory/weights_bytes": "minimize",
        "quality/output_cosine": "maximize",
    }


# -- bad requests


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sweep.search.num_trials=-1"], r"^sweep.search.num_trials=-1: a whole number from 0 to"),
        (["sweep.search.num_trials=5"], r"^sweep.search.num_trials=5: a search needs a grid; give keys several values"),
        (["sweep.search.num_trails=5"], r"^sweep.search.num_trails: no such key"),
        (
            ["recipe=digits_backends", "sweep.search.num_trials=5"],
            r"^sweep.search.num_trials=5: a search is over axes and not over a list; write sweep.grid",
        ),
        (
            ["sweep.search.sampler=tpee"],
            r"^sweep.search.sampler=tpee: there are tpe, nsga2, random; did you mean tpe\?",
        ),
        (
            ["sweep.search.objectives={quality/latent_rel_msee:minimize}"],
            r"^sweep.search.objectives: quality/latent_rel_msee: no such metric; did you mean quality/latent_rel_mse\?",
        ),
        (
            ["sweep.search.objectives={memory/weights_bytes:down}"],
            r"^sweep.search.objectives: memory/weights_bytes: down: there are minimize, maximize",
        ),
        (
            ["sweep.search.objectives={quality/psnr_db:minimize}"],
            r"psnr_db: minimize looks for the worst; write maximize",
        ),
        (
            ["dtype=int8,int4", "evaluation.num_samples=10,20", "sweep.search.num_trials=2"],
            r"^evaluation.num_samples: is an axis of the search, and its values have unlike references",
        ),
        (
            ["dtype=int8,int4", "launcher=pool", "sweep.search.num_trials=2"],
            r"^launcher.num_workers=0: a search on pool asks for so many jobs at once; set launcher.num_workers=4",
        ),
        (["backend=quanto", "dtype=nf4,q8_0", "sweep.search.num_trials=2"], r"^2 of 2 combinations are impossible"),
    ],
)
def test_bad_requests(words, message):
    with pytest.raises(ConfigError, match=message):
        plan(words, multirun=True)


def test_without_optuna(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "optuna" else real(name, *a))
    with pytest.raises(
        MissingPackage,
        match=r"sweep.search.num_trials=2: the package optuna is not installed; "
        r"pip install 'quantlab-recipes\[search\]'",
    ):
        plan(["backend=quanto", "dtype=int8,int4", "sweep.search.num_trials=2"], multirun=True)


def test_components_may_be_an_axis_and_engines_may_ask_in_batches():
    words = ["backend=quanto", "dtype=int8,int4", "sweep.search.num_trials=1"]
    check_space(plan([*words, "model.components=[transformer],[]"], multirun=True).jobs)
    assert (
        plan([*words, "launcher=pool", "launcher.num_workers=2"], multirun=True).jobs[0].config.launcher.num_workers
        == 2
    )


def test_a_metric_of_another_protocol_is_refused_before_a_job_runs(shell):
    code, _, err = shell(*SMALL, "sweep.search.num_trials=2", "sweep.search.objectives={quality/ppl:minimize}", "-q")
    assert code == 2
    assert "sweep.search.objectives: quality/ppl: is not measured on a diffusion model; there are quality/latent" in err
    assert set(shell.tracked("FAILED")) == {"sweep"}
    assert shell.tracked() == {}


# -- on a model


def rows_json(shell):
    (parent, *_) = find_runs(shell.store, tags={"quantlab.kind": "sweep"}, status=None)
    return parent, json.loads(artifact(shell.store, parent["run_id"], "rows.json"))


@pytest.fixture
def measured(monkeypatch):
    """How many jobs were really evaluated."""
    protocol, calls = PROTOCOLS["diffusion"], []
    real = protocol.measure
    monkeypatch.setattr(protocol, "measure", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_a_search_is_tracked_shown_and_resumed(shell, measured, monkeypatch):
    words = (*SMALL, "sweep.search.num_trials=3")
    with monkeypatch.context() as patch:
        real = BACKENDS["gguf"].quantize

        def breaks_q8_0(request, *rest, **more):
            if "q8_0" in str((request, *rest)).lower():
                raise RuntimeError("out of luck")
            return real(request, *rest, **more)

        patch.setattr(BACKENDS["gguf"], "quantize", breaks_q8_0)
        code, out, err = shell(*words)
    parent, data = rows_json(shell)
    study = data["search"]
    assert study["num_points"] == 4
    assert study["objectives"] == OBJECTIVES
    assert [t["number"] for t in study["trials"]] == [0, 1, 2]
    states = {t["name"]: t["state"] for t in study["trials"]}
    assert set(states) <= {"quanto int8", "quanto int4", "gguf q8_0", "gguf q4_k"}
    assert all((state == "failed") == (name == "gguf q8_0") for name, state in states.items())
    assert code == int("gguf q8_0" in states), err
    assert parent["tags"]["quantlab.search.front"] == ", ".join(study["front"])
    assert {t["run_id"] for t in study["trials"]} <= {
        r["run_id"] for r in find_runs(shell.store, {"mlflow.parentRunId": parent["run_id"]}, status=None)
    }
    assert "3 of 4 possible jobs were measured; Pareto front (minimize memory/weights_bytes, minimize quality/" in out
    shown = out.split("Pareto front")[1]
    assert all(name in shown for name in study["front"])
    assert "of 8 combinations are impossible" in err
    assert len(data["rows"]) == 6, "impossible ones are no rows of a search"
    assert len(data["skipped"]) == 4

    before = len(measured)
    finished = sum(state == "measured" for state in states.values())
    rows = shell.rows(*words)
    assert len(measured) - before == 3 - finished, "a second start adds no trials, it retries what failed"
    assert sum(r["resumed"] for n, r in rows.items() if n in states) == finished
    states = [t["state"] for t in rows_json(shell)[1]["search"]["trials"]]
    assert states == ["told"] * finished + ["measured"] * (3 - finished)

    code, out, err = shell(*words, "sweep.search.num_trials=9")
    assert code == 0
    assert "sweep.search.num_trials=9: the grid has 4 possible jobs, so all of them are run" in err
    assert [t["state"] for t in rows_json(shell)[1]["search"]["trials"]] == ["told"] * 3 + ["measured"]
    assert "4 of 4 possible jobs were measured" in out


@pytest.mark.slow
@pytest.mark.parametrize("more", [("sweep.isolation=process",), ("launcher=pool", "launcher.num_workers=2")])
def test_points_in_processes_of_their_own(shell, more):
    rows = shell.rows(*SMALL, "sweep.search.num_trials=3", "sweep.floors=false", *more)
    assert len(rows) == 3
    assert {r["status"] for r in rows.values()} == {"FINISHED"}
    study = rows_json(shell)[1]["search"]
    assert [t["state"] for t in study["trials"]] == ["measured"] * 3
    assert all(len(t["values"]) == 2 for t in study["trials"])


def test_a_dry_run_says_how_many_points_a_search_runs(shell):
    code, out, _ = shell(*SMALL, "sweep.search.num_trials=3", "sweep.dry_run=true")
    assert code == 0
    assert "4 jobs, of which a search runs 3:" in out
