"""A stack of Linear layers, and inputs for it."""

import torch
from torch import nn


def net(*sizes):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
    return nn.Sequential(*layers).eval().requires_grad_(False)


def inputs(num=256, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(4, num, dtype=dtype)


def run(module, x):
    with torch.no_grad():
        out = module(x)
    return out.dequantize() if hasattr(out, "qtype") else out
