"""Which weights a model reads is found by one sample; where that cannot be run, it is said, and never hidden."""

import types

import pytest
import torch
from torch import nn

from quantlab.models.loaded import LoadedModel
from quantlab.stages import reads
from quantlab.vocabulary.schema import EvaluationConfig


def found(monkeypatch, error):
    def calls(*_):
        raise error

    monkeypatch.setattr(reads, "PROTOCOLS", {"module": types.SimpleNamespace(calls=calls)})
    model = LoadedModel(name="mine", protocol="module", components={"model": nn.Sequential(nn.Linear(4, 4))})
    inputs = types.SimpleNamespace(subset=lambda _: None)
    return reads.weights_read(model, inputs, EvaluationConfig(), ["model"])


@pytest.mark.parametrize("error", [ValueError("a batch of one\nis too small"), KeyError("mask")])
def test_a_sample_that_cannot_be_run_is_told(monkeypatch, capsys, error):
    assert found(monkeypatch, error) == {"model": ()}
    told = "".join(capsys.readouterr())
    assert "warning: one sample alone cannot be run, so weights that mine reads may be missed: " in told
    assert "too small" not in told, "the first line of it"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: device-side assert triggered")]
)
def test_what_the_machine_says_is_not_hidden(monkeypatch, error):
    with pytest.raises(type(error)):
        found(monkeypatch, error)
