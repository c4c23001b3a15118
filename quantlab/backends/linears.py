"""The layers that a backend is told by name."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar, cast

if TYPE_CHECKING:
    from torch import nn


T = TypeVar("T")


def linear_at(model: nn.Module, name: str) -> nn.Linear:
    """The layer of ``model`` at the path ``name``; backends are told paths of ``nn.Linear`` only."""
    return cast("nn.Linear", model.get_submodule(name))


def owner_of(key: str, names: Container[str]) -> str | None:
    """The layer of ``names`` that the key of a state dict belongs to."""
    while key:
        key = key.rpartition(".")[0]
        if key in names:
            return key
    return None


def by_layer(tensors: Mapping[str, T], names: Iterable[str]) -> dict[str, dict[str, T]]:
    """Layer -> its entries of a state dict, by their names in it."""
    found: dict[str, dict[str, T]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        if (owner := owner_of(key, found)) is not None:
            found[owner][key[len(owner) + 1 :]] = tensor
    return found
