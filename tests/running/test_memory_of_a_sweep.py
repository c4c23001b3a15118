"""Memory at each hand-over of a sweep: one model at a time, none while other processes run."""

from __future__ import annotations

import gc
import json
import weakref

import bitsandbytes  # noqa: F401  (its first import logs an error, whose frames pytest would keep with all they hold)
import pytest
import torch

from quantlab.models.table import family_of
from quantlab.modules.device import collect_as_usual, collect_rarely
from quantlab.running import placement, workbench
from tests.support.engines import hand_overs
from tests.support.shell import digits_words

WORDS = ("-m", *digits_words("evaluation.num_samples=10", "backend=quanto", "--json", "sweep.floors=false"))


@pytest.fixture
def loaded(monkeypatch):
    """Weak references to the modules of each model that was loaded; a model is only loaded when no other is alive."""
    refs = []

    class Watched:
        def __init__(self, family):
            self.family, self.name = family, family.name

        def load(self, *args):
            assert living(refs) == 0, "the old model is there while the next one is loaded"
            model = self.family.load(*args)
            refs.extend(weakref.ref(part) for part in model.components.values())
            return model

    monkeypatch.setattr(placement, "family_of", lambda config: Watched(family_of(config)))
    return refs


def living(refs):
    return sum(ref() is not None for ref in refs)


def test_one_model_goes_before_the_next_is_loaded(shell, loaded):
    code, out, err = shell(*WORDS, "dtype=int8", "evaluation.guidance_scale=1,2")
    assert code == 0, err
    assert len(loaded) == len(json.loads(out)) == 2
    assert living(loaded) == 0


def test_the_collector_looks_as_usual_once_a_model_is_there(shell):
    collect_as_usual()
    usual = gc.get_threshold()
    collect_rarely()
    try:
        assert gc.get_threshold() > usual
        code, _, err = shell(*WORDS[1:], "dtype=int8")
        assert code == 0, err
        assert gc.get_threshold() == usual
    finally:
        collect_as_usual()


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ("sweep.isolation=process",),
        pytest.param(("sweep.search.num_trials=2", "sweep.timeout_s=60"), marks=pytest.mark.slow),
    ],
)
def test_nothing_is_kept_while_jobs_run_apart(shell, loaded, words, monkeypatch, freezing):
    emptied, seen = [], []
    others = {id(t) for t in tensors()}
    real = workbench.give_back
    monkeypatch.setattr(workbench, "give_back", lambda device: emptied.append(device) or real(device))

    def look(job):
        big = [t for t in tensors() if t.numel() >= 256 * 256 and id(t) not in others]
        seen.append((living(loaded), [tuple(t.shape) for t in big], len(emptied)))

    hand_overs(monkeypatch, look)
    shell(*WORDS, "dtype=int8,int4", *words)
    assert [(models, big) for models, big, _ in seen] == [(0, [])] * 2
    assert all(times for _, _, times in seen), "the allocator's memory is given back before the first one starts"


def tensors():
    return [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type != "meta"]  # prices are kept
