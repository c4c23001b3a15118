"""A weight that is kept in a backend's codes and dequantized whenever it is read.

Some weights are never in a layer that is called: experts are rows of one parameter, an embedding is looked up, a parent
multiplies by ``self.proj.weight`` itself. Such a holder keeps its class and its forward; in the place of its parameter
stands a layer of the backend, out of sight, and a property that gives the dequantized tensor. Whoever reads the weight
gets values. While the holder's own forward runs, the tensor is made once.

The layer is at ``holder.packed.weight`` (or the parameter's name), in module paths and in a state dict.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from quantlab.modules.compute_dtype import torch_dtype
from quantlab.modules.holders import Holder, View
from quantlab.modules.layers import replace_layer
from quantlab.vocabulary.dtypes import dtype_name

if TYPE_CHECKING:
    from torch import Tensor, nn

_FOLDER = "packed"
_FLAT = "_flat_weights"
"""Where ``nn.RNNBase`` has its weights in a list, which is what its forward multiplies by."""
Read = Callable[["nn.Module"], "Tensor"]
"""Gives the matrix of a quantized layer, in float32."""


@functools.cache
def _folder_class() -> type[nn.ModuleDict]:
    import torch

    class PackedWeights(torch.nn.ModuleDict):
        """Parameter's name -> the layer in which it is stored as a matrix."""

        views: dict[str, View]
        dtypes: dict[str, str]
        readers: dict[str, Read]
        made: dict[str, Tensor]
        depth: int

    return PackedWeights


def pack(holder: Holder) -> None:
    """Let the holder's parameter be read through a Linear of the same weight, which a backend can then replace."""
    import torch

    owner, name = holder.owner, holder.parameter
    rows, columns = holder.view.matrix_shape
    layer = torch.nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = torch.nn.Parameter(holder.view.matrix(holder.weight.detach()), requires_grad=False)
    _install(owner, name, layer.train(owner.training), holder.view, dtype_name(holder.weight.dtype))


def share(holder: Holder, first: Holder) -> None:
    """Let the holder's parameter be read through the layer that ``first`` was packed into."""
    theirs: Any = first.owner._modules[_FOLDER]
    layer = theirs[first.parameter]
    _install(holder.owner, holder.parameter, layer, holder.view, theirs.dtypes[first.parameter])


def turn(module: nn.Module, holder: Holder) -> None:
    """Put a plain Linear with the same weight in the place of a layer that does its work (GPT-2's ``Conv1D``)."""
    import torch

    old = holder.owner
    rows, columns = holder.view.matrix_shape
    layer = torch.nn.Linear(columns, rows, device="meta")
    layer.weight = torch.nn.Parameter(holder.view.matrix(holder.weight.detach()).contiguous(), requires_grad=False)
    layer._parameters["bias"] = old._parameters.get("bias")
    replace_layer(module, holder.name, layer.train(old.training))


def stored_at(module: nn.Module, name: str) -> str:
    """Path of the layer in which the holder ``name`` is stored: its own, or the one that it was packed into."""
    head, _, leaf = name.rpartition(".")
    for owner, parameter in ((name, "weight"), (head, leaf)):
        part = _part(module, owner)
        folder = part._modules.get(_FOLDER) if part is not None else None
        if isinstance(folder, _folder_class()) and parameter in folder:
            return f"{owner}.{_FOLDER}.{parameter}".lstrip(".")
    return name


def said_as(path: str) -> str:
    """Path of the holder that is stored at ``path``, the inverse of :func:`stored_at`."""
    owner, folder, parameter = path.rpartition(f".{_FOLDER}.")
    if not folder and path.startswith(f"{_FOLDER}."):
        parameter, folder = path.removeprefix(f"{_FOLDER}."), _FOLDER
    if not folder or "." in parameter:
        return path
    return owner if parameter == "weight" else f"{owner}.{parameter}".lstrip(".")


def read_by(module: nn.Module, path: str, read: Read) -> None:
    """From now on the packed layer at ``path`` is read by ``read``; nothing for a layer that was not packed."""
    head, _, parameter = path.rpartition(".")
    folder: Any = _part(module, head)
    if isinstance(folder, _folder_class()):
        wanted = folder[parameter]
        others: list[Any] = [part for part in module.modules() if isinstance(part, _folder_class())]
        for other in others:
            if wanted in other.values():
                other.readers.update({n: read for n, layer in other.items() if layer is wanted})


def _part(module: nn.Module, path: str) -> nn.Module | None:
    for name in path.split(".") if path else ():
        inner = module._modules.get(name)
        if inner is None:
            return None
        module = inner
    return module


def _install(owner: nn.Module, name: str, layer: nn.Module, view: View, dtype: str) -> None:
    folder: Any = owner._modules.get(_FOLDER)
    if folder is None:
        folder = _folder_class()()
        folder.views, folder.dtypes, folder.readers, folder.made, folder.depth = {}, {}, {}, {}, 0
        owner.add_module(_FOLDER, folder)
    del owner._parameters[name]
    vars(owner).pop(_FLAT, None)  # a recurrent part's own list, which would keep the weight
    folder[name] = layer
    folder.views[name], folder.dtypes[name] = view, dtype
    base: Any = getattr(type(owner), "_quantlab_base", type(owner))
    owner.__class__ = _reading_class(base, frozenset(folder.views))


def _dense(owner: Any, name: str) -> Tensor:
    folder = owner._modules[_FOLDER]
    if name in folder.made:
        made: Tensor = folder.made[name]
        return made
    layer = folder[name]
    matrix = folder.readers[name](layer) if name in folder.readers else layer.weight.detach()
    value = folder.views[name].weight(matrix.to(torch_dtype(folder.dtypes[name])))
    if folder.depth:
        folder.made[name] = value
    return value


def _ignored(_: object, __: object) -> None:
    """What a recurrent part would remember of its weights: they are made anew whenever they are read."""


@functools.cache
def _reading_class(base: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """``base`` with properties in the place of parameters."""
    forward: Any = base.forward

    @functools.wraps(forward)
    def running(self: Any, *args: Any, **kwargs: Any) -> Any:
        folder = self._modules[_FOLDER]
        folder.depth += 1
        try:
            return forward(self, *args, **kwargs)
        finally:
            folder.depth -= 1
            if not folder.depth:
                folder.made.clear()

    held = {name: property(functools.partial(_dense, name=name)) for name in names}
    if hasattr(base, "_init_flat_weights"):
        held[_FLAT] = property(lambda self: [getattr(self, name) for name in self._flat_weights_names], _ignored)
    made = type(base.__name__, (base,), {**held, "forward": running, "_quantlab_base": base})
    made.__module__, made.__qualname__ = base.__module__, base.__qualname__
    return made
