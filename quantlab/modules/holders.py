"""Every holder of weights in a module: of which kind it is, and by which way a backend can store it.

A holder is a parameter with at least two dimensions: the weight of a layer, or a bare parameter of a part. Backends
replace an ``nn.Linear`` (and GPT-2's ``Conv1D``, which is one, transposed). What is read and not called (experts,
embeddings, convolutions, a layer whose weight a parent reads) is packed: see :mod:`quantlab.modules.packed`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quantlab.modules.hooks import adapter_parts, adapters
from quantlab.modules.layers import COMPUTED, is_plain, never_taken, own_work

if TYPE_CHECKING:
    from torch import Tensor, nn

REPLACE, TURN, PACK = "replace", "turn", "pack"
READ = "the part around it reads its weight, or runs its forward, instead of calling it"


@dataclass(frozen=True, kw_only=True, eq=False)
class Holder:
    """One parameter, and whose."""

    name: str
    """Path of the layer, for what is called ``weight``; else of the parameter."""
    owner: nn.Module
    parameter: str
    kind: str
    """``linear``, ``conv``, ``embedding``, ``expert``, ``recurrent``; ``parameter`` of any other part."""
    way: str
    """``replace`` by a backend's layer; ``turn``: into a plain ``nn.Linear`` before (of another class that does the
    same work, transposed or not); ``pack``; "" where none can be taken."""
    reason: str = ""
    """Why it is packed, or not taken at all."""
    view: View

    @property
    def weight(self) -> Tensor:
        """The parameter itself."""
        value = self.owner._parameters[self.parameter]
        assert value is not None
        return value

    @property
    def has_weight(self) -> bool:
        """False for a layer whose weight is computed from other parameters."""
        held = self.owner._parameters
        return self.parameter in held and held[self.parameter] is not None

    @property
    def owner_path(self) -> str:
        """Full path of the part whose parameter it is."""
        return self.name if self.parameter == "weight" else self.name.rpartition(".")[0]

    @property
    def path(self) -> str:
        """Full path of the parameter."""
        return f"{self.name}.{self.parameter}" if self.parameter == "weight" else self.name


@dataclass(frozen=True, kw_only=True)
class View:
    """A weight as the matrix (out_features, in_features) that backends store, and back."""

    shape: tuple[int, ...]
    num_row_dims: int = 1
    """Leading dimensions that are rows: all but the last of experts and bare parameters, one of other weights."""
    transposed: bool = False
    """The last dimension is that of the outputs (``Conv1D``, some experts)."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        shape = self._turned
        return math.prod(shape[: self.num_row_dims]), math.prod(shape[self.num_row_dims :])

    @property
    def _turned(self) -> tuple[int, ...]:
        return (*self.shape[:-2], self.shape[-1], self.shape[-2]) if self.transposed else self.shape

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as a matrix; a view of it where that is possible."""
        return (weight.transpose(-1, -2) if self.transposed else weight).reshape(self.matrix_shape)

    def weight(self, matrix: Tensor) -> Tensor:
        """The weight from its matrix."""
        found = matrix.reshape(self._turned)
        return found.transpose(-1, -2) if self.transposed else found


def holders(module: nn.Module, read: Collection[str] = ()) -> dict[str, Holder]:
    """Name -> holder of every weight below ``module``, in the order of its parts; a part at several paths once.

    ``read`` names layers whose weights something reads beside them. Left out are vectors (norms, biases); a weight that
    a parametrization computes stands for the tensors from which it does.
    """
    import torch
    from torch import nn

    found = {}
    in_adapter = {id(part): path for path, adapter in adapters(module).items() for part in adapter_parts(adapter)}
    reading = _known_readers(module)
    for path, part in module.named_modules():
        if "parametrizations" in path.split("."):
            continue
        adapter = in_adapter.get(id(part))
        left = f"a part of the adapter {adapter}" if adapter else never_taken(part)
        if isinstance(part, torch.jit.ScriptModule):
            left = "compiled by TorchScript, whose parts cannot be replaced"
        if left and isinstance(part, nn.Linear):
            view = View(shape=tuple(part.weight.shape))
            found[path] = Holder(
                name=path, owner=part, parameter="weight", kind="linear", way="", reason=left, view=view
            )
            continue
        for name in getattr(part, "parametrizations", ()):
            value, full = _computed(part, name), path if name == "weight" else f"{path}.{name}".lstrip(".")
            if path and _is_matrix(part, value):
                kind, view = _kind(part, name, value), View(shape=tuple(value.shape))
                found[full] = Holder(
                    name=full, owner=part, parameter=name, kind=kind, way="", reason=COMPUTED, view=view
                )
        for name, value in part._parameters.items():
            if value is None or not _is_matrix(part, value) or (name == "weight" and not path):
                continue
            full = path if name == "weight" else f"{path}.{name}".lstrip(".")
            found[full] = _holder(full, part, name, left, full in read or id(part) in reading)
    return found


def _computed(part: nn.Module, name: str) -> Tensor:
    """What a parametrization makes of its tensors, without changing them: spectral norm learns while it trains."""
    import torch

    made: Any = part.get_submodule("parametrizations").get_submodule(name)
    modes = {inner: inner.training for inner in made.modules()}
    with torch.no_grad():
        value: Tensor = made.eval()()
    for inner, mode in modes.items():
        inner.training = mode
    return value


def _is_matrix(part: nn.Module, value: Tensor) -> bool:
    """Not a vector, whatever its dimensions are; the weight of a Linear is never one."""
    from torch import nn

    return value.dim() == 2 and isinstance(part, nn.Linear) or sum(size > 1 for size in value.shape) > 1


def _holder(full: str, part: nn.Module, name: str, left: str, is_read: bool) -> Holder:
    weight = part._parameters[name]
    assert weight is not None
    kind = _kind(part, name, weight)
    transposed = is_conv1d(part) or (kind == "expert" and bool(getattr(part, "is_transposed", False)))
    rows = weight.dim() - 1 if kind in ("expert", "parameter") else 1
    view = View(shape=tuple(weight.shape), num_row_dims=rows, transposed=transposed)
    way, reason = _way(part, kind, is_read)
    if not weight.is_floating_point() or weight.element_size() < 2:
        left = f"of {str(weight.dtype).removeprefix('torch.')}, which no backend rounds"
    if left:
        way, reason = "", left
    return Holder(name=full, owner=part, parameter=name, kind=kind, way=way, reason=reason, view=view)


def _way(part: nn.Module, kind: str, is_read: bool) -> tuple[str, str]:
    from torch import nn

    if kind != "linear":
        return PACK, ""
    if is_read:
        return PACK, READ
    if isinstance(part, nn.Linear):
        if own := own_work(part):
            return PACK, own
        return (REPLACE if is_plain(part) else TURN), ""
    if is_conv1d(part):
        return TURN, ""
    return PACK, f"{type(part).__name__} reads its weight itself"


def _kind(part: nn.Module, name: str, weight: Tensor) -> str:
    from torch import nn

    if isinstance(part, (nn.Linear, nn.MultiheadAttention, nn.Bilinear)) or is_conv1d(part):
        return "linear" if weight.dim() == 2 and name.endswith("weight") else "parameter"
    if isinstance(part, nn.modules.conv._ConvNd):
        return "conv"
    if isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(part, (nn.RNNBase, nn.RNNCellBase)):
        return "recurrent"
    return "expert" if weight.dim() == 3 and weight.shape[0] > 1 else "parameter"


def is_conv1d(part: nn.Module) -> bool:
    """GPT-2's layer: a Linear whose weight lies transposed; transformers itself is not imported."""
    return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(part).__mro__)


def _known_readers(module: nn.Module) -> set[int]:
    """Layers whose weights torch's own parts read on their fast path."""
    from torch import nn

    found: set[int] = set()
    for part in module.modules():
        if isinstance(part, nn.MultiheadAttention):
            found |= {id(layer) for layer in part.modules()}
        elif isinstance(part, nn.TransformerEncoderLayer):
            found |= {id(part.linear1), id(part.linear2)}
    return found
