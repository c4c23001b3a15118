"""torchao int8, weight only, one scale a row."""

from _digits import main
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_


def quantize(model):
    quantize_(model, Int8WeightOnlyConfig(set_inductor_config=False))


def count_bytes(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = {id(m.weight) for m in layers}
    dense = sum(4 * p.numel() for p in [*model.parameters(), *model.buffers()] if id(p) not in weights)
    codes = sum(m.weight.qdata.numel() for m in layers)
    # a float32 scale and an int8 zero point (always 0, and kept) for each row
    return dense + codes + sum(4 * m.weight.scale.numel() + m.weight.zero_point.numel() for m in layers)


main(quantize, count_bytes)
