"""Spread: a model whose blocks lie on several devices, each of which computes what lies on it.

It is cut where its class says that it may be (``_no_split_modules`` of Diffusers and transformers). What enters a block
is brought to its device by a hook before its forward; what the model returns, back to the first device. Layers keep
their own forward, so that a quantized one takes the place of any, and what is computed is what one device computes, bit
for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError
from quantlab.modules.device import kind_of
from quantlab.modules.memory import Storages, held_storages, storage_of, storages
from quantlab.modules.residence import METHODS, says
from quantlab.modules.source import Source
from quantlab.vocabulary.amounts import GIB

if TYPE_CHECKING:
    from torch import Tensor, nn

KEY = "memory.placement=spread"


# -- where a model may be cut


@dataclass(frozen=True, kw_only=True)
class Block:
    """What must lie on one device: a part of a component, with the own tensors of the containers that it begins."""

    component: str
    path: str
    paths: tuple[str, ...]
    """Of the part and of these containers."""
    storages: Storages


def blocks(component: str, module: nn.Module) -> Iterator[Block]:
    """The blocks of a component, in the order in which they are declared; one for what may not be cut at all."""
    if not is_cut(module):
        yield Block(component=component, path="", paths=("",), storages=storages(module, ()))
        return
    said = (getattr(part, "_no_split_modules", None) or () for part in module.modules())
    whole = {str(name) for names in said for name in names} | {"MultiheadAttention"}  # which reads its layers' weights
    seen: set[int] = set()
    begun: list[str] = []
    own: Storages = {}

    def walk(path: str, part: nn.Module) -> Iterator[Block]:
        nonlocal own
        if id(part) in seen:
            return
        seen.add(id(part))
        children = list(part.named_children())
        if children and type(part).__name__ not in whole:
            begun.append(path)
            own |= storages([*part._parameters.values(), *part._buffers.values()], ())
            for name, child in children:
                yield from walk(f"{path}.{name}".lstrip("."), child)
            return
        paths, held = (*begun, path), own | storages(part, ())
        begun.clear()
        own = {}
        yield Block(component=component, path=path, paths=paths, storages=held)

    yield from walk("", module)


def is_cut(module: nn.Module) -> bool:
    """Whether its class says where a model may be cut, and it is called by its forward alone."""
    return bool(getattr(module, "_no_split_modules", None)) and not is_decoder(module)


def is_decoder(module: nn.Module) -> bool:
    """Whether a module is called by other names than its forward, as an autoencoder is."""
    return any(callable(getattr(module, name, None)) for name in METHODS)


# -- on which device each block lies


@dataclass(frozen=True, kw_only=True)
class Map:
    """Component -> path of a part -> number of its device; and the bytes of the unquantized weights on each device."""

    where: Mapping[str, Mapping[str, int]]
    blocks: tuple[Block, ...]
    num_bytes: tuple[int, ...]

    def number(self, component: str, path: str) -> int:
        """The device of the part, or of the tensor, at ``path``."""
        known = self.where[component]
        while path not in known:
            if not path:
                return 0
            path = path.rpartition(".")[0]
        return known[path]


def plan_map(modules: Mapping[str, nn.Module], num: int, budget: int | None, said: str = "") -> Map:
    """The map of ``modules`` (on the meta device, or with weights) over ``num`` devices, one part after the other by
    their names and as evenly as blocks allow; decoders are on the first.

    accelerate's own map keeps room on the first device for layers that are brought from the host, of which there are
    none here, and asks for devices that are there; a plan may be for another machine.

    Args:
        budget: bytes that each device may hold; None: as many as it takes.
        said: the key that the budget was given by, with which messages about it begin.

    Raises:
        ConfigError: one block alone is more than a device holds, all are more than all devices hold, or there is
            nothing to cut.
    """
    modules = dict(sorted(modules.items()))
    first = {name: m for name, m in modules.items() if is_decoder(m)}
    at_first = sum({k: v for m in first.values() for k, v in storages(m, ()).items()}.values())
    found = [block for name, module in modules.items() if name not in first for block in blocks(name, module)]
    groups = _groups(found)
    if len(groups) + bool(first) < 2:
        name, module = next(iter(modules.items()))
        raise ConfigError(
            f"{KEY}: {type(module).__name__} ({name}) does not say where it may be cut (_no_split_modules); pass "
            "memory.placement=resident, or group_offload"
        )
    sizes = [size for size, _ in groups]
    key = said or KEY
    if budget is not None and max(sizes) > budget:
        largest = found[groups[sizes.index(max(sizes))][1][0]]
        raise ConfigError(
            f"{key}: {largest.path or 'all'} of {largest.component} lies on one device or none, and takes "
            f"{max(sizes) / GIB:.4g} GiB of {budget / GIB:.4g}; give more, or pass memory.placement=group_offload"
        )
    chosen = _evenly(sizes, num, at_first, budget)
    if chosen is None:
        raise ConfigError(
            f"{key}: {(sum(sizes) + at_first) / GIB:.4g} GiB of weights do not lie on {num} devices of "
            f"{(budget or 0) / GIB:.4g} GiB; take more of them (memory.devices), or memory.placement=group_offload"
        )
    where: dict[str, dict[str, int]] = {name: {} for name in modules}
    used = [at_first, *[0] * (num - 1)]
    for (size, members), device in zip(groups, chosen, strict=True):
        used[device] += size
        for i in members:
            where[found[i].component] |= dict.fromkeys(found[i].paths, device)
    for name, module in first.items():
        where[name][""] = 0
        found.append(Block(component=name, path="", paths=("",), storages=storages(module, ())))
    return Map(where=where, blocks=tuple(found), num_bytes=tuple(used))


def _groups(found: Sequence[Block]) -> list[tuple[int, list[int]]]:
    """(bytes, numbers of its blocks) of what must lie together as it shares weights, in the order of the first."""
    leader = list(range(len(found)))
    owner: dict[tuple[str, int], int] = {}
    for i, block in enumerate(found):
        others = {leader[owner[key]] for key in block.storages if key in owner}
        for key in block.storages:
            owner.setdefault(key, i)
        if others:
            first = min(others)
            leader = [first if at in others or at == i else at for at in leader]
    groups: dict[int, list[int]] = {}
    for i, at in enumerate(leader):
        groups.setdefault(at, []).append(i)
    merged = [({k: v for i in members for k, v in found[i].storages.items()}, members) for members in groups.values()]
    return [(sum(held.values()), members) for held, members in merged]


def _evenly(sizes: Sequence[int], num: int, at_first: int, budget: int | None) -> list[int] | None:
    """The device of each, in order, so that the fullest holds the least; None where they do not fit the budget."""

    def filled(most: int) -> list[int] | None:
        device, used, chosen = 0, at_first, []
        for size in sizes:
            while used + size > most:
                device, used = device + 1, 0
                if device == num:
                    return None
            used += size
            chosen.append(device)
        return chosen

    low, high = max([*sizes, at_first]), sum(sizes) + at_first
    if budget is not None:
        high = min(high, budget)
    if low > high or filled(high) is None:
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if filled(middle) is not None else (middle + 1, high)
    return filled(high)


# -- a model that lies so


@dataclass(frozen=True, kw_only=True)
class Over:
    """What a model is spread over."""

    devices: tuple[str, ...]
    budget: int | None
    said: str
    """See :func:`plan_map`."""


@dataclass(frozen=True, eq=False)
class Spread:
    """How the components of a model lie on ``devices``."""

    map: Map
    devices: tuple[str, ...]
    """By their numbers. On a CPU all are ``cpu``: a rehearsal, in which nothing moves."""

    def device(self, component: str, path: str) -> str:
        """Of the part, or of the tensor, at ``path``."""
        return self.devices[self.map.number(component, path)]

    def place(self, component: str, module: nn.Module) -> nn.Module:
        """Bring the tensors of a whole module to their devices, in place, and let it run so."""
        from torch import nn

        moved: dict[object, Tensor] = {}
        made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        """With the old one: an id is only one's own while it lives."""

        def there(tensor: Tensor, path: str) -> Tensor:
            key = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
            if key not in moved:
                moved[key] = tensor.to(self.device(component, path))
            return moved[key]

        for path, part in module.named_modules():
            for name, old in list(part._parameters.items()):
                if old is not None and id(old) not in made:
                    made[id(old)] = nn.Parameter(there(old.data, path), requires_grad=old.requires_grad), old
                if old is not None:
                    setattr(part, name, made[id(old)][0])
            for name, buffer in list(part._buffers.items()):
                if buffer is not None:
                    part._buffers[name] = there(buffer, path)
        return self.connect(component, module)

    def connect(self, component: str, module: nn.Module) -> nn.Module:
        """Let what enters each part of a module come to the device of the part; its tensors may come later."""
        skipped = getattr(module, "_skip_keys_device_placement", None)
        skips = (skipped,) if isinstance(skipped, str) else tuple(skipped or ())
        known = self.map.where[component]
        inner = {b.path for b in self.map.blocks if b.component == component}
        home = self.devices[0]
        for path, number in known.items():
            part, device = module.get_submodule(path) if path else module, self.devices[number]
            part.register_forward_pre_hook(Arriving(device, skips, path in inner), with_kwargs=True)
            if path in inner and device != home:
                part.register_forward_hook(Leaving(home), always_call=True)
        if not is_decoder(module):
            module.register_forward_hook(Returning(home, skips))
        says(module, home, "device")  # where its inputs shall go
        return module

    def streamed(self, component: str, source: Source) -> Source:
        """The files of a component, each tensor of which goes to its own device."""
        self.connect(component, source.module)
        return replace(source, where=functools.partial(self.device, component))

    def weights_bytes(self, modules: Mapping[str, nn.Module], packages: Collection[str]) -> list[int]:
        """Bytes of all ``modules`` on each device, read from their tensors; by the map where the devices are one."""
        held = [0] * len(self.devices)
        seen: set[tuple[str, int]] = set()
        numbers = {device: i for i, device in enumerate(self.devices)}
        is_rehearsed = len(numbers) < len(self.devices)
        for name, module in modules.items():
            for path, part in module.named_modules():
                for key, storage in held_storages(list(vars(part).values()), packages).items():
                    if key not in seen:
                        seen.add(key)
                        at = self.map.number(name, path) if is_rehearsed else numbers.get(key[0], 0)
                        held[at] += storage.nbytes()
        return held


class _Hook:
    """A hook that moves what passes and changes no number; copies of a module share it."""

    __slots__ = ("device",)
    only_moves = True

    def __init__(self, device: str) -> None:
        self.device = device

    def __deepcopy__(self, memo: object) -> _Hook:
        return self


class Arriving(_Hook):
    """Before a part's forward: its arguments come to its device, which a block has as the current one."""

    __slots__ = ("is_block", "skips")

    def __init__(self, device: str, skips: tuple[str, ...], is_block: bool) -> None:
        super().__init__(device)
        self.skips, self.is_block = skips, is_block

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        from accelerate.utils import send_to_device

        if self.is_block:
            make_current(self.device)
        return send_to_device(args, self.device), send_to_device(kwargs, self.device, skip_keys=list(self.skips))


class Leaving(_Hook):
    """After a block's forward, also one that failed: the first device is the current one again."""

    __slots__ = ()

    def __call__(self, *_: object) -> None:
        make_current(self.device)


class Returning(_Hook):
    """After a model's forward: what it returns comes to the first device."""

    __slots__ = ("skips",)

    def __init__(self, device: str, skips: tuple[str, ...]) -> None:
        super().__init__(device)
        self.skips = skips

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        from accelerate.utils import send_to_device

        return send_to_device(output, self.device, skip_keys=list(self.skips))


def make_current(device: str) -> None:
    """Let ``device`` be the GPU that libraries mean where they name none: kernels of Triton start on that."""
    import torch

    if kind_of(device) == "cuda" and torch.cuda.is_available():
        torch.cuda.set_device(torch.device(device))
