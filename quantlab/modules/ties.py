"""Weights that several places of a model share, found by where they lie in memory.

Two places are tied where their tensors overlap, whatever objects hold them: one ``Parameter`` at two paths, two
``Parameter`` of one tensor, a transposed view. Quantizing one of them alone would store the weight twice, and untie it.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.modules.layers import replace_layer
from quantlab.modules.memory import storage_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def tied_parameters(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """Path of a parameter (``head.weight``) -> the paths of the others that lie, wholly or in part, in its memory.

    A module that sits at several paths counts once, at the first.
    """
    tied: dict[str, tuple[str, ...]] = {}
    for places in _by_storage(module):
        for place in places:
            others = tuple(p.path for p in places if p is not place and p.start < place.end and place.start < p.end)
            if others:
                tied[place.path] = others
    return tied


def copied(module: nn.Module) -> nn.Module:
    """A deep copy with the same ties: torch's own gives each Parameter memory of its own."""
    memo: dict[int, nn.Parameter] = {}
    tied = tied_parameters(module)
    for places in _by_storage(module):
        memo |= _copies([p for p in places if p.path in tied])
    return copy.deepcopy(module, memo)


@dataclass(frozen=True, kw_only=True)
class _Place:
    path: str
    parameter: nn.Parameter
    start: int
    """First value of the storage that it shows."""
    end: int
    """One behind its last."""


def _by_storage(module: nn.Module) -> list[list[_Place]]:
    """The parameters that are plain tensors with values, those of one storage together; alone ones are left out."""
    from torch import nn

    found: dict[object, list[_Place]] = defaultdict(list)
    for path, part in module.named_modules():
        for name, value in part._parameters.items():
            if type(value) is nn.Parameter and value.numel() and not hasattr(value.data, "__tensor_flatten__"):
                start = int(value.storage_offset())
                reach = int(sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True)))
                place = _Place(path=f"{path}.{name}".lstrip("."), parameter=value, start=start, end=start + reach + 1)
                found[storage_of(value), value.dtype].append(place)
    return [places for places in found.values() if len(places) > 1]


def _copies(places: Sequence[_Place]) -> dict[int, nn.Parameter]:
    """id of a parameter -> its copy, all in one new memory."""
    import torch

    different = {id(p.parameter) for p in places}
    if len(different) < 2 or places[0].parameter.is_meta:  # one object: deepcopy keeps it one
        return {}
    start, end, one = min(p.start for p in places), max(p.end for p in places), places[0].parameter.data
    memory = torch.empty(0, dtype=one.dtype, device=one.device).set_(one.untyped_storage(), start, (end - start,), (1,))
    memory = memory.clone()
    made = {}
    for place in places:
        old = place.parameter
        view = memory.as_strided(old.shape, old.stride(), place.start - start)
        made[id(old)] = torch.nn.Parameter(view, requires_grad=old.requires_grad)
    return made


def same_layers(module: nn.Module, names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """What ties mean for the layers at ``names``, which would be quantized.

    Returns:
        Layer -> the earlier one of ``names`` that does the same work with the same weight and bias (and has no hooks,
        as it has none): one quantized layer serves both. And layer -> why its weight cannot be quantized: another
        place that is not quantized uses it.
    """
    wanted, tied = list(names), tied_parameters(module)
    parts = {name: module.get_submodule(name) for name in wanted}
    one: dict[str, str] = {}
    left: dict[str, str] = {}
    for name, part in parts.items():
        partners = tied.get(f"{name}.weight", ())
        stranger = next((p for p in partners if not _is_same(part, parts.get(p.removesuffix(".weight")))), None)
        if stranger is not None:
            left[name] = (
                f"its weight is also {stranger}, which stays as it is: quantized here, it would be stored twice, and "
                "no longer be tied"
            )
        elif partners:
            group = {name, *(p.removesuffix(".weight") for p in partners)}
            first = next(n for n in wanted if n in group)
            if first != name:
                one[name] = first
    return one, left


def unite(module: nn.Module, same: Mapping[str, str]) -> None:
    """Put the one layer of :func:`same_layers` at the paths of the others, in place."""
    for name, first in same.items():
        replace_layer(module, name, module.get_submodule(first))


def _is_same(a: nn.Module, b: nn.Module | None) -> bool:
    """Whether one layer can stand for both."""
    if b is None or type(a) is not type(b) or any(vars(part)[hooks] for part in (a, b) for hooks in _HOOKS):
        return False
    return all(_same_tensor(a._parameters.get(name), b._parameters.get(name)) for name in ("weight", "bias"))


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    lies = [(storage_of(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return lies[0] == lies[1]
