"""optimum-quanto int8, weight only, one scale a row."""

import torch
from _digits import main
from optimum import quanto
from torch import nn

LIBRARY = torch.library.Library("quanto", "IMPL")
LIBRARY.impl(
    "qbytes_mm", lambda a, w, s: torch.matmul(a.to(s.dtype), (w.to(s.dtype) * s).t()), "CPU", allow_override=True
)  # the library's own reads past rows that are not aligned


def quantize(model):
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    quanto.quantize(model, weights=quanto.qint8, include=layers)
    quanto.freeze(model)


def count_bytes(model):
    layers = [m for m in model.modules() if isinstance(m, quanto.QLinear)]
    weights = {id(m.weight) for m in layers}
    dense = sum(4 * p.numel() for p in [*model.parameters(), *model.buffers()] if id(p) not in weights)
    return dense + sum(m.weight._data.numel() + 4 * m.weight._scale.numel() for m in layers)


main(quantize, count_bytes)
