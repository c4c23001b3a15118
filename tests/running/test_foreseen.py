"""A dry run says which jobs are done, and how long the others may take, by what earlier jobs of the same took."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantlab.metrics.statistics import MIN_CLUSTERS
from quantlab.planning.plan import plan
from quantlab.running import known
from quantlab.running.first_look import first_look
from quantlab.running.foreseen import foreseen
from quantlab.running.known import Known
from quantlab.running.resume import content_key
from quantlab.tracking import open_store
from quantlab.tracking.tags import JOB_KEY, KIND

WORDS = ["tracking=none", "backend=quanto", "dtype=int8,int4,int2", "device=cpu", "evaluation.num_samples=10"]
KNOWN = Known(
    protocol="diffusion", dtype="float32", reference_key="r", judge_sha256="", default=("transformer",), made={},
    classes={"transformer": "DiT"}, left_out=(), is_brought=False, tags={},
)  # fmt: skip


@pytest.fixture
def request_of_three(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(known, "recall", lambda config, cache_dir: KNOWN)
    return plan(WORDS, multirun=True)


def track(tmp_path, job, seconds, parent="local-sweep", **more):
    """A finished job in the folder of runs; what else took time is no stage of it."""
    store = open_store(job.config.tracking, tmp_path)
    tags = {KIND: "job", JOB_KEY: content_key(KNOWN, job, tmp_path / "outputs" / "cache")}
    folder = tmp_path / "outputs" / "runs" / f"{job.name}-{seconds}"
    with store.start_run(job.name, folder, job.resolved, tags, parent) as run:
        run.log_metrics({"perf/quantize_s": 1.0, "perf/evaluate_s": seconds - 1.0, "perf/decode_s": 1000.0})
        run.log_metrics({"quantization/coverage": 1.0, **{f"perf/{stage}_s": took for stage, took in more.items()}})


def test_nothing_is_known_before_the_first_run(request_of_three):
    found = foreseen(request_of_three)
    assert (found.resumed, found.estimate) == (frozenset(), None)


@pytest.mark.parametrize("has_a_store", [False, True])
def test_where_no_earlier_job_tells_it_is_said_how_much_runs_and_how_to_run_less(tmp_path, monkeypatch, has_a_store):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(known, "recall", lambda config, cache_dir: None)
    if has_a_store:
        track(tmp_path, plan([*WORDS[:2], "dtype=int8", "device=cpu", "evaluation.num_samples=20"]).jobs[0], 5.0)
    less = "evaluation.num_samples=100 evaluation.num_inference_steps=5"
    first = foreseen(plan([*WORDS[:-1]], multirun=True))
    assert first.lines(3) == [
        "how long: no earlier job of this model and evaluation tells; each job, the reference and each floor run 200 "
        f"samples of 20 steps; {less}: a first look, with wide intervals"
    ]
    quick = foreseen(plan([*WORDS, "evaluation=quick"], multirun=True))
    assert quick.lines(3)[0].endswith("each floor run 10 samples of 5 steps"), "it is quick already"
    text = foreseen(plan(["tracking=none", "model=smollm2_135m", "backend=quanto", "dtype=int8"]))
    assert "each floor run 24 samples; evaluation.num_samples=8: a first look" in text.lines(1)[0]


def test_a_first_look_keeps_a_floor_of_another_batch():
    """And its number of samples is one that the data set has: ten classes have equal shares."""
    for words in (
        ["evaluation=quick"],
        [],
        ["model=smollm2_135m"],
        ["evaluation.batch_size=12", "evaluation.floor_batch_size=5"],
    ):
        config = plan(["backend=quanto", "dtype=int8", *words]).jobs[0].config
        few = plan(["backend=quanto", "dtype=int8", *words, *first_look(config)]).jobs[0].config.evaluation
        assert min(few.batch_size, few.num_samples) != min(few.floor_batch_size, few.num_samples)
        assert few.num_samples >= MIN_CLUSTERS, "of fewer there are no intervals"


def test_what_is_done_and_what_the_rest_takes(request_of_three, tmp_path):
    first, second, _ = request_of_three.jobs
    track(tmp_path, first, 10.0)
    track(tmp_path, second, 20.0, parent=None)  # a single run is no part of a sweep, and tells how long it took
    found = foreseen(request_of_three)
    assert found.resumed == {first.name}
    assert (found.estimate.seconds, found.estimate.rests_on) == (30.0, 2)
    told = "\n".join(found.lines(3))
    assert "1 of 3 jobs is resumed: an earlier sweep has finished it" in told
    assert "about 30 s for 2 jobs: by the median of the same backend and algorithm, of 2 earlier jobs" in told


def test_compilation_and_measured_speed_take_their_time(request_of_three, tmp_path):
    track(tmp_path, request_of_three.jobs[0], 10.0, compile=300.0, warm_up=2.0, speed=28.0)
    assert foreseen(request_of_three).estimate.seconds == 2 * 340.0, "one is resumed"


def test_what_takes_no_second_is_not_told_as_none(request_of_three, tmp_path):
    track(tmp_path, request_of_three.jobs[0], 0.1)
    (line,) = [line for line in foreseen(request_of_three).lines(3) if " for 2 jobs" in line]
    assert line.startswith("less than a second for 2 jobs: ")


def test_one_scheme_in_two_words_is_no_job_that_is_left(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = replace(KNOWN, widths={"transformer": {"linear": [128, 256]}})
    monkeypatch.setattr(known, "recall", lambda config, cache_dir: there)
    words = ["tracking=none", "backend=modelopt", "dtype=int4", "group_size=auto,128,64", "device=cpu"]
    found = foreseen(plan([*words, "quantization.on_mismatch=skip"], multirun=True))
    assert found.num_left == 2
    assert found.lines(3)[:-1] == [
        "run once, as these are one scheme on this model: modelopt int4 = modelopt int4 g128"
    ]


def test_what_a_search_was_told_is_not_run_again(request_of_three, tmp_path):
    first, second, _ = request_of_three.jobs
    for job in (first, second):
        track(tmp_path, job, 10.0)
    for num_trials, num_left in ((1, 0), (2, 0), (3, 1)):
        search = plan([*WORDS, f"sweep.search.num_trials={num_trials}"], multirun=True)
        assert foreseen(search).num_left == num_left
        assert (foreseen(search).estimate is None) == (num_left == 0)


def test_jobs_of_other_seeds_take_as_long(request_of_three, tmp_path):
    track(tmp_path, request_of_three.jobs[0], 10.0)
    others = plan([*WORDS, "dataset.seed=5", "evaluation.bootstrap_seed=6"], multirun=True)
    assert foreseen(others).estimate.seconds == 30.0


def test_other_models_and_evaluations_say_nothing_of_it(request_of_three, tmp_path):
    first = request_of_three.jobs[0]
    other = replace(first, config=replace(first.config, evaluation=replace(first.config.evaluation, num_samples=100)))
    track(tmp_path, other, 10.0)
    assert foreseen(request_of_three).estimate is None


def test_force_resumes_nothing(request_of_three, tmp_path):
    track(tmp_path, request_of_three.jobs[0], 10.0)
    found = foreseen(plan([*WORDS, "sweep.force=true"], multirun=True))
    assert found.resumed == frozenset()
    assert found.estimate.rests_on == 1


MIXED = [w for w in WORDS if not w.startswith(("backend", "dtype"))]


def of(*words):
    return plan([*MIXED, *words], multirun=True)


def test_a_calibrated_job_takes_the_time_of_calibrated_ones(request_of_three, tmp_path):
    """Also where the algorithm was typed by one and left open by the other."""
    [plain] = of("backend=quanto", "dtype=int8").jobs
    [calibrated] = of("backend=modelopt", "dtype=int4", "algorithm=awq_lite").jobs
    for seconds in (2.0, 4.0, 3.0):
        track(tmp_path, plain, seconds)
    track(tmp_path, calibrated, 40.0)
    asked = of("backend=quanto", "dtype=int4,int2", "algorithm=max")
    assert foreseen(asked).estimate.seconds == 6.0, "the median of three, twice"
    assert (
        foreseen(of("backend=modelopt", "dtype=int4", "algorithm=awq_lite", "group_size=64")).estimate.seconds == 40.0
    )


def test_what_nobody_ran_takes_the_mean_of_all_and_that_is_said(request_of_three, tmp_path):
    [plain], [other] = of("backend=quanto", "dtype=int8").jobs, of("backend=torchao", "dtype=int8").jobs
    track(tmp_path, plain, 10.0)
    track(tmp_path, other, 20.0)
    found = foreseen(of("backend=gguf,torchao", "dtype=q8_0,int4", "sweep.on_invalid=skip"))
    assert (found.estimate.seconds, found.estimate.num_alike) == (15.0 + 20.0, 1)
    assert "(1 job by the mean of all)" in " ".join(found.lines(2))
    alone = foreseen(of("backend=gguf", "dtype=q8_0"))
    assert "about 15 s for 1 job: by their mean, of 2 earlier jobs" in " ".join(alone.lines(1))


def test_each_component_counts_and_another_evaluation_is_left_out(request_of_three, tmp_path):
    both = "components.transformer={backend: modelopt, dtype: int4, algorithm: awq_lite}"
    [first] = of(both).jobs
    track(tmp_path, first, 50.0)
    [second] = of("backend=quanto", "dtype=int8").jobs
    track(tmp_path, second, 5.0)
    found = foreseen(of(both, "evaluation.num_samples=10,20", "sweep.force=true"))
    assert (found.estimate.num_jobs, found.num_left) == (1, 2)
    assert found.estimate.seconds == 50.0
    assert "about 50 s for 1 of 2 jobs" in " ".join(found.lines(2))
