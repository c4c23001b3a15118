"""A module whose bytes wait in the host's memory while something else has the device, whatever library made it.

Its tensors stay the objects that they are, with their subclasses and states: only their storages are emptied, and
filled again before it runs. So no library has to know how its tensors move, and what comes back are the same bits.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from quantlab.modules.memory import held_storages

if TYPE_CHECKING:
    from torch import UntypedStorage, nn

LEAST_BYTES = 4096
"""Smaller storages stay: among them are tables that a library keeps for all its layers."""


@dataclass(eq=False)
class Parked:
    """A module that goes and comes back. ``packages`` as in :func:`quantlab.modules.memory.storages`."""

    module: nn.Module
    packages: Collection[str]
    _away: list[tuple[UntypedStorage, UntypedStorage]] = field(default_factory=list)
    """(an emptied storage, its bytes on the host)."""

    @property
    def is_away(self) -> bool:
        return bool(self._away)

    def leave(self) -> None:
        """Empty the module's storages; nothing where they are empty already."""
        import torch

        if self._away:
            return
        for storage in held_storages(self.module, self.packages).values():
            size = storage.nbytes()
            if size < LEAST_BYTES or storage.device.type == "meta" or not storage.resizable():
                continue
            kept = torch.empty(size, dtype=torch.uint8).untyped_storage()
            kept.copy_(storage)
            storage.resize_(0)
            self._away.append((storage, kept))

    def come_back(self) -> None:
        """Fill them again; nothing where they are full."""
        while self._away:
            storage, kept = self._away.pop()
            storage.resize_(kept.nbytes())
            storage.copy_(kept)
