"""The floors of a reference: other executions of the same weights, whatever its dtype."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace

import pandas as pd
import pytest
import torch

import quantlab
from quantlab.metrics import METRICS
from quantlab.models.loaded import LoadedModel
from quantlab.report.verdicts import largest_floor
from quantlab.running import job as job_module
from quantlab.running import placement, room, workbench
from quantlab.stages import calibrate, observe
from tests.support.shell import digits_words, make_shell

WORDS = ("backend=quanto", "dtype=int8", "evaluation.num_samples=10")
HALF = [*digits_words(*WORDS), "model.dtype=bfloat16"]


@pytest.fixture(scope="module")
def half(tmp_path_factory, template, trained):
    return make_shell(tmp_path_factory.mktemp("half"), template, trained).rows(*HALF)


def test_a_16_bit_reference_has_floors_that_are_no_copies_of_itself(half):
    assert list(half) == ["reference", "floor_batch", "floor_attention", "floor_fp32", "quanto int8"]
    assert half["reference"]["metrics"]["quality/latent_rel_mse"] == 0
    assert half["floor_fp32"]["metrics"]["quality/latent_rel_mse"] > 1e-7
    wide, narrow = (half[name]["metrics"]["memory/weights_bytes"] for name in ("floor_fp32", "reference"))
    assert wide == pytest.approx(2 * narrow, rel=0.01)  # positions are in float32 in both


def test_verdicts_use_the_largest_of_them(half):
    metrics = half["quanto int8"]["metrics"]
    found = largest_floor(metrics, "latent_rel_mse")
    costs = {k: metrics[f"quality/{k}/latent_rel_mse"] for k in ("floor_batch", "floor_attention", "floor_fp32")}
    assert found.name == max(costs, key=costs.get)
    assert found.value == max(costs.values()) > 0


def test_a_copy_that_memory_would_not_hold_is_left_out_with_a_word(shell, monkeypatch):
    told = []
    monkeypatch.setattr(room, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(workbench, "say", lambda text, *_: told.append(text))
    rows = shell.rows(*HALF)
    assert list(rows) == ["reference", "floor_batch", "floor_attention", "quanto int8"]
    assert any(line.startswith("floor_fp32: left out") for line in told)


def test_a_floor_that_fails_costs_its_row_alone(shell, monkeypatch):
    real = job_module.floor_row

    def failing(session, job):
        if job.name == "floor_bf16":
            raise RuntimeError("expected scalar type Float [/but found] BFloat16")
        return real(session, job)

    monkeypatch.setattr(job_module, "floor_row", failing)
    code, out, err = shell(*digits_words(*WORDS), "--json")
    assert code == 1
    assert "[/but found]" in err
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows["floor_bf16"]["status"] == "FAILED"
    assert rows["quanto int8"]["status"] == "FINISHED"
    assert "quality/floor_bf16/latent_rel_mse" not in rows["quanto int8"]["metrics"]


class Casting(torch.nn.Module):
    """Knows float32 only."""

    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(32, 32), torch.nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.body(x).float())


def test_a_module_that_knows_one_dtype_keeps_its_other_rows():
    torch.manual_seed(0)
    rows = quantlab.evaluate(Casting(), [quantlab.QuantoConfig("int8")], [torch.randn(20, 32)])
    assert [(r.name, r.status) for r in rows][:2] == [("reference", "FINISHED"), ("floor_bf16", "FAILED")]
    assert "dtype" in rows[1].error
    assert rows[2].status == "FINISHED"
    assert rows[2].floors == {}


@pytest.mark.slow
def test_a_16_bit_module_is_compared_with_itself_in_float32():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 8)).to(torch.bfloat16)
    rows = quantlab.evaluate(net, [quantlab.QuantoConfig("int8")], [torch.randn(20, 32, dtype=torch.bfloat16)])
    assert rows[1].name == "floor_fp32"
    assert rows[1].quality["output_rel_error"].value > 0
    assert set(rows[2].floors) == {"floor_fp32"}


def test_every_metric_that_runs_are_judged_by_can_have_a_floor():
    for metric in METRICS.values():
        if metric.error_metric:
            assert METRICS[metric.error_metric].protocols == metric.protocols
            assert METRICS[metric.error_metric].of_reference == 0


@pytest.mark.slow
def test_a_processor_without_16_bit_arithmetic_computes_the_same_floor(shell, monkeypatch):
    words = digits_words(*WORDS)
    native = shell.rows(*words)["floor_bf16"]
    assert "compute" not in native["params"]
    monkeypatch.setattr(workbench, "lacking", lambda device: (torch.bfloat16, torch.float16))
    emulated = shell.rows(*words, "dataset.seed=0", "evaluation.num_bootstrap=60")
    assert emulated["floor_bf16"]["params"]["compute"] == "emulated"
    assert "compute" not in emulated["quanto int8"]["params"], "all of it is float32"
    value = emulated["floor_bf16"]["metrics"]["quality/latent_rel_mse"]
    low, high = (native["metrics"][f"quality/latent_rel_mse/{bound}"] for bound in ("ci_lo", "ci_hi"))
    assert low <= value <= high


def test_a_floor_of_other_code_is_measured_again_beside_a_single_run(shell, monkeypatch):
    """It is kept by content, as a sweep's job is known: the code that makes numbers is a part of it."""
    words = digits_words(*WORDS)
    kept = shell.folder / "outputs" / "cache" / "reference"
    shell.rows(*words)
    before = set(kept.glob("*.floor_bf16.*.json"))
    shell.rows(*words)
    assert set(kept.glob("*.floor_bf16.*.json")) == before
    monkeypatch.setattr(job_module, "code_digest", lambda: "another version")
    shell.rows(*words)
    assert len(set(kept.glob("*.floor_bf16.*.json")) - before) == len(before) == 1


def test_a_row_beside_a_single_run_is_whole_when_it_comes_from_what_was_kept(shell):
    """Its seconds and its speed too: they stand in the table, and in columns that are asked for."""
    words = digits_words(*WORDS, "evaluation.speed=true")
    first, again = shell.rows(*words), shell.rows(*words)
    for name in ("reference", "floor_bf16", "floor_batch"):
        assert again[name]["metrics"] == first[name]["metrics"]
        assert again[name]["metrics"]["perf/evaluate_s"] > 0
        assert again[name]["metrics"]["quality/step_divergence/1"] >= 0
    assert again["reference"]["metrics"]["perf/step_ms"] > 0


def test_a_notebooks_cell_that_is_run_again_has_the_floors_samples_and_steps(shell):
    """Wherever the notebook stands when they are asked for."""
    words = digits_words(*WORDS)
    with contextlib.chdir(shell.folder):
        first, again = (quantlab.run(overrides=words, quiet=True) for _ in range(2))
    assert {name for name, _ in again.samples.index} >= {"reference", "floor_bf16", "floor_batch", "quanto int8"}
    pd.testing.assert_frame_equal(again.samples, first.samples)
    pd.testing.assert_frame_equal(again.steps, first.steps)


def test_a_reference_that_was_kept_without_its_speed_is_measured_when_that_is_asked_for(shell):
    words = digits_words(*WORDS)
    assert "perf/step_ms" not in shell.rows(*words)["reference"]["metrics"]
    assert shell.rows(*words, "evaluation.speed=true")["reference"]["metrics"]["perf/step_ms"] > 0


@pytest.mark.slow
def test_what_is_kept_of_a_model_is_of_the_code_that_made_it(shell, monkeypatch):
    """The reference's outputs, and the calls that calibration replays: after a repair of either the old ones are none."""
    words = digits_words("backend=gguf", "dtype=q4_k", "algorithm=imatrix", "calibration.num_samples=10")
    cache = shell.folder / "outputs" / "cache"

    def kept():
        return {*cache.glob("reference/*.safetensors"), *cache.glob("calibration/*/set.json")}

    shell.rows(*words, "evaluation.num_samples=10")
    before = kept()
    shell.rows(*words, "evaluation.num_samples=10")
    assert len(before) == 2
    assert kept() == before
    for module in (observe, calibrate):
        monkeypatch.setattr(module, "code_digest", lambda: "another version")
    shell.rows(*words, "evaluation.num_samples=10")
    assert len(kept() - before) == 2


def test_encoded_prompts_are_of_the_code_that_made_them(monkeypatch, tmp_path):
    model = LoadedModel(name="any", protocol="diffusion", components={}, weights_sha256="sha256:1")
    key = placement._prompts(model, "cpu", tmp_path).key
    assert placement._prompts(model, "cpu", tmp_path).key == key
    assert placement._prompts(replace(model, weights_sha256="sha256:2"), "cpu", tmp_path).key != key
    monkeypatch.setattr(placement, "code_digest", lambda: "another version")
    assert placement._prompts(model, "cpu", tmp_path).key != key
