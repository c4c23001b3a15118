"""The reference's distributions are made once, within a budget, and change no number."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from quantlab.metrics.kl import distributions, token_statistics
from quantlab.protocols import language, reference_logits
from quantlab.protocols.language import text_inputs
from quantlab.protocols.output_head import logits_by_parts
from quantlab.vocabulary.schema import EvaluationConfig
from tests.support.tiny_text_models import TEXT, load_llama, save_llama, with_noise

QUICK = EvaluationConfig(num_samples=6, batch_size=3, context_length=40, num_bootstrap=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    root = tmp_path_factory.mktemp("llama")
    return load_llama(save_llama(root), root)


@pytest.mark.parametrize("excluded", [False, True])
def test_distributions_that_are_known_give_the_same_numbers(excluded):
    torch.manual_seed(0)
    p, q = torch.randn(50, 300), torch.randn(50, 300)
    if excluded:
        p[3, :20] = q[:, 7] = float("-inf")
    p[:, 11] = p[:, 12] = 9.0  # equal ones: the first is the most probable
    targets = torch.randint(20, 300, (50,))
    found = token_statistics(distributions(p), q, targets)
    for name, values in token_statistics(p, q, targets).items():
        np.testing.assert_array_equal(found[name], values)
    assert distributions(p).top1.tolist() == [11] * 50


def counted(model, monkeypatch):
    asked = []

    def of_model(one, way):
        inner = logits_by_parts(one, way)

        def by_parts(ids, hidden, parts):
            asked.append(one is model)
            yield from inner(ids, hidden, parts)

        return by_parts

    monkeypatch.setattr(language, "logits_by_parts", of_model)
    return asked


@pytest.mark.parametrize(("kept", "times"), [(2**30, 1), (0, 2), (3 * 39 * 4 * 259, 1.5)])
def test_the_reference_is_asked_once_as_far_as_memory_is_at_hand(model, monkeypatch, kept, times):
    asked = counted(model, monkeypatch)
    monkeypatch.setattr(reference_logits, "KEPT_BYTES", kept)
    inputs = text_inputs(TEXT, QUICK, model, "dataset=text")
    reference = language.observe(model, inputs, QUICK)
    noisy = with_noise(model, 0.1)
    first, second = (language.measure(noisy, inputs, QUICK, reference, model) for _ in range(2))
    assert asked.count(True) == times * 6
    assert asked.count(False) == 12
    for name, values in first.samples.items():
        np.testing.assert_array_equal(values, second.samples[name])


def test_what_is_kept_goes_with_the_reference(model):
    inputs = text_inputs(TEXT, QUICK, model, "dataset=text")
    reference = language.observe(model, inputs, QUICK)
    language.measure(model, inputs, QUICK, reference, model)
    held = len(reference_logits._kept())
    assert held >= 1
    del reference
    gc.collect()
    assert len(reference_logits._kept()) == held - 1
