"""What is remembered of a module without weights goes with it; one with weights is asked anew."""

import gc
import weakref

import torch
from torch import nn

from quantlab.modules.remembered import remembered


def test_one_question_a_module_and_nothing_is_kept():
    asked = []

    @remembered
    def size(module):
        asked.append(1)
        return sum(p.numel() for p in module.parameters())

    with torch.device("meta"):
        layer = nn.Linear(8, 8)
    assert (size(layer), size(layer), len(asked)) == (72, 72, 1)
    gone = weakref.ref(layer)
    del layer
    gc.collect()
    assert gone() is None


def test_a_module_with_weights_may_change():
    layer = nn.Sequential(nn.Linear(8, 8))
    size = remembered(lambda module: sum(p.numel() for p in module.parameters()))
    assert size(layer) == 72
    layer.append(nn.Linear(8, 2))
    assert size(layer) == 90
