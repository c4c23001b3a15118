"""torchao int4 in groups of 64, as it runs on a CPU: symmetric, one int8 a code."""

import torch
from _digits import main
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_


def quantize(model):
    quantize_(model, IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(64)))


def count_bytes(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = {id(m.weight) for m in layers}
    dense = sum(4 * p.numel() for p in [*model.parameters(), *model.buffers()] if id(p) not in weights)
    codes = sum(m.in_features * m.out_features for m in layers)
    # a float32 scale and an int8 zero point for each group of 64
    return dense + codes + codes // 64 * (4 + layers[0].weight.zero_point.element_size())


main(quantize, count_bytes)
