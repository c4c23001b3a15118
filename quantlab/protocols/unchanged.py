"""A model that changes itself when it first runs: a copy made before is another model than one made after."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from quantlab.errors import ModelError
from quantlab.models.loaded import LoadedModel
from quantlab.modules.layers import changed_tensors


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
