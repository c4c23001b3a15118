"""A model that changes itself when it runs: a copy made before is another model than one made after."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from quantlab.errors import ModelError
from quantlab.models.loaded import LoadedModel
from quantlab.modules.layers import changed_tensors
from quantlab.vocabulary.amounts import some_of

if TYPE_CHECKING:
    from torch import nn


_HOOKS_HUNG = "_output_capturing_hooks_installed"


@contextmanager
def must_stay_unchanged(model: LoadedModel) -> Iterator[None]:
    """Raises ModelError, naming the tensors, where a component is another one after the block than before."""
    module = model.components["model"]
    with changed_tensors(module) as changed:
        yield
    if changed:
        raise ModelError(
            f"model.path: {model.name} changes its own weights when it first runs ({some_of(changed, 3)}), so that a "
            "copy made before is another model than one made after; use an implementation that does not"
        )


@contextmanager
def same_state(module: nn.Module) -> Iterator[None]:
    """As :func:`same_memory`; ModelError where the user's module changes weights as it runs.

    There is no second copy of them to give back. It is left as its own forward left it: with the attributes of before
    it would change the weights that are changed already once more.
    """
    give_back, changed = _remembered(module, ()), list[str]()
    try:
        with changed_tensors(module, buffers=False) as changed:
            yield
    finally:
        if not changed:
            give_back()
    if changed:
        raise ModelError(
            f"module: it changes its own weights when it runs ({some_of(changed, 3)}), so that a copy made before is "
            "another model than one made after; where it does so at the first call alone (as it has now done), run it "
            "once in eval mode, and pass it then"
        )


@contextmanager
def same_memory(module: nn.Module, without: Collection[str] = ()) -> Iterator[None]:
    """Afterwards the module's buffers and plain attributes are what they were before, but for those of the parts at the
    paths ``without`` and below.

    What counts its calls, keeps a running mean, or a weight that it has made of others, would hand that on to its
    copies: a candidate would begin from another state than the reference, or run with the reference's weights.
    """
    give_back = _remembered(module, without)
    try:
        yield
    finally:
        give_back()


def _remembered(module: nn.Module, without: Collection[str]) -> Callable[[], None]:
    """What makes the module's buffers and plain attributes again what they are now."""
    import torch

    below = tuple(f"{path}." for path in without)
    parts = [part for path, part in module.named_modules() if path not in without and not path.startswith(below)]
    buffers = [(part, dict(part._buffers)) for part in parts if part._buffers]
    plain = {id(b): (b, b.clone()) for _, held in buffers for b in held.values() if type(b) is torch.Tensor}
    own = [(part, _attributes(part)) for part in parts]
    values = [value for _, attributes in own for value in attributes.values()]
    lists = [(value, value.copy()) for value in values if type(value) is list]
    mappings = [(value, value.copy()) for value in values if type(value) is dict]

    def give_back() -> None:
        for part, held in buffers:
            part._buffers.update(held)
        for buffer, value in plain.values():
            if not buffer.is_meta and not torch.equal(buffer, value):
                buffer.copy_(value)
        for part, attributes in own:
            for name in _attributes(part).keys() - attributes.keys():
                del vars(part)[name]
            vars(part).update(attributes)
        for items, before in lists:
            items[:] = before
        for mapping, content in mappings:
            mapping.clear()
            mapping.update(content)

    return give_back


def _attributes(part: nn.Module) -> dict[str, object]:
    """What a part keeps beside its parameters, buffers, parts and hooks, and beside the note that it has hung these:
    without it transformers hangs them again at the next call, and records twice what it gives out."""
    import torch

    if isinstance(part, torch.jit.ScriptModule):
        return {}
    others = {*vars(torch.nn.Module()), _HOOKS_HUNG}
    return {name: value for name, value in vars(part).items() if name not in others}
