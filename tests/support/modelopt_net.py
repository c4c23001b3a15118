"""A model with a few loud channels, and what ModelOpt makes of it."""

from __future__ import annotations

import functools

import torch
from torch import nn

from quantlab.backends import modelopt as backend
from quantlab.backends.modelopt import NVIDIAModelOptConfig
from quantlab.modules.feed import feed_of_batches
from quantlab.vocabulary.axes import QuantizationAxes

IN, HIDDEN, OUT, RANK = 256, 128, 64, 16
NUM_BATCHES = 2
LAYERS = ["0", "2"]
LOOSE = {"svdquant": {"lowrank": RANK}}


def make_model(dtype="float32"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, OUT))
    for layer in (model[0], model[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
    return model.to(getattr(torch, dtype)).eval().requires_grad_(False)


def outliers(seed, rows=256):
    """Mildly correlated channels, 6 of them 30 times as large as the others."""
    fixed = torch.Generator().manual_seed(7)
    mix = torch.eye(IN) + 0.3 * IN**-0.5 * torch.randn(IN, IN, generator=fixed)
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(seed)) @ mix
    x[:, torch.randperm(IN, generator=fixed)[:6]] *= 30
    return x


@functools.cache
def feed():
    return feed_of_batches([outliers(i) for i in range(NUM_BATCHES)])


def config_of(dtype, algorithm, activation="none", scales="dynamic", group="auto", **more):
    if algorithm == "smoothquant":
        activation = "int8"
    asked = QuantizationAxes(
        backend="modelopt", dtype=dtype, algorithm=algorithm, activation_dtype=activation, group_size=group
    )
    settings = {"activation_scales": scales, "algorithm_settings": LOOSE.get(algorithm), **more}
    return NVIDIAModelOptConfig.from_axes(asked, settings)


def calibrated(config, dtype="float32"):
    model = make_model(dtype)
    if config.needs_data:
        assert backend.calibrate(model, LAYERS, config, dtype, feed()) is None
    else:
        backend.quantize(model, LAYERS, config, dtype)
    return model


def quantized(config, dtype="float32"):
    model = calibrated(config, dtype)
    if config.needs_data:
        backend.quantize(model, LAYERS, config, dtype, None)
    return model


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())
