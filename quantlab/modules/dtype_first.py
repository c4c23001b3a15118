"""The dtype that a module says of itself, where its first weight became codes.

Models cast their inputs to ``next(self.parameters()).dtype``. Codes of some libraries are parameters of integers, and
inputs cast to these are lost. Parts that ask so give their parameters of the former first dtype first.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

from quantlab.modules.read_in_source import asked_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_FIRST = "_quantlab_first_dtype"


def keep_first_dtype(module: nn.Module, original: nn.Module) -> None:
    """In place, for ``module`` itself and the parts whose parameters its code looks at."""
    asked = {id(part) for part in (module, *asked_of(module, "parameters"))}
    for path, part in module.named_modules():
        if id(part) not in asked or not path and not original._modules:
            continue
        before, now = (next(p.parameters(), None) for p in (original.get_submodule(path), part))
        if before is not None and now is not None and now.dtype != before.dtype:
            vars(part)[_FIRST] = before.dtype
            part.__class__ = _sorted_class(cast(Any, type(part)))


@functools.cache
def _sorted_class(base: type[nn.Module]) -> type[nn.Module]:
    """``base``, whose parameters of its first dtype come first."""

    def parameters(self: Any, recurse: bool = True) -> Iterator[nn.Parameter]:
        first: torch.dtype = vars(self)[_FIRST]
        yield from sorted(base.parameters(self, recurse), key=lambda p: p.dtype != first)

    def reduced(self: Any, protocol: Any) -> tuple[Any, ...]:
        made: Any = base.__reduce_ex__
        return (_new, (base,), *made(self, protocol)[2:])  # a class that is made at run time has no name to be found by

    made = type(base.__name__, (base,), {"parameters": parameters, "__reduce_ex__": reduced})
    made.__module__, made.__qualname__ = base.__module__, base.__qualname__
    return made


def _new(base: type[nn.Module]) -> nn.Module:
    kind: type[nn.Module] = _sorted_class(cast(Any, base))
    return kind.__new__(kind)
