"""What is told after the calibration's calls, while an algorithm works on what they showed: layer by layer."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
import time

import pytest
from rich.console import Console

from quantlab import progress
from quantlab.backends import torchao
from quantlab.modules.feed import feed_of_batches
from tests.support import modelopt_net, torchao_net
from tests.support.shell import Shell, digits_words


@pytest.fixture
def told(monkeypatch):
    """All that is said to be under way."""
    found: list[str] = []
    monkeypatch.setattr(progress, "under_way", found.append)
    for name in ("quantlab.backends.modelopt.calibrate", "quantlab.backends.torchao.calibrate"):
        monkeypatch.setattr(importlib.import_module(name), "under_way", found.append)
    return found


@pytest.mark.parametrize("algorithm", ["awq_lite", "svdquant", "gptq", "local_hessian"])
def test_modelopt_tells_each_layer(told, algorithm):
    modelopt_net.calibrated(modelopt_net.config_of("int4", algorithm))
    assert {f"calibrate: {algorithm}, layer {i} of 2 ({name})" for i, name in ((1, "0"), (2, "2"))} <= {*told}


def test_torchao_tells_each_layer(told):
    config = torchao_net.config_of("int8", algorithm="awq")
    batches = feed_of_batches(torchao_net.batches())
    torchao.calibrate(torchao_net.net(), ["first"], config, None, batches)
    assert told == ["calibrate: awq, layer 1 of 1 (first)"]


@pytest.mark.slow
def test_the_algorithm_is_named_once_all_calls_are_done(shell: Shell, monkeypatch):
    found: list[str] = []
    monkeypatch.setattr("quantlab.stages.candidate.under_way", found.append)
    words = ["backend=modelopt", "dtype=int4", "algorithm=awq_lite", "calibration.num_samples=10", "sweep.floors=false"]
    code, _, err = shell(*digits_words(*words), "-q")
    assert code == 0, err
    assert "calibrate transformer: awq_lite, after the calls" in found


def test_a_log_hears_of_it_while_a_library_is_made_quiet(monkeypatch):
    """ModelOpt's own bars go to stderr, which is away while it works."""
    monkeypatch.setattr(progress, "BEAT_S", 0.05)
    monkeypatch.setattr(progress, "console", Console(stderr=True, markup=False, emoji=False))
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    with progress.progress_bars(), contextlib.redirect_stderr(io.StringIO()):
        progress.under_way("svdquant, layer 3 of 9")
        time.sleep(0.4)
    assert "s: svdquant, layer 3 of 9" in log.getvalue()
