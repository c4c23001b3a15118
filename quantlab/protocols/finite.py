"""Which samples of an output are no numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantlab.errors import NotFinite

if TYPE_CHECKING:
    from torch import Tensor

OVERFLOWS = "the model overflows: set model.dtype=bfloat16 or float32, or of a cast another dtype"
"""What is to be done; of a scheme :mod:`quantlab.stages.evaluate` says it otherwise."""


def bad_rows(rows: Tensor) -> list[int]:
    """Numbers of the rows of a tensor (n, ...) that hold NaN or infinity."""
    import torch

    found: list[int] = (~torch.isfinite(rows.reshape(len(rows), -1)).all(dim=1)).nonzero().flatten().tolist()
    return found


def require_finite_rows(rows: Tensor, sample_ids: Sequence[str], what: str) -> None:
    """NotFinite, naming the first sample of a language model whose row holds NaN or infinity."""
    if bad := bad_rows(rows):
        raise NotFinite(
            f"quality/kld_mean: the {what} of {sample_ids[bad[0]]} holds NaN or infinity; {OVERFLOWS}",
            f"the {what} of {sample_ids[bad[0]]}",
        )
