"""The layers that a backend is told by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The layer of ``model`` at the path ``name``; backends are told paths of ``nn.Linear`` only."""
    return cast("nn.Linear", model.get_submodule(name))
