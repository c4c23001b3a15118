"""A dry run says which jobs are done, and how long the others may take, by what earlier jobs of the same took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantlab.planning.plan import plan
from quantlab.running import foreseen as module
from quantlab.running.foreseen import foreseen
from quantlab.running.known import Known
from quantlab.running.resume import content_key
from quantlab.tracking import open_store
from quantlab.tracking.tags import JOB_KEY, KIND

WORDS = ["tracking=none", "backend=quanto", "dtype=int8,int4,int2", "device=cpu", "evaluation.num_samples=10"]
KNOWN = Known(
    protocol="diffusion", dtype="float32", reference_key="r", judge_sha256="", default=("transformer",), made={},
    classes={"transformer": "DiT"}, has_float32=True, is_brought=False, tags={},
)  # fmt: skip


@pytest.fixture
def request_of_three(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "recall", lambda config, cache_dir: KNOWN)
    return plan(WORDS, multirun=True)


def track(tmp_path, job, seconds, parent="local-sweep"):
    """A finished job in the folder of runs; what else took time is no stage of it."""
    store = open_store(job.config.tracking, tmp_path)
    tags = {KIND: "job", JOB_KEY: content_key(KNOWN, job, tmp_path / "outputs" / "cache")}
    folder = tmp_path / "outputs" / "runs" / f"{job.name}-{seconds}"
    with store.start_run(job.name, folder, job.resolved, tags, parent) as run:
        run.log_metrics({"perf/quantize_s": 1.0, "perf/evaluate_s": seconds - 1.0, "perf/decode_s": 1000.0})
        run.log_metrics({"quantization/coverage": 1.0})


def test_nothing_is_known_before_the_first_run(request_of_three):
    found = foreseen(request_of_three)
    assert (found.resumed, found.seconds, found.lines(3)) == (frozenset(), None, [])


def test_what_is_done_and_what_the_rest_takes(request_of_three, tmp_path):
    first, second, _ = request_of_three.jobs
    track(tmp_path, first, 10.0)
    track(tmp_path, second, 20.0, parent=None)  # a single run is no part of a sweep, and tells how long it took
    found = foreseen(request_of_three)
    assert found.resumed == {first.name}
    assert (found.seconds, found.rests_on) == (30.0, 2)
    told = "\n".join(found.lines(3))
    assert "1 of 3 jobs are resumed" in told
    assert "about 30 s for 2 jobs: 15.0 s is the median of 2 earlier jobs" in told


def test_other_models_and_evaluations_say_nothing_of_it(request_of_three, tmp_path):
    first = request_of_three.jobs[0]
    other = replace(first, config=replace(first.config, evaluation=replace(first.config.evaluation, num_samples=100)))
    track(tmp_path, other, 10.0)
    assert foreseen(request_of_three).seconds is None


def test_force_resumes_nothing(request_of_three, tmp_path):
    track(tmp_path, request_of_three.jobs[0], 10.0)
    found = foreseen(plan([*WORDS, "sweep.force=true"], multirun=True))
    assert found.resumed == frozenset()
    assert found.rests_on == 1
