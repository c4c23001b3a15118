"""What was once found of a module without weights, as often as it is asked for; no module is kept alive by it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")


def remembered(function: Callable[[nn.Module], T]) -> Callable[[nn.Module], T]:
    """``function``, asked once for each module on the meta device: one with weights may change, and is asked anew."""
    known: weakref.WeakKeyDictionary[nn.Module, T] = weakref.WeakKeyDictionary()

    @functools.wraps(function)
    def ask(module: nn.Module) -> T:
        first = next(module.parameters(), None)
        if first is None or first.device.type != "meta":
            return function(module)
        if module not in known:
            known[module] = function(module)
        return known[module]

    return ask
