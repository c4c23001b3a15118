"""Which layers a model calls, whose weights it reads instead, and where its weights are."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from quantlab.errors import ConfigError
from quantlab.modules.layers import linear_layers
from quantlab.modules.read_in_source import reads_in_source

if TYPE_CHECKING:
    from torch import nn


def called(module: nn.Module, layers: Sequence[str], run: Callable[[], object]) -> list[str]:
    """Those of ``layers`` of the module that are called while ``run`` runs."""
    found: set[str] = set()
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: found.add(name)) for name in layers
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name in found]


def check_weights_are_here(module: nn.Module, what: str) -> None:
    """ConfigError ``<what>: ...`` where weights have no values: offloaded by hooks, or never loaded (meta device)."""
    from torch.nn.parameter import is_lazy

    parameters = dict(module.named_parameters())
    unmade = [name for name, tensor in (*parameters.items(), *module.named_buffers()) if is_lazy(tensor)]
    if unmade:
        raise ConfigError(f"{what}: {unmade[0]} takes its shape from the first input; run the module on one before")
    absent = [name for name, parameter in parameters.items() if parameter.is_meta]
    if absent:
        raise ConfigError(
            f"{what}: {len(absent)} of {len(parameters)} weights have no values here ({absent[0]}: offloaded, or never "
            "loaded); load it whole onto one device, without device_map, offloading or init_empty_weights"
        )


def check_uncompiled(module: nn.Module, what: str) -> None:
    """ConfigError ``<what>: ...`` for a part that torch.compile made: its layers cannot be looked into, and a copy
    of it would run otherwise."""
    for path, part in module.named_modules():
        is_compiled = type(part).__name__ == "OptimizedModule"
        if is_compiled or vars(part).get("_compiled_call_impl") is not None:
            way_out = "pass what it was made of (._orig_mod)" if is_compiled else "pass it as it was before .compile()"
            raise ConfigError(f"{what}: {path or 'it'} is compiled by torch.compile; {way_out}")


@contextmanager
def recorded_reads(module: nn.Module) -> Iterator[list[str]]:
    """A list that is empty inside; afterwards it has the paths of the Linear layers whose weight was looked at by
    something else than a call of the layer, while the block ran the unquantized ``module``: also by its forward where
    that is run without a call, past all hooks, by which data are looked at and inputs are rounded. Of layers that
    nothing came to, such as experts without a token, those whose weight the code looks at."""
    layers = linear_layers(module)
    noticed: set[int] = set()
    called: set[int] = set()
    found: list[str] = []
    handles = []
    kinds = {name: type(layer) for name, layer in layers.items()}
    for layer in layers.values():
        layer.__class__ = _watched(cast(Any, type(layer)))
        vars(layer)[_WATCH] = (noticed, [], called, [])
        if "forward" in vars(layer):  # that of its class is not what is called: its weights come and go
            handles.append(layer.register_forward_pre_hook(lambda own, _: _begin(own)))
            handles.append(layer.register_forward_hook(lambda own, *_: vars(own)[_WATCH][1].clear(), prepend=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
        for name, layer in layers.items():
            layer.__class__ = kinds[name]
            del vars(layer)[_WATCH]
    of_code = {name for name in reads_in_source(module) if id(layers[name]) not in called}
    found += [name for name, layer in layers.items() if id(layer) in noticed or name in of_code]


_WATCH = "_quantlab_watch"


def _begin(layer: nn.Module) -> None:
    """A call of a watched layer begins."""
    _, running, called, _ = vars(layer)[_WATCH]
    running.append(True)
    called.add(id(layer))


@functools.cache
def _watched(base: type[nn.Linear]) -> type[nn.Linear]:
    """``base``, whose layers note who looks at their weight."""

    def look(self: Any, name: str) -> Any:
        noticed, running, *_ = vars(self)[_WATCH]
        if name == "weight" and not running:
            noticed.add(id(self))
        return base.__getattr__(self, name)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        waiting = vars(self)[_WATCH][3]
        waiting.append(True)
        try:
            return base.__call__(self, *args, **kwargs)
        finally:
            waiting.clear()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        noticed, _, _, waiting = vars(self)[_WATCH]
        if not waiting:
            noticed.add(id(self))
        waiting.clear()
        _begin(self)
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            vars(self)[_WATCH][1].pop()

    made = type(base.__name__, (base,), {"__getattr__": look, "__call__": call, "forward": forward})
    made.__module__, made.__qualname__ = base.__module__, base.__qualname__
    return made
