"""Group by group: a model on the host whose layers are on the device while they run, by Diffusers' group offloading.

For one of which not even the largest part has room: what it computes is what it computes whole, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError
from quantlab.modules.device import kind_of
from quantlab.modules.memory import storages
from quantlab.modules.remembered import remembered
from quantlab.modules.residence import METHODS, says
from quantlab.modules.source import Source
from quantlab.modules.ties import tied_parameters

if TYPE_CHECKING:
    from torch import nn

KEY = "memory.placement=group_offload"


@dataclass(frozen=True, eq=False)
class Groups:
    """How the parts of a model run, and where a copy of one comes from."""

    source: Callable[[str, str], Source]
    """(name of a part, device) -> its files."""
    device: str

    def copy(self, name: str) -> nn.Module:
        """The part as it was loaded, whole on the host and by itself."""
        source = self.source(name, "cpu")
        source.fill_others(source.module, ())
        return source.module.eval()

    def place(self, name: str, module: nn.Module) -> nn.Module:
        """Let a module on the host run on the device group by group; a decoder, which is called by another name than
        its forward, goes there whole. ConfigError for a class of which Diffusers says that it cannot."""
        from diffusers.hooks.group_offloading import apply_group_offloading

        if any(callable(getattr(module, method, None)) for method in METHODS):
            return module.to(self.device)
        if getattr(module, "_supports_group_offloading", True) is False:
            raise ConfigError(
                f"{KEY}: Diffusers says of {type(module).__name__} ({name}) that it cannot run in groups; pass "
                "memory.placement=alone"
            )
        kinds: dict[str, Any] = {"offload_type": "leaf_level"}
        if blocks_of(module):
            is_moved = kind_of(self.device) != "cpu"
            kinds = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": is_moved}
        apply_group_offloading(module, onload_device=self.device, offload_device="cpu", **kinds)
        says(module, self.device, "device")  # where its inputs shall go
        return module


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that come one after the other; none where most weights are elsewhere, so that layers come one by one.

    None also of a module whose parts share weights: one block would take the other's away.
    """
    from torch import nn

    lists = [part for part in module.children() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    blocks = [block for part in lists for block in part]
    is_most = 2 * sum(map(num_bytes, blocks)) > num_bytes(module)
    return blocks if is_most and not tied_parameters(module) else []


@remembered
def most_bytes(module: nn.Module) -> int:
    """What of a module is on the device at once: two blocks, of which one is coming, and what is in none; or the
    largest layer."""
    blocks = [num_bytes(block) for block in blocks_of(module)]
    if blocks:
        return num_bytes(module) - sum(blocks) + 2 * max(blocks)
    return max(
        (sum(p.nbytes for p in part._parameters.values() if p is not None) for part in module.modules()), default=0
    )


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors."""
    return sum(storages(module, ()).values())
