"""What is left out of a model by default, by what it is: the same from the command line and from Python."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from quantlab.models.diffusers_pipeline import FAMILY_EXCLUSIONS

if TYPE_CHECKING:
    from torch import nn


def default_exclusions(module: nn.Module, own: Sequence[str] = ()) -> tuple[str, ...]:
    """Entries of ``modules_to_not_convert`` for a module: what its class has, its output head, and ``own``."""
    head = output_head(module)
    family = FAMILY_EXCLUSIONS.get(type(module).__name__, ())
    return tuple(dict.fromkeys((*family, *([head] if head else []), *own)))


def output_head(module: nn.Module) -> str:
    """Path of the layer that turns hidden states into logits, as the classes of transformers name it; "" for none."""
    find = getattr(module, "get_output_embeddings", None)
    head = find() if callable(find) else None
    return next((name for name, part in module.named_modules() if part is head and name), "")
