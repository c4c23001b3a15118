"""Nested tuples, lists, mappings and data classes of tensors and plain values: what a module's forward takes and
returns."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Batch = Any
"""A tensor; a tuple or list of positional arguments; a mapping of named ones; or a pair (tuple, mapping) of both."""


def arguments_of(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a batch is in a call: positional and named arguments."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (list, tuple)) and len(batch) == 2:
        args, kwargs = batch
        if isinstance(args, (list, tuple)) and isinstance(kwargs, Mapping):
            return tuple(args), dict(kwargs)
    return tuple(batch) if isinstance(batch, (list, tuple)) else (batch,), {}


def replaced(tree: Any, change: Callable[[Any], Any]) -> Any:
    """``tree`` with every value for which ``change`` returns something replaced by that."""
    changed = change(tree)
    if changed is not None:
        return changed
    if isinstance(tree, Mapping):
        return {k: replaced(v, change) for k, v in tree.items()}
    if not isinstance(tree, (list, tuple)):
        return tree
    items = [replaced(v, change) for v in tree]
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)  # a named tuple takes them one by one


def in_order(tensor: Tensor) -> Tensor:
    """The tensor contiguous, with the strides of its shape: one value that was expanded has a stride of 0 and counts as
    contiguous, but its bytes cannot be looked at."""
    import torch

    plain = tensor.contiguous()
    return plain.clone(memory_format=torch.contiguous_format) if 0 in plain.stride() else plain


def tensors_in(tree: object) -> list[Tensor]:
    """The tensors of ``tree``, in order."""
    import torch

    if isinstance(tree, torch.Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [t for item in items for t in tensors_in(item)]


def leaves_in(tree: object) -> list[Any]:
    """The tensors and all other values of ``tree``, in order."""
    if not isinstance(tree, (Mapping, list, tuple)):
        return [tree]
    items = tree.values() if isinstance(tree, Mapping) else tree
    return [leaf for item in items for leaf in leaves_in(item)]


def digest_of(leaves: Iterable[object]) -> str:
    """By the values of tensors and of what is plain; what else there is, is the same where it is one object."""
    import torch

    digest = hashlib.sha256()
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            add_to_digest(digest, leaf)
        else:
            is_plain = leaf is None or isinstance(leaf, (bool, int, float, str))
            digest.update(f"{leaf!r}|".encode() if is_plain else f"{id(leaf)}|".encode())
    return digest.hexdigest()


def named_tensors(tree: object, name: str = "") -> dict[str, Tensor]:
    """The tensors of ``tree`` by their place in it: ``logits``, ``hidden_states.3``; "" for one that stands alone."""
    import torch

    if isinstance(tree, torch.Tensor):
        return {name: tree}
    if is_dataclass(tree) and not isinstance(tree, (type, Mapping)):  # the outputs of transformers are mappings, too
        tree = {field.name: getattr(tree, field.name) for field in fields(tree)}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, (list, tuple)) else ()
    return {n: t for key, item in items for n, t in named_tensors(item, f"{name}.{key}".lstrip(".")).items()}


def add_to_digest(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Dtype, shape and values, as float32, of a tensor of the user's."""
    import torch

    digest.update(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    tensor = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    digest.update(tensor.detach().cpu().contiguous().float().numpy().tobytes())
