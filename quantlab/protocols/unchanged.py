"""A model that changes itself when it runs: a copy made before is another model than one made after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantlab.errors import ModelError
from quantlab.models.loaded import LoadedModel
from quantlab.modules.layers import changed_tensors

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def must_stay_unchanged(model: LoadedModel) -> Iterator[None]:
    """Raises ModelError, naming the tensors, where a component is another one after the block than before."""
    module = model.components["model"]
    with changed_tensors(module) as changed:
        yield
    if changed:
        listed = ", ".join(changed[:3]) + (", ..." if len(changed) > 3 else "")
        raise ModelError(
            f"model.path: {model.name} changes its own weights when it first runs ({listed}), so that a copy made "
            "before is another model than one made after; use an implementation that does not"
        )


@contextmanager
def same_buffers(module: nn.Module) -> Iterator[None]:
    """Afterwards the buffers are what they were before: what counts its calls or keeps a running mean begins each time
    from the same state, the reference as a candidate, and the user's module is left as it was given."""
    import torch

    before = [(part, dict(part._buffers)) for part in module.modules() if part._buffers]
    plain = {
        id(b): (b, b.clone()) for _, held in before for b in held.values() if type(b) is torch.Tensor and not b.is_meta
    }
    try:
        yield
    finally:
        for part, held in before:
            part._buffers.update(held)
        for buffer, value in plain.values():
            if not torch.equal(buffer, value):
                buffer.copy_(value)
