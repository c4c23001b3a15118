"""Whether a quantized layer multiplies by the weight that it reads back as, and with which kernel.

Read-back decodes what is stored; a layer's own forward may still do something else with it: a scale that is applied
twice or never, a kernel that was not launched, a layout that is read wrongly. So each layer answers a few random rows
once, beside the plain product of its decoded weight.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.errors import is_of_the_machine
from quantlab.vocabulary.reports import StoredWeight

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quantlab.backends.scheme import Scheme

_NUM_ROWS = 8
_WEIGHTS_AT_ONCE = 1 << 20
"""That are widened together, as a whole copy would be the largest tensor here."""
_LARGEST_OUTPUT, _PER_WEIGHT = 1000.0, 100.0
"""Inputs are made smaller where outputs would be larger, or larger than so many times the largest weight: float16 ends
at 65,504, and where it scales last the sums of codes up to 127 end there too. That is no fault of a layer."""
_WEIGHT_ONLY, _FOUR_BIT_INPUTS = 0.05, 0.5
_ROUNDED_INPUTS = 0.1
_PRODUCTS = ("mm", "mv", "gemv", "gemm", "linear", "matmul")


def wider(scheme: Scheme, dtype: str) -> str:
    """What to type so that a scheme computes in a wider range than float16's: ``"set KEY=..., or "``; nothing for
    another ``dtype``."""
    if dtype != "float16":
        return ""
    known = [d for d in scheme.row.compute_dtypes if d not in ("float16", *scheme.row.overflows_in)]
    return f"set compute_dtype={' or '.join(known)}, or " if known else "set model.dtype=bfloat16, or "


@dataclass(frozen=True, kw_only=True)
class Product:
    """What a layer answered."""

    rel_error: float
    """||found - wanted|| / ||wanted|| over all rows, without the bias; infinite where the answer is not finite."""
    tolerance: float
    """What rounding of the inputs and 16-bit sums explain, with room; beyond it the layer computes something else."""
    kernel: str = ""
    """The operator that multiplied, by torch's name: ``aten::addmm`` is a dense product, after dequantization."""
    raised: str = ""
    """What the library raised instead of an answer."""

    @property
    def is_explained(self) -> bool:
        return self.rel_error <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Question:
    """Random rows, and what the plain product of the decoded weight answers: the weight itself is needed no more."""

    rows: Tensor
    wanted: Tensor
    tolerance: float


def question(stored: StoredWeight, dtype: torch.dtype) -> Question | None:
    """Random rows of ``dtype`` for a layer, normally distributed where its inputs are rounded.

    None where the layer rounds its inputs by scales that were measured: which inputs it takes only its data know.
    """
    import torch

    if stored.activation_granularity.endswith("static"):
        return None
    dense: Tensor = stored.dense.detach()
    step = max(1, _WEIGHTS_AT_ONCE // dense.shape[1])

    room = torch.empty(min(step, len(dense)), dense.shape[1], device=dense.device)  # new pages cost as much as products

    def wide(part: Tensor) -> Tensor:
        return part if part.dtype == torch.float32 else room[: len(part)].copy_(part)

    def plain(rows: Tensor) -> Tensor:
        return torch.cat([rows @ wide(part).T for part in torch.split(dense, step)], dim=1)

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(_NUM_ROWS, dense.shape[1], generator=draw).to(dense.device)
    if stored.column_scale is not None:
        x = x * stored.column_scale.to(x)
    low, high = dense.aminmax()  # a copy of magnitudes would be as large as the layer
    limit = min(_LARGEST_OUTPUT, _PER_WEIGHT * max(-float(low), float(high)))
    found = plain(x)
    largest = float(found.abs().max())
    rows = (x * (limit / largest) if largest > limit else x).to(dtype)
    wanted = found if rows is x else plain(rows.float())
    return Question(rows=rows, wanted=wanted, tolerance=_tolerance(stored.activation_dtype))


def product(layer: torch.nn.Module, asked: Question) -> Product:
    """What ``layer`` answers."""
    import torch
    from torch.autograd.profiler_legacy import profile

    wanted = asked.wanted
    try:
        with torch.no_grad(), profile() as profiled:  # type: ignore[no-untyped-call]
            found = layer(asked.rows).float()
    except (AssertionError, RuntimeError, ValueError, TypeError, NotImplementedError) as raised:
        if is_of_the_machine(raised):
            raise
        return Product(rel_error=math.inf, tolerance=_WEIGHT_ONLY, raised=f"{type(raised).__name__}: {raised}")
    bias: Tensor | None = getattr(layer, "bias", None)
    operators = [event.name for event in profiled.function_events]
    for event in profiled.function_events:
        vars(event).clear()  # parents and children hold one another: megabytes a layer, until garbage is collected
    difference = found - wanted if bias is None else found - bias.detach().float() - wanted
    norm = float(torch.linalg.vector_norm(wanted))
    error = float(torch.linalg.vector_norm(difference)) / (norm or 1.0)
    return Product(
        rel_error=error if math.isfinite(error) else math.inf,
        tolerance=asked.tolerance,
        kernel=_kernel(operators),
    )


def _tolerance(activation_dtype: str) -> float:
    if activation_dtype == "none":
        return _WEIGHT_ONLY
    return _FOUR_BIT_INPUTS if activation_dtype.endswith("4") else _ROUNDED_INPUTS


def _kernel(operators: list[str]) -> str:
    """The innermost operator that multiplies: the last one that was begun."""
    words = {name: re.split("[_:]+", name) for name in operators}
    whole = (name for name in reversed(operators) if words[name][-1] in _PRODUCTS)
    part = (name for name in reversed(operators) if not {*_PRODUCTS}.isdisjoint(words[name]))  # ..._mm_for_cpu
    return next(whole, next(part, ""))
