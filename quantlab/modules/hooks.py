"""What users and other libraries hang on a layer: what moves with it, what stays around it, and what cannot be kept.

One rule for all backends, whether they replace a layer or change it in place:

* forward, forward pre- and backward hooks move to the quantized layer, where they see inputs and outputs in the dtypes
  and the order in which they saw them before, and their handles go on removing them; so do attributes, buffers and
  submodules that were set on the layer;
* a PEFT adapter (Diffusers' LoRA is one) stays as it is around its quantized base layer;
* a forward that was set on the instance, and offloading, which is made of such forwards, are refused by name: nobody
  can tell what of them holds for another layer.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from quantlab.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

_BEFORE = ("_forward_pre_hooks", "_backward_pre_hooks")
_AFTER = ("_forward_hooks", "_backward_hooks")
_FLAGS = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_REPLACED = ("weight", "bias")
_MAX_DEPTH = 6
"""How far a function is followed: libraries put a few wrappers around one another."""
_FORWARDS = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")


# -- what moves


def inherit(new: nn.Module, old: nn.Module) -> None:
    """Give ``new`` the hooks of ``old``, around its own, and what else was set on it.

    The dictionaries of hooks are those of ``old`` from then on, so that the handles which users hold stay valid.
    """
    for key in (*_BEFORE, *_AFTER, *_FLAGS):
        theirs, own = vars(old)[key], vars(new)[key]
        merged = {**theirs, **own} if key in _BEFORE else {**own, **theirs}
        theirs.clear()
        theirs.update(merged)
        vars(new)[key] = theirs
    if vars(new)["_is_full_backward_hook"] is None:
        vars(new)["_is_full_backward_hook"] = vars(old)["_is_full_backward_hook"]
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(old)[kind].items():
            if name not in _REPLACED and not hasattr(new, name):
                vars(new)[kind][name] = value
    new._non_persistent_buffers_set |= old._non_persistent_buffers_set & set(vars(new)["_buffers"])
    for name, value in vars(old).items():
        if name not in (*_REPLACED, *_FORWARDS) and not hasattr(new, name):
            vars(new)[name] = value


@contextlib.contextmanager
def without_hooks_of(layer: nn.Module, original: nn.Module) -> Iterator[None]:
    """While open, ``layer`` runs without the forward hooks that it has from ``original``; those of its own stay."""
    keys = ("_forward_pre_hooks", "_forward_hooks")
    kept = {key: vars(layer)[key] for key in keys}
    for key, hooks in kept.items():
        vars(layer)[key] = OrderedDict((i, hook) for i, hook in hooks.items() if i not in vars(original)[key])
    try:
        yield
    finally:
        vars(layer).update(kept)


# -- what stays around


def adapters(module: nn.Module) -> dict[str, nn.Module]:
    """Full path -> layer of every adapter of PEFT in ``module``; PEFT itself is not imported."""
    return {name: part for name, part in module.named_modules() if _is_of(part, "peft", "BaseTunerLayer")}


def adapter_parts(adapter: nn.Module) -> Iterator[nn.Module]:
    """The modules of an adapter that are not in the layer which it adapts."""
    for name, child in adapter.named_children():
        if name != "base_layer":
            yield from child.modules()


def before_adapters(module: nn.Module, paths: Iterable[str]) -> dict[str, str]:
    """The path that a layer had before adapters were put around it -> its path now, for ``paths`` of now."""
    around, found = adapters(module), {}
    for path in paths:
        names = path.split(".")
        added = [i for i, name in enumerate(names) if name == "base_layer" and ".".join(names[:i]) in around]
        found[".".join(name for i, name in enumerate(names) if i not in added)] = path
    return found


def _is_of(thing: object, package: str, name: str) -> bool:
    """Whether ``thing`` is of the class ``name`` of a package, which need not be installed."""
    return any(c.__name__ == name and c.__module__.partition(".")[0] == package for c in type(thing).__mro__)


# -- what cannot be kept


def check_offloading(module: nn.Module, key: str) -> None:
    """ModelError ``<key>: ...`` naming a part of ``module`` whose weights come and go."""
    for name, part in module.named_modules():
        if _is_offloaded(part):
            raise ModelError(
                f"{key}: the weights of {name or 'the module'} ({type(part).__name__}) come and go with each call "
                "(offloading), and would go on coming unquantized; load the model without offloading, or take it off "
                "first (accelerate: remove_hook_from_submodules, Diffusers: remove_all_hooks)"
            )


def check_forwards(module: nn.Module, layers: Iterable[str], key: str) -> None:
    """ModelError ``<key>: ...`` naming a layer that would not do its own work once it is quantized.

    These are layers with a forward that was set on the instance, adapters that look at the weight which they adapt
    (DoRA), and containers whose own forward belongs to other modules (a copy's often are those of the original).
    """
    parts, taken = dict(module.named_modules()), list(layers)
    for name in taken:
        if "forward" in vars(parts[name]):
            raise ModelError(
                f"{key}: {name} has a forward that was set on the instance ({_whose(parts[name])}), and a quantized "
                f"layer would not run it; {_undo(parts[name])}, or exclude the layer with modules_to_not_convert"
            )
    known = {id(part) for part in parts.values()}
    above = {"", *(parent for name in taken for parent in _parents(name))} if taken else set()
    for name, part in parts.items():
        if "forward" not in vars(part):
            continue
        if "_diffusers_hook" not in vars(part) and name not in above:
            continue  # it runs the same weights as its copy would
        if any(id(used) not in known for used in _modules_of(vars(part)["forward"])):
            raise ModelError(
                f"{key}: {name or 'the module'} has a forward that was set on the instance and runs modules outside of "
                "the copy that is quantized; make it a method of the class, or take it off"
            )
    for name, adapter in adapters(module).items():
        if f"{name}.base_layer" in taken and _looks_at_the_weight(adapter):
            raise ModelError(
                f"{key}: the adapter {name} ({type(adapter).__module__}) looks at the weight of its base layer, not "
                "only at its output, and would find a quantized one's codes; merge the adapter, or exclude the layer "
                "with modules_to_not_convert"
            )


def _is_offloaded(part: nn.Module) -> bool:
    hook = vars(part).get("_hf_hook")
    hooks = [*getattr(hook, "hooks", ()), hook]
    if any(getattr(h, "offload", False) is True or _is_of(h, "accelerate", "CpuOffload") for h in hooks):
        return True
    registry = getattr(vars(part).get("_diffusers_hook"), "hooks", {})
    return any("offload" in str(name) for name in registry)


def _whose(layer: nn.Module) -> str:
    if "_hf_hook" in vars(layer):
        return f"accelerate's {type(layer._hf_hook).__name__}"
    if "_diffusers_hook" in vars(layer):
        return f"Diffusers' {', '.join(map(str, getattr(layer._diffusers_hook, 'hooks', ())))}"
    forward: Any = vars(layer)["forward"]
    return getattr(forward, "__qualname__", type(forward).__name__)


def _undo(layer: nn.Module) -> str:
    if "_hf_hook" in vars(layer):
        return "take it off with accelerate.hooks.remove_hook_from_module"
    if "_diffusers_hook" in vars(layer):
        return "take it off (a Diffusers hook of this name was enabled)"
    return "make it a forward hook or a class of its own"


def _modules_of(forward: object, depth: int = 0) -> Iterator[nn.Module]:
    """The modules that a function is bound to: as its self, its arguments, or variables of where it was written."""
    from torch import nn

    if isinstance(forward, nn.Module):
        yield forward
        return
    if forward is None or depth > _MAX_DEPTH:
        return
    held = [getattr(forward, "__self__", None), getattr(forward, "func", None), *getattr(forward, "args", ())]
    held += [cell.cell_contents for cell in getattr(forward, "__closure__", None) or ()]
    held += list(getattr(forward, "__dict__", {}).values())
    for value in held:
        yield from _modules_of(value, depth + 1)


def _looks_at_the_weight(adapter: nn.Module) -> bool:
    """Whether the adapter's forward asks its base layer for more than its output, by running it around a stand-in."""
    import torch

    base: Any = adapter.base_layer

    class OutputOnly(torch.nn.Module):
        in_features, out_features = base.in_features, base.out_features

        def forward(self, x: Tensor) -> Tensor:
            return x.new_zeros(*x.shape[:-1], self.out_features)

    weight = base.weight
    adapter.base_layer = OutputOnly()
    try:
        with torch.no_grad():
            adapter.forward(torch.zeros(1, base.in_features, dtype=weight.dtype, device=weight.device))
    except AttributeError:
        return True
    finally:
        adapter.base_layer = base
    return False


def computed_tensors(module: nn.Module) -> Iterator[Tensor]:
    """What modules hold that they compute anew at each call, as ``weight_norm`` does: torch copies none of a graph."""
    import torch

    for one in module.modules():
        yield from (t for t in vars(one).values() if isinstance(t, torch.Tensor) and t.grad_fn is not None)


def _parents(path: str) -> Iterator[str]:
    """Paths of the parts that hold the part at ``path``, the nearest first."""
    while "." in path:
        path = path.rpartition(".")[0]
        yield path
