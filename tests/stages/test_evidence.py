"""What calibration shows of each layer."""

import math

import pytest
import torch
from torch import nn

from quantlab.errors import MetricUndefined
from quantlab.modules.feed import CalibrationFeed, feed_of_batches
from quantlab.stages.evidence import evenly_spaced, layer_energies


class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 4, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def test_evidence_counts_each_layers_own_error_by_step():
    """Noise on one layer's weight shows there, in the right size, and nowhere else."""
    torch.manual_seed(0)
    reference, candidate = Layered(), Layered()
    candidate.load_state_dict(reference.state_dict())
    with torch.no_grad():
        candidate.first.weight.mul_(1.1)
    batches = [torch.randn(5, 8) for _ in range(4)]
    calls = [{"args": (b,), "kwargs": {}, "dtype": "float32", "step": i % 2} for i, b in enumerate(batches)]
    feed = CalibrationFeed(calls=calls, num_samples=20, batch_size=5)
    found = layer_energies(reference, candidate, ["first", "second"], feed, 4)
    assert found["first"].sqnr_db() == pytest.approx(20, abs=1e-4), "an error of a tenth is 20 dB"
    assert [found["first"].sqnr_db(k) for k in (0, 1)] == pytest.approx([20, 20], abs=1e-4)
    assert found["second"].sqnr_db() is None, "the same inputs and weights: no error at all"
    every = torch.cat(batches)
    assert found["first"].input_absmax == pytest.approx(float(every.abs().max()))
    channels = every.abs().amax(0)
    assert found["first"].outlier_ratio == pytest.approx(float(channels.max() / channels.median()))


def test_evidence_gives_a_layer_with_hooks_what_the_hooks_were_given():
    """They are on the candidate's layer too: an input that they changed already would be changed twice."""
    torch.manual_seed(0)
    reference, candidate = Layered(), Layered()
    candidate.load_state_dict(reference.state_dict())
    for each in (reference, candidate):
        each.first.register_forward_pre_hook(lambda module, args: (args[0] * 7,))
        each.first.register_forward_hook(lambda module, args, output: output + 1)
    batch = torch.randn(5, 8)
    found = layer_energies(reference, candidate, ["first"], feed_of_batches([batch]), 1)
    assert found["first"].sqnr_db() is None, "the same layer: no error at all"
    assert found["first"].input_absmax == pytest.approx(7 * float(batch.abs().max())), "of what is multiplied"


def test_evidence_refuses_activations_that_are_nan_and_names_the_layer():
    net = Layered()
    with torch.no_grad():
        net.first.weight[0, 0] = math.inf
    feed = feed_of_batches([torch.ones(2, 8)])
    with pytest.raises(MetricUndefined, match=r"^calibration: second gets NaN or infinity on the calibration data"):
        layer_energies(net, None, ["first", "second"], feed, 1)


@pytest.mark.parametrize(("num", "wanted", "expected"), [(3, 5, [0, 1, 2]), (10, 2, [0, 5]), (4, 0, [])])
def test_evidence_is_taken_evenly(num, wanted, expected):
    assert evenly_spaced(num, wanted) == expected
