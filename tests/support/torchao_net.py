"""A net with loud channels, and the schemes of torchao that are calibrated on it."""

from __future__ import annotations

import torch
from torch import nn

from quantlab.backends import torchao as backend
from quantlab.modules.feed import CalibrationFeed, feed_of_batches
from quantlab.vocabulary.axes import QuantizationAxes
from tests.support.tables import native_config

OUT, IN = 128, 512
NAMES = ["first", "second", "third"]


class Net(nn.Module):
    """Three layers; the second gets the input of the first again, and the third another number of dimensions."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(IN, OUT), nn.Linear(IN, OUT, bias=False), nn.Linear(OUT, 32)

    def forward(self, x):
        return self.third((self.first(x) - torch.relu(self.second(input=x))).mean(dim=1))


def net(dtype="float32"):
    torch.manual_seed(0)
    made = Net()
    for layer in (made.first, made.second):
        nn.init.normal_(layer.weight)
    return made.to(getattr(torch, dtype)).eval().requires_grad_(False)


def batches(sizes=(2, 2, 2), dtype="float32", seed=1):
    """Tokens of which every 64th channel is 30 times the others, and channels are a little alike."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.eye(IN) + 0.02 * torch.randn(IN, IN, generator=torch.Generator().manual_seed(9))
    loud = torch.where(torch.arange(IN) % 64 == 0, 30.0, 1.0)
    return [(torch.randn(n, 32, IN, generator=generator) @ mixed * loud).to(getattr(torch, dtype)) for n in sizes]


def config_of(dtype="int8", activation_dtype="none", algorithm="max", group_size="auto", compute="float32", **own):
    axes = QuantizationAxes(
        backend="torchao", dtype=dtype, group_size=group_size, activation_dtype=activation_dtype, algorithm=algorithm
    )
    return backend.resolve(native_config(axes, own), "cpu", compute)


def calibrated(config, compute="float32", data=None, names=("first",), model=None):
    model = model or net(compute)
    feed = data if isinstance(data, CalibrationFeed) else feed_of_batches(data or batches(dtype=compute))
    found = backend.calibrate(model, names, config, compute, feed) if config.needs_data else None
    backend.quantize(model, names, config, compute, found)
    return model


SCHEMES = {
    "int8 awq": {"algorithm": "awq"},
    "int8 smoothquant": {"algorithm": "smoothquant"},
    "int8 group awq": {"algorithm": "awq", "group_size": 64},
    "int8 group smoothquant": {"algorithm": "smoothquant", "group_size": 64},
    "int8 int8 awq": {"activation_dtype": "int8", "algorithm": "awq"},
    "int8 int8 smoothquant": {"activation_dtype": "int8", "algorithm": "smoothquant"},
    "int8 int8 static": {"activation_dtype": "int8", "activation_scales": "static"},
    "int8 int8 static smoothquant": {
        "activation_dtype": "int8",
        "activation_scales": "static",
        "algorithm": "smoothquant",
    },
    "float8 static": {"dtype": "float8_e4m3", "activation_dtype": "float8_e4m3", "activation_scales": "static"},
    **{
        f"int4 {group} {algorithm}": {"dtype": "int4", "group_size": group, "algorithm": algorithm}
        for group in (32, 64, 128)
        for algorithm in ("awq", "smoothquant")
    },
}
