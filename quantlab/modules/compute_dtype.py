"""The dtype in which a component computes, read from its parameters."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import TYPE_CHECKING

from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, dtype_name

if TYPE_CHECKING:
    import torch


def torch_dtype(name: str) -> torch.dtype:
    """``"bfloat16"`` -> ``torch.bfloat16``."""
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def component_dtype(component: torch.nn.Module, default: str = "float32") -> torch.dtype:
    """The torch dtype in which a component wants its floating inputs.

    It is the dtype of most parameter elements among float32, bfloat16 and float16: stored codes (uint8, 8-bit floats)
    do not count, and a few norms kept in float32 do not outvote the rest. ``default`` names it where no such parameter
    is left.
    """
    votes: Counter[str] = Counter()
    telling = (part for part in component.modules() if not getattr(part, "computes_in_input_dtype", False))
    for parameter in itertools.chain.from_iterable(part.parameters(recurse=False) for part in telling):
        if dtype_name(parameter.dtype) in COMPUTE_DTYPES:
            votes[dtype_name(parameter.dtype)] += parameter.numel()
    return torch_dtype(votes.most_common(1)[0][0] if votes else default)
