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
_ARRIVED = "quantlab_arrived"


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
        is_moved = kind_of(self.device) != "cpu"
        for part, blocks in shares_of(module):
            kinds: dict[str, Any] = {"offload_type": "leaf_level"}
            if blocks:
                kinds = {"offload_type": "block_level", "num_blocks_per_group": 1, "use_stream": is_moved}
            by_streams = blocks if is_moved else []
            _pin(by_streams)
            for block in by_streams:
                _let_arrive(block, self.device)
            apply_group_offloading(part, onload_device=self.device, offload_device="cpu", **kinds)
            for block in by_streams:
                _note_arrivals(block)
        says(module, self.device, "device")  # where its inputs shall go
        return module


def _pin(blocks: list[nn.Module]) -> None:
    """Page-lock blocks where they are: Diffusers makes a page-locked copy of every block before it lets go of the first
    original, and the host would hold the model twice."""
    for block in blocks:
        for tensor in (*block.parameters(), *block.buffers()):
            tensor.data = tensor.data.pin_memory()


def _let_arrive(block: nn.Module, device: str) -> None:
    """Let a block compute when its weights are there. Diffusers itself does not wait where a part has nothing beside
    its blocks, as the encoders of CLIP and BERT, nor where a block is its own next, as ALBERT's."""
    import torch
    from diffusers.hooks.hooks import HookRegistry, ModelHook

    class Arrived(ModelHook):  # type: ignore[misc, unused-ignore]
        """Between Diffusers' hook, which is put around it, and the forward."""

        event: Any = None

        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            if self.event is not None:
                torch.get_device_module(device).current_stream().wait_event(self.event)
            return args, kwargs

    hooks = HookRegistry.check_if_exists_or_initialize(block)
    if hooks.get_hook(_ARRIVED) is None:
        hooks.register_hook(Arrived(), _ARRIVED)  # type: ignore[no-untyped-call, unused-ignore]


def _note_arrivals(block: nn.Module) -> None:
    """Of a block in a group of its own: when what was begun last is there."""
    hooks: Any = block._diffusers_hook
    arrived, group = hooks.get_hook(_ARRIVED), hooks.get_hook("group_offloading").group
    onload = group.onload_

    def noted() -> None:
        onload()
        arrived.event = group.stream.record_event()

    group.onload_ = noted


def shares_of(module: nn.Module) -> list[tuple[nn.Module, list[nn.Module]]]:
    """The parts of a module that come and go by themselves, each with its blocks; none where it goes layer by layer.

    A language model's blocks are some steps down, beside its head. What holds tensors of its own cannot be left to
    its parts.
    """
    from torch import nn

    is_list = isinstance(module, nn.ModuleList)  # which is never called
    blocks = [] if is_list else blocks_of(module)
    has_own = any(t is not None for t in (*module._parameters.values(), *module._buffers.values()))
    children = list(module.children())
    if blocks or has_own or is_list or not children:
        return [(module, blocks)]
    found = [share for child in children for share in shares_of(child)]
    return found if any(blocks for _, blocks in found) else [(module, [])]


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks that come one after the other; none where most weights are elsewhere, so that layers come one by one.

    None also of a module whose parts share weights: one block would take the other's away. And none where a block is a
    list itself, which is never called.
    """
    from torch import nn

    lists = [part for part in module.children() if isinstance(part, (nn.ModuleList, nn.Sequential))]
    blocks = [block for part in lists for block in part]
    is_most = 2 * sum(map(num_bytes, blocks)) > num_bytes(module)
    is_called = not any(isinstance(block, (nn.ModuleList, nn.ModuleDict)) for block in blocks)
    return blocks if is_most and is_called and not tied_parameters(module) else []


@remembered
def most_bytes(module: nn.Module) -> int:
    """What of a module is on the device at once: of a part with blocks two of them, of which one is coming, and what is
    in none; of another its largest layer."""
    return max(
        num_bytes(part) - sum(map(num_bytes, blocks)) + 2 * max(map(num_bytes, blocks)) if blocks else _largest(part)
        for part, blocks in shares_of(module)
    )


def _largest(module: nn.Module) -> int:
    """Bytes of the layer with the most parameters."""
    return max(
        (sum(p.nbytes for p in part._parameters.values() if p is not None) for part in module.modules()), default=0
    )


def num_bytes(module: nn.Module) -> int:
    """Bytes of a module's tensors."""
    return sum(storages(module, ()).values())
