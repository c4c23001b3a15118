"""Which layers a model calls, and where its weights are: what an error says when a layer cannot be replaced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from quantlab.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn


def uncalled(module: nn.Module, layers: Sequence[str], run: Callable[[], object]) -> list[str]:
    """Those of ``layers`` that are never called while ``run`` runs the module: a part of it reads their weights."""
    called: set[str] = set()
    handles = [
        module.get_submodule(name).register_forward_pre_hook(lambda *_, name=name: called.add(name)) for name in layers
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return [name for name in layers if name not in called]


def check_weights_are_here(module: nn.Module, what: str) -> None:
    """ConfigError ``<what>: ...`` where weights have no values: offloaded by hooks, or never loaded (meta device)."""
    parameters = dict(module.named_parameters())
    absent = [name for name, parameter in parameters.items() if parameter.is_meta]
    if absent:
        raise ConfigError(
            f"{what}: {len(absent)} of {len(parameters)} weights have no values here ({absent[0]}: offloaded, or never "
            "loaded); load it whole onto one device, without device_map, offloading or init_empty_weights"
        )


def other_matrices(module: nn.Module, replaceable: Iterable[nn.Module]) -> str:
    """The layers with a weight matrix that are none of the ``replaceable`` ones: ``12 Conv1D``, or nothing."""
    from torch import nn

    known = {id(layer) for layer in replaceable}
    found: Counter[str] = Counter()
    for part in module.modules():
        weight = part._parameters.get("weight")
        if weight is not None and weight.dim() == 2 and id(part) not in known and not isinstance(part, nn.Embedding):
            found[type(part).__name__] += 1
    return " and ".join(f"{num} {name}" for name, num in found.most_common(3))
