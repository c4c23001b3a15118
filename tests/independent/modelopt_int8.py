"""NVIDIA ModelOpt int8, weight only, one scale a row, packed."""

import contextlib
import io

import modelopt.torch.quantization as mtq
from _digits import main
from torch import nn

WEIGHTS = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}, "parent_class": "nn.Linear"}
CONFIG = {"quant_cfg": [{"quantizer_name": "*", "enable": False}, WEIGHTS], "algorithm": "max"}


def quantize(model):
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(model, CONFIG)
        mtq.compress(model)


def count_bytes(model):
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    weights = {id(m.weight) for m in layers}
    # the scales and the maxima that they come from are buffers, float32 as the biases are
    dense = sum(4 * p.numel() for p in [*model.parameters(), *model.buffers()] if id(p) not in weights)
    return dense + sum(m.in_features * m.out_features for m in layers)


main(quantize, count_bytes)
