"""One error on the device leaves a process without its GPU: its job's own error is told, and the next job has a new one."""

from __future__ import annotations

import json
import os

import pytest
import torch

from quantlab.running import worker
from quantlab.tracking.tags import AFTER_LOST_DEVICE
from tests.support.engines import hand_overs
from tests.support.shell import digits_words
from tests.support.tables import BACKENDS

WORDS = ("-m", *digits_words("evaluation.num_samples=10", "backend=quanto", "--json"))
BOTH = "dtype=int8,int4"
ASSERT = "CUDA error: device-side assert triggered"


@pytest.fixture
def asserting(monkeypatch):
    """quanto's int8 asserts in a kernel, in this process."""
    quanto = BACKENDS["quanto"]
    real = quanto.quantize

    def quantize(model, layers, config, compute_dtype=None, *more):
        if config.weights_dtype == "int8":
            raise torch.AcceleratorError(ASSERT)
        return real(model, layers, config, compute_dtype, *more)

    monkeypatch.setattr(quanto, "quantize", quantize)


@pytest.fixture
def handed(monkeypatch):
    """What would be run in processes of their own, as it was handed over; nothing is run."""
    return hand_overs(monkeypatch)


def table(shell, *words):
    code, out, err = shell(*WORDS, *words)
    return code, {row["name"]: row for row in json.loads(out)}, err


@pytest.mark.parametrize("isolation", ["auto", pytest.param("none", marks=pytest.mark.slow)])
def test_the_jobs_after_it_run_in_processes_of_their_own(shell, asserting, handed, isolation):
    code, rows, err = table(shell, BOTH, "sweep.floors=false", f"sweep.isolation={isolation}")
    assert code == 1
    assert rows["quanto int8"]["error"].startswith(f"AcceleratorError: {ASSERT}")
    assert "the jobs after it ran in processes of their own" in rows["quanto int8"]["error"]
    assert rows["quanto int8"]["failed_stage"] == "quantize"
    (job,) = handed
    assert (job["name"], job["after_lost_device"]) == ("quanto int4", "quanto int8")
    assert job["key"]
    assert rows["quanto int4"]["params"]["process"] == "its own, as quanto int8 had lost the sweep's GPU"
    assert f"failed: quanto int8 at quantize: AcceleratorError: {ASSERT}" in err


@pytest.mark.slow
def test_a_model_that_is_not_loaded_yet_is_left_to_the_next_process(shell, asserting, handed):
    """This one cannot load it, so it knows neither the job's key nor the floors."""
    table(shell, BOTH, "evaluation.guidance_scale=1,2")
    assert [(bool(job["key"]), job["floors"] is not None) for job in handed] in (
        [(True, True), (False, False), (False, False)],
        [(False, False), (True, True), (False, False)],
    ), "whichever of the two is swept first"


@pytest.mark.slow
def test_a_search_goes_on(shell, asserting, handed):
    code, rows, _ = table(shell, BOTH, "sweep.floors=false", "sweep.search.num_trials=2")
    assert code == 1
    assert rows["quanto int8"]["error"].startswith(f"AcceleratorError: {ASSERT}")
    assert [job["name"] for job in handed] == ["quanto int4"]


def test_a_gpu_that_answers_no_more_is_lost_whatever_the_error_says(shell, handed, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("cuBLAS error: CUBLAS_STATUS_EXECUTION_FAILED")

    monkeypatch.setattr(BACKENDS["quanto"], "quantize", broken)
    monkeypatch.setattr("quantlab.running.job.answers", lambda device: False)
    table(shell, BOTH, "sweep.floors=false")
    assert [job["name"] for job in handed] == ["quanto int4"]


def test_an_ordinary_failure_costs_no_process(shell, handed, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(BACKENDS["quanto"], "quantize", broken)
    _, rows, _ = table(shell, BOTH, "sweep.floors=false")
    assert handed == []
    assert {row["error"] for row in rows.values()} == {"RuntimeError: out of luck"}


def test_a_worker_of_several_jobs_is_left_after_it(monkeypatch, tmp_path):
    """The next job of the queue is left to a worker that has a GPU."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / f"{name}.job").write_text(json.dumps({"folder": str(tmp_path / name)}))
    monkeypatch.setattr(worker, "_LOST", [])
    monkeypatch.setattr(worker, "end_with_parent", lambda: None)
    monkeypatch.setattr(worker, "work", lambda folder: worker._LOST.append(folder.name) or 1)
    assert worker.main(["queue", str(tmp_path)]) == 0
    assert worker._LOST == ["a"]
    assert (tmp_path / "b.job").exists()


@pytest.mark.slow
def test_the_next_process_finds_out_what_this_one_could_not(shell, asserting):
    code, rows, err = table(shell, BOTH, "evaluation.guidance_scale=1,2")
    assert code == 1, err
    done = {n: r for n, r in rows.items() if r["status"] == "FINISHED" and "int4" in n}
    assert len(done) == 2
    runs = shell.tracked()
    for name, row in done.items():
        assert runs[name]["tags"][AFTER_LOST_DEVICE].startswith("quanto int8")
        assert runs[name]["tags"]["quantlab.pid"] != str(os.getpid())
        assert row["metrics"]["quality/floor_batch/latent_rel_mse"] >= 0
    again = table(shell, "dtype=int4", "evaluation.guidance_scale=1,2", "sweep.floors=true")[1]
    assert [row["resumed"] for row in again.values() if row["params"]["quantization"]["dtype"] == "int4"] == [True] * 2
