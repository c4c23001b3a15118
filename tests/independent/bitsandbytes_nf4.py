"""bitsandbytes nf4, blocks of 64, no double quantization."""

import bitsandbytes as bnb
from _digits import main
from torch import nn


def quantize(model):
    for name, linear in [(n, m) for n, m in model.named_modules() if type(m) is nn.Linear]:
        layer = bnb.nn.Linear4bit(
            linear.in_features, linear.out_features, bias=True, quant_type="nf4", compress_statistics=False
        )
        layer.load_state_dict(linear.state_dict())
        layer.support_avx512bf16_for_cpu = False  # that path repacks the weight lossily at the first call
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.to("cpu"))


def count_bytes(model):
    layers = [m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    weights = {id(m.weight) for m in layers}
    dense = sum(4 * p.numel() for p in [*model.parameters(), *model.buffers()] if id(p) not in weights)
    codes = sum(m.in_features * m.out_features // 2 for m in layers)
    scales = sum(4 * m.weight.quant_state.absmax.numel() for m in layers)
    return dense + codes + scales + len(layers) * 16 * 4  # each layer keeps its table of 16 values


main(quantize, count_bytes)
