"""Part by part: of a model of several modules, only those that work now have their tensors.

The others are on the meta device, and their files are known (:class:`quantlab.modules.source.Source`). A module that is
called gets its tensors first, from the memory-mapped files to the device, and those that nobody holds lose theirs.
Guests take turns with them: modules that are in no file, as a candidate's, which wait in the host's memory. What is
computed is what a resident model computes, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.modules.device import give_back, kind_of
from quantlab.modules.parked import Parked
from quantlab.modules.source import Source, freed_at_once

if TYPE_CHECKING:
    from torch import nn

METHODS = ("encode", "decode")
"""What a module is called by beside its forward: an autoencoder."""


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Where encoded prompts are kept."""

    folder: Path
    key: str
    """Digest of the encoders, and of what computes here."""


@dataclass(frozen=True, eq=False)
class Residence:
    """Which modules have their tensors, and who wants them to stay."""

    sources: Mapping[str, Source]
    """Name -> where the module's tensors are; the module of a source is the one that is used."""
    device: str
    here: set[str] = field(default_factory=set)
    held: list[str] = field(default_factory=list)
    """Names that stay, once for each who holds them."""
    empty: dict[str, list[tuple[dict[str, Any], str, Any]]] = field(default_factory=dict)
    """Name -> the meta tensors of its parts: (where a part keeps it, under which name, tensor)."""
    waiting: dict[str, Parked] = field(default_factory=dict)
    """Name -> the guest that stands for that module now."""

    def bring(self, name: str) -> None:
        """Give a module its tensors; the others that nobody holds lose theirs first."""
        if name in self.waiting:
            self._wake(name)
            return
        if name in self.here:
            return
        self.leave({name, *self.held})
        self._park()
        source = self.sources[name]
        source.fill_others(source.module, ())
        source.forget()
        self.here.add(name)

    def leave(self, without: Collection[str] = ()) -> None:
        """Let go of the tensors of all modules but those ``without``, and of those that are held."""
        gone = self.here - set(without) - set(self.held)
        for name in gone:
            for where, key, tensor in self.empty[name]:
                where[key] = tensor
            self.here.discard(name)
        if gone:
            give_back(self.device)

    def _wake(self, name: str) -> None:
        if self.waiting[name].is_away:
            self.leave()
            self._park(name)
            self.waiting[name].come_back()

    def _park(self, without: str = "") -> None:
        for name, guest in self.waiting.items():
            if name != without:
                guest.leave()
        if self.waiting:
            give_back(self.device)

    @contextlib.contextmanager
    def guests(self, modules: Mapping[str, nn.Module], packages: Collection[str]) -> Iterator[None]:
        """While open, ``modules`` (name of the module that each stands for -> module) are on the device only while they
        work; afterwards all are there. Nothing on a CPU, where the device is the host."""
        if not moves(self.device):
            yield
            return
        self.waiting.update({name: Parked(module, packages) for name, module in modules.items()})
        with contextlib.ExitStack() as stack:
            for name, module in modules.items():
                for handle in _brings(module, Bring(self, name)):
                    stack.callback(handle)
            try:
                yield
            finally:
                self.leave()
                for name in modules:
                    self.waiting.pop(name).come_back()

    @contextlib.contextmanager
    def holding(self, names: Collection[str]) -> Iterator[None]:
        """While open, these modules have their tensors; the names that are not of here are left out."""
        mine = [name for name in names if name in self.sources]
        self.held.extend(mine)
        try:
            for name in mine:
                self.bring(name)
            yield
        finally:
            for name in mine:
                self.held.remove(name)
            self.leave()


def part_by_part(sources: Mapping[str, Source], device: str) -> Residence:
    """The residence of modules that have no tensors yet, each of which brings itself when it is called."""
    found = Residence(sources, device)
    for name, source in sources.items():
        module = source.module
        parts: list[nn.Module] = list(module.modules())
        found.empty[name] = [
            (holder, key, tensor)
            for part in parts
            for holder in (part._parameters, part._buffers)
            for key, tensor in holder.items()
            if tensor is not None and tensor.is_meta
        ]
        says(module, device, "device")  # who asks where its inputs shall go asks before it is called
        for _ in _brings(module, Bring(found, name)):
            pass  # for good
    return found


def moves(device: str) -> bool:
    """Whether what leaves the device is somewhere else then."""
    return kind_of(device) != "cpu"


def _brings(module: nn.Module, bring: Bring) -> Iterator[Callable[[], object]]:
    """Let a module bring itself before it runs; what undoes it."""
    for part in _called_first(module):
        yield part.register_forward_pre_hook(bring).remove
    for method in METHODS:
        if callable(own := getattr(module, method, None)):
            before = vars(module).get(method)
            setattr(module, method, functools.partial(_brought, bring, own))
            yield functools.partial(_unset, module, method, before)


def _called_first(module: nn.Module) -> Iterator[nn.Module]:
    """A module and those of its parts that may be called before it: some pipelines call an encoder's layers, one by
    one. What is inside of one of many layers runs with it."""
    yield module
    for name, part in module.named_children():
        if name.isdigit():
            yield part
        else:
            yield from _called_first(part)


def _unset(module: nn.Module, method: str, before: object) -> None:
    if before is None:
        delattr(module, method)
    else:
        setattr(module, method, before)


def says(thing: object, device: str, *properties: str) -> None:
    """Let an object say by these properties that it is on ``device``; it is of a subclass of its class from then on."""
    import torch

    where = torch.device(device)
    own: Any = type(thing)
    said = {name: property(lambda self: where) for name in properties}
    made: Any = type(own.__name__, (own,), {**said, "__module__": own.__module__, "__doc__": own.__doc__})
    changed: Any = thing
    changed.__class__ = made


class Bring:
    """The hook on a module that gives it its tensors before it runs; a copy of the module has it no more.

    What it knows is no part of the module, so it is kept where the count of a module's bytes does not look.
    """

    __slots__ = ("name", "residence")

    def __init__(self, residence: Residence, name: str) -> None:
        self.residence, self.name = residence, name

    def __call__(self, *_: object) -> None:
        with freed_at_once():
            self.residence.bring(self.name)

    def __deepcopy__(self, memo: object) -> Callable[..., None]:
        return _nothing


def _nothing(*_: object) -> None:
    """What a copy, which has tensors of its own, does before it runs."""


def _brought(bring: Bring, own: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    bring()
    return own(*args, **kwargs)
