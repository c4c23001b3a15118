"""Which samples of an output are no numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def bad_rows(rows: Tensor) -> list[int]:
    """Numbers of the rows of a tensor (n, ...) that hold NaN or infinity."""
    import torch

    found: list[int] = (~torch.isfinite(rows.reshape(len(rows), -1)).all(dim=1)).nonzero().flatten().tolist()
    return found
