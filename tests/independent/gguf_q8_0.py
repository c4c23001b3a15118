"""GGUF q8_0: blocks of 32 weights, an int8 each, and a float16 scale; decoded before each product."""

import torch
from _digits import main
from gguf import GGMLQuantizationType, quants
from torch import nn

Q8_0 = GGMLQuantizationType.Q8_0


class Blocks(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.codes, self.bias = quants.quantize(linear.weight.numpy(), Q8_0), linear.bias

    def forward(self, x):
        return nn.functional.linear(x, torch.from_numpy(quants.dequantize(self.codes, Q8_0)), self.bias)


def quantize(model):
    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Blocks(linear))


def count_bytes(model):
    dense = sum(4 * p.numel() for p in [*model.parameters(), *model.buffers()])
    return dense + sum(m.codes.nbytes for m in model.modules() if isinstance(m, Blocks))


main(quantize, count_bytes)
