"""Weights that several places of a model share, found by where they lie in memory.

Two places are tied where their tensors overlap, whatever objects hold them: one ``Parameter`` at two paths, two
``Parameter`` of one tensor, a transposed view. Quantizing one of them alone would store the weight twice, and untie it.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantlab.modules.holders import REPLACE, Holder
from quantlab.modules.hooks import computed_tensors
from quantlab.modules.layers import places_of, replace_layer
from quantlab.modules.memory import storage_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_OF_TORCH = frozenset({"_parameters", "_buffers", "_modules", "_flat_weights"})
_MAX_DEPTH = 4
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
    return copy.deepcopy(module, {**memo, **{id(t): t.detach().clone() for t in computed_tensors(module)}})


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


def ties(
    module: nn.Module, wanted: Sequence[Holder], may_pack: bool
) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """What ties mean for the holders that would be quantized, by their names.

    Returns:
        Layer -> the earlier one of ``wanted`` that does the same work with the same weight and bias (and has no hooks,
        as it has none): one quantized layer serves both. Holder -> the earlier one with the same weight, which both
        read (an embedding and the head), where weights ``may_pack``. And holder -> why its weight cannot be quantized:
        a place that is not quantized uses it.
    """
    tied, beside = tied_parameters(module), _kept_beside(module)
    by_path = {holder.path: holder for holder in wanted}
    same: dict[str, str] = {}
    packed: dict[str, str] = {}
    left: dict[str, str] = {}
    for holder in wanted:
        partners = tied.get(holder.path, ())
        group = [by_path[p] for p in (holder.path, *partners) if p in by_path]
        is_one_layer = all(h.way == REPLACE and _is_same(holder.owner, h.owner) for h in group)
        is_one_weight = may_pack and all(_same_tensor(holder.weight, h.weight) for h in group)
        strangers = [p for p in partners if p not in by_path]
        if not strangers and not is_one_layer and not is_one_weight:
            strangers = [h.path for h in group if h is not holder]
        strangers += [beside[id(h.weight)] for h in group if id(h.weight) in beside]
        if strangers:
            left[holder.name] = (
                f"its weight is also {strangers[0]}, which stays as it is: quantized here, it would be stored twice, "
                "and no longer be tied"
            )
        elif partners and (first := next(h for h in wanted if h in group)) is not holder:
            (same if is_one_layer else packed)[holder.name] = first.name
    return same, packed, left


def _kept_beside(module: nn.Module) -> dict[int, str]:
    """``id`` of a parameter -> the attribute in which a part keeps it beside its own (in a list, a partial): whoever
    multiplies by that would go on doing so. What torch's recurrent parts keep, packing sees to."""
    from torch import nn

    found: dict[int, str] = {}
    for path, part in module.named_modules():
        for name, value in vars(part).items():
            if name not in _OF_TORCH:
                kept = (t for t in _held_by(value) if isinstance(t, nn.Parameter))
                found |= {id(t): f"{path}.{name}".lstrip(".") for t in kept}
    return found


def _held_by(value: object, depth: int = 0) -> Iterator[object]:
    if isinstance(value, functools.partial):
        value = (*value.args, *value.keywords.values())
    elif isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list, set, frozenset)) and depth < _MAX_DEPTH:
        for inner in value:
            yield from _held_by(inner, depth + 1)
    else:
        yield value


def unite(module: nn.Module, same: Mapping[str, str]) -> None:
    """Put the one layer of :func:`ties` at the paths of the others, in place."""
    places = places_of(module)
    for name, first in same.items():
        replace_layer(module, name, module.get_submodule(first), places)


def _is_same(a: nn.Module, b: nn.Module) -> bool:
    """Whether one layer can stand for both."""
    hooks = [hook for part in (a, b) for kind in _HOOKS for hook in vars(part)[kind].values()]
    if type(a) is not type(b) or any(not getattr(hook, "only_moves", False) for hook in hooks):
        return False
    return all(_same_tensor(a._parameters.get(name), b._parameters.get(name)) for name in ("weight", "bias"))


def _same_tensor(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    lies = [(storage_of(t), t.storage_offset(), t.shape, t.stride(), t.dtype) for t in (a, b)]
    return lies[0] == lies[1]
