"""What a GPU does when it sees a shape first is in a stage of its own; tried on a CPU, told that it is one."""

from __future__ import annotations

import pytest

from quantlab.protocols.table import PROTOCOLS
from quantlab.running import job
from quantlab.stages.evaluate import warm_up
from quantlab.vocabulary.schema import EvaluationConfig
from tests.support.shell import digits_words
from tests.support.tiny_text_models import load_llama, save_llama

WORDS = digits_words("backend=quanto", "dtype=int8", "evaluation.num_samples=10", "sweep.floors=false")


def numbers(row):
    return {k: v for k, v in row["metrics"].items() if k.startswith(("quality/", "quantization/"))}


def test_a_job_on_a_gpu_is_warm_before_it_is_timed_and_measures_the_same(shell, monkeypatch):
    cold = shell.rows(*WORDS)["quanto int8"]
    assert "perf/warm_up_s" not in cold["metrics"]
    protocol, seen = PROTOCOLS["diffusion"], []
    for name in ("observe", "measure"):
        real = getattr(protocol, name)

        def watched(model, inputs, evaluation, *args, name=name, real=real):
            seen.append((name, inputs.num_samples, evaluation.num_inference_steps))
            return real(model, inputs, evaluation, *args)

        monkeypatch.setattr(protocol, name, watched)
    monkeypatch.setattr(job, "kind_of", lambda device: "cuda")
    warm = shell.rows(*WORDS)["quanto int8"]
    assert seen == [("observe", 10, 2), ("measure", 10, 2)]
    assert warm["metrics"]["perf/warm_up_s"] > 0
    assert numbers(warm) == numbers(cold)


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "sizes"), [(10, 4, [4, 2]), (8, 4, [4]), (3, 8, [3]), (5, 1, [1])]
)
def test_each_size_of_batch_is_run_once(num_samples, batch_size, sizes, monkeypatch):
    class Inputs:
        def __init__(self, num_samples):
            self.num_samples = num_samples

        def subset(self, rows):
            return Inputs(len(rows))

    class Model:
        protocol = "language"

    ran = []
    monkeypatch.setattr(
        PROTOCOLS["language"], "observe", lambda model, inputs, evaluation, progress, size: ran.append(size)
    )
    warm_up(Model(), Inputs(num_samples), EvaluationConfig(), batch_size)
    assert ran == sizes


def test_a_model_that_overflows_is_left_to_the_evaluation(tmp_path):
    import torch

    from quantlab.protocols.language import TextInputs

    model = load_llama(save_llama(tmp_path / "llama"), tmp_path / "cache")
    with torch.no_grad():
        next(iter(model.components["model"].parameters())).fill_(float("inf"))
    ids = torch.arange(32).reshape(2, 16)
    inputs = TextInputs(input_ids=ids, sample_ids=("a", "b"), clusters=torch.arange(2).numpy(), sha256="", protocol={})
    warm_up(model, inputs, EvaluationConfig())
