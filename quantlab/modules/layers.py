"""Walking modules: which layers can be quantized, the one matcher of ``modules_to_not_convert``, digests, checks.

An entry of ``modules_to_not_convert`` is one of three things, on every backend:

module path
    ``blocks.0.attn.to_q`` is that layer; a container (``blocks.0``) takes everything below it. Paths are compared from
    the root and in whole components: ``blocks.0`` is not in ``single_blocks.0`` and not in ``blocks.01``.
glob
    an entry with ``*``, ``?`` or ``[``: matched case-sensitively against the layer's whole path and against each of its
    containers (which then take everything below). ``*`` runs over dots: ``*.attn`` is every ``attn`` at any depth.
regular expression
    ``re:`` and an expression that must match the layer's whole path (``re.fullmatch``): ``re:.*\\.to_[qk]``.
"""

from __future__ import annotations

import copy
import difflib
import fnmatch
import functools
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError, ModelError
from quantlab.modules.hooks import adapter_parts, adapters, computed_tensors, inherit
from quantlab.vocabulary.amounts import some_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_KEY = "modules_to_not_convert"
_PATIENCE_S = 2.0
_GLOB_CHARACTERS = frozenset("*?[")
COMPUTED = "computed from other parameters at each call (remove the parametrization or weight norm to have it taken)"
"""Why a weight that is no parameter is not taken."""


# -- layers


def linear_layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Full path -> layer of every ``nn.Linear`` below ``module`` that can be replaced by a quantized one.

    A layer that sits at several paths is listed once, at the first. Left out are the parts of ``nn.MultiheadAttention``
    (which reads their weights) and of PEFT's adapters, and what :func:`never_taken` and :func:`own_work` say.
    ``module`` itself is never listed: it has no parent to replace it in.
    """
    from torch import nn

    attentions = [part for part in module.modules() if isinstance(part, nn.MultiheadAttention)]
    left = {id(child) for part in attentions for child in part.modules()}
    left |= {id(part) for adapter in adapters(module).values() for part in adapter_parts(adapter)}
    return {
        name: layer
        for name, layer in module.named_modules()
        if name
        and isinstance(layer, nn.Linear)
        and id(layer) not in left
        and not (never_taken(layer) or own_work(layer))
    }


def places_of(module: nn.Module) -> dict[int, list[str]]:
    """``id`` of each part -> all paths at which it sits: looked for once, for many layers that are replaced."""
    found: dict[int, list[str]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        found.setdefault(id(part), []).append(path)
    return found


def replace_layer(
    module: nn.Module, name: str, new: nn.Module, places: Mapping[int, Sequence[str]] | None = None
) -> None:
    """Put ``new`` in the place of the layer at ``name``, at every other path of the same layer too.

    What calls the layer by another way than its path (from a list, a dictionary, a bound method) would go on running
    its unquantized weight: ``new`` answers there, too. Hooks and attributes that users set on the layer move to
    ``new``, see :func:`quantlab.modules.hooks.inherit`.
    ``places``: as :func:`places_of` found them in the module; for who replaces many layers, each of them once.
    """
    old = module.get_submodule(name)
    inherit(new, old)
    for path in (places_of(module) if places is None else places)[id(old)]:
        parent, _, leaf = path.rpartition(".")
        setattr(module.get_submodule(parent), leaf, new)
    old.__class__, old.__dict__ = _replaced_class(), {"new": new}


@functools.cache
def _replaced_class() -> type[nn.Module]:
    from torch import nn

    class Replaced(nn.Module):
        """What a layer is that another has taken the place of: all that is asked of it, the other answers."""

        new: nn.Module

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.new(*args, **kwargs)

        def __getattr__(self, name: str) -> Any:
            if name == "new":  # of a copy that is not filled yet
                raise AttributeError(name)
            return getattr(self.new, name)

    return Replaced


def never_taken(layer: nn.Module) -> str:
    """Why no backend may take this Linear, whatever reads or calls it: its weight is not only its own; "" else."""
    from torch import nn

    if not isinstance(layer, nn.Linear):
        return ""
    has_plain_bias = layer.bias is None or isinstance(layer._parameters.get("bias"), nn.Parameter)
    if (
        not isinstance(layer._parameters.get("weight"), nn.Parameter)
        or not has_plain_bias
        or hasattr(layer, "parametrizations")
    ):
        return COMPUTED
    if getattr(layer, "lora_layer", None) is not None:
        return "an active LoRA of its own (fuse it to have it taken)"
    return ""


def own_work(layer: nn.Linear) -> str:
    """What ``layer`` does that a quantized one in its place would not; "" for nothing.

    A class with a forward of its own does nothing else if it holds nothing else and gives on random inputs what
    ``nn.Linear`` gives (Falcon's).
    """
    return "" if is_plain(layer) or _does_as_linear(layer) else f"{type(layer).__name__} has a forward of its own"


def is_plain(layer: nn.Linear) -> bool:
    """Whether its forward is that of ``nn.Linear``."""
    from torch import nn

    return type(layer).forward is nn.Linear.forward or type(layer).__name__ == "LoRACompatibleLinear"


def _does_as_linear(layer: nn.Linear) -> bool:
    """Tried on a small copy, so that weights which are not here yet are judged alike."""
    import torch

    if {*layer._parameters, *layer._buffers, *layer._modules} - {"weight", "bias"}:
        return False
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(5, 7, generator=generator), torch.randn(5, generator=generator)
    small = copy.copy(layer)
    parameters = {"weight": torch.nn.Parameter(weight), "bias": torch.nn.Parameter(bias)}
    vars(small)["_parameters"] = {**parameters, **({} if layer.bias is not None else {"bias": None})}
    small.in_features, small.out_features = 7, 5
    inputs = torch.randn(2, 3, 7, generator=generator)
    try:
        with torch.no_grad():
            found = type(layer).forward(small, inputs)
            expected = torch.nn.functional.linear(inputs, weight, small.bias)
    except Exception:  # noqa: BLE001  the class's own code
        return False
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool(torch.allclose(found, expected, rtol=1e-5, atol=1e-5))


# -- the matcher


def matches(entry: str, name: str, key: str = _KEY) -> bool:
    """Whether ``entry`` of ``modules_to_not_convert`` takes the layer at path ``name`` (see the module's text).

    Raises ConfigError ``<key>=<entry>: ...`` for a regular expression that does not compile, or does not end.
    """
    if entry.startswith("re:"):
        return fits(entry.removeprefix("re:"), name, f"{key}={entry}")
    if not _GLOB_CHARACTERS.isdisjoint(entry):
        return any(fnmatch.fnmatchcase(path, entry) for path in _with_containers(name))
    return bool(entry) and (name == entry or name.startswith(entry + "."))


def resolve_exclusions(
    layer_names: Iterable[str],
    entries: Sequence[str],
    all_module_names: Iterable[str] = (),
    optional_entries: Sequence[str] = (),
    key: str | Callable[[str], str] = _KEY,
) -> dict[str, str]:
    """Layer -> the first entry that excludes it, for the layers that are excluded.

    Args:
        layer_names: paths of the layers that would be quantized (:func:`linear_layers`).
        entries: module paths, globs and ``re:`` expressions; each must match at least one layer.
        all_module_names: paths of all modules, to suggest from.
        optional_entries: those of ``entries`` that may match nothing (a model family's defaults).
        key: what the user typed them under; or of an entry what it was typed under.

    Raises ConfigError ``<key>=<entry>: ...`` for an entry that matches no layer, with what is near, and for a regular
    expression that does not compile.
    """
    layer_names = list(layer_names)
    excluded: dict[str, str] = {}
    for entry in dict.fromkeys(entries):
        typed = key if isinstance(key, str) else key(entry)
        taken = [name for name in layer_names if matches(entry, name, typed)]
        if not taken and entry not in optional_entries:
            raise ConfigError(_no_match(typed, entry, layer_names, list(all_module_names)))
        for name in taken:
            excluded.setdefault(name, entry)
    return excluded


def fits(expression: str, path: str, typed: str) -> bool:
    """Whether a regular expression, which may be a stranger's, matches the whole of a layer's path (``re.fullmatch``).

    ConfigError ``<typed>: ...`` for one that does not compile, or that tries so many ways that it does not end.
    """
    import regex

    try:
        return regex.fullmatch(re.compile(expression).pattern, path, timeout=_PATIENCE_S) is not None
    except re.error as error:
        raise ConfigError(
            f"{typed}: not a regular expression ({error}); a plain module path or a glob needs no re:"
        ) from error
    except TimeoutError as error:
        raise ConfigError(
            f"{typed}: does not end on the layer {path}; write it without repetitions in repetitions, or as a glob"
        ) from error


def _with_containers(name: str) -> Iterator[str]:
    yield name
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _no_match(key: str, entry: str, layers: list[str], modules: list[str]) -> str:
    text = f"{key}={entry}: matches none of the {len(layers)} layers that would be quantized"
    if any(matches(entry, name) for name in modules if name):
        text += " (only modules that are not quantized anyway)"
    globs = [g for g in _as_globs(entry) if any(matches(g, name) for name in layers)]
    if globs:
        return text + f"; {globs[0]} would match {sum(matches(globs[0], name) for name in layers)} of them"
    near = _nearest_paths(entry.removeprefix("re:"), sorted({*layers, *modules} - {""}))
    return text + (f"; near are {', '.join(near)}" if near else f"; the layers are {some_of(layers, 3) or 'none'}")


def _as_globs(entry: str) -> list[str]:
    if entry.startswith("re:") or not entry or not _GLOB_CHARACTERS.isdisjoint(entry):
        return []
    words = [entry, entry.removesuffix(".weight")]
    return [*(w for w in words[1:] if w != entry), *(f"*.{w}" for w in words)]


def _nearest_paths(entry: str, paths: list[str]) -> list[str]:
    near = difflib.get_close_matches(entry, paths)
    leaf_of = {path: path.rpartition(".")[2] for path in paths}
    leaves = difflib.get_close_matches(entry.rpartition(".")[2].lower(), sorted(set(leaf_of.values())))
    by_leaf = [path for leaf in leaves for path in paths if leaf_of[path] == leaf]
    return list(dict.fromkeys([*near, *by_leaf]))[:3]


# -- copies


def view_of(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with hooks and all, whose parameters and buffers are ``module``'s own memory.

    Whoever changes a layer of it in place calls :func:`own_tensors` first. Tensors of a subclass are copied.
    """
    import torch

    shared: dict[int, object] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        if type(tensor) is torch.nn.Parameter:
            shared[id(tensor)] = torch.nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
        elif type(tensor) is torch.Tensor:
            shared[id(tensor)] = tensor.detach()
    shared |= {id(tensor): tensor.detach() for tensor in computed_tensors(module)}
    return copy.deepcopy(module, shared)


def own_tensors(layer: nn.Module) -> None:
    """Give ``layer`` copies of its parameters and buffers."""
    import torch

    for name, parameter in layer._parameters.items():
        if parameter is not None:
            own = parameter.detach().clone()
            layer._parameters[name] = torch.nn.Parameter(own, requires_grad=parameter.requires_grad)
    for name, buffer in layer._buffers.items():
        if buffer is not None:
            layer._buffers[name] = buffer.detach().clone()


# -- digests and checks


def state_digest(state_dict: Mapping[str, object]) -> str:
    """``sha256:...`` over names, dtypes, shapes and bytes of a state dict, in name order.

    Tensor subclasses are digested as the tensors that they hold; values that are not tensors by their ``repr``.
    """
    digest = hashlib.sha256()
    for name in sorted(state_dict):  # one at a time: some are read when they are asked for
        for path, tensor in _flat_tensors(name, state_dict[name]):
            _digest_tensor(digest, path, tensor)
    return "sha256:" + digest.hexdigest()


def _flat_tensors(name: str, value: object) -> Iterator[tuple[str, object]]:
    import torch

    if isinstance(value, torch.Tensor) and hasattr(value, "__tensor_flatten__"):
        yield name, f"{type(value).__name__}|{value.dtype}|{tuple(value.shape)}"
        for inner in value.__tensor_flatten__()[0]:
            yield from _flat_tensors(f"{name}.{inner}", getattr(value, inner))
    else:
        yield name, value


def _digest_tensor(digest: hashlib._Hash, name: str, value: object) -> None:
    import torch

    if not isinstance(value, torch.Tensor):
        digest.update(f"{name}|{value!r}|".encode())
        return
    digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
    if value.numel():
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)


@contextmanager
def changed_tensors(module: nn.Module, *, buffers: bool = True) -> Iterator[list[str]]:
    """A list that is empty inside; afterwards it has the names of the parameters and buffers whose values changed.

    By the sum of each tensor's words, before and after: a change that leaves it as it is goes unseen.
    """
    before = _word_sums(module, buffers)
    changed: list[str] = []
    try:
        yield changed
    finally:
        after = _word_sums(module, buffers)
        changed += [name for name, found in after.items() if before.get(name) != found]


def _word_sums(module: nn.Module, buffers: bool) -> dict[str, int]:
    import torch

    def word_sum(tensor: Tensor) -> int:
        """Of words of 32 bits, which torch adds ten times as fast as bytes; of 64 bits, two changes of sign cancel."""
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        fits = not (data.numel() % 4 or data.storage_offset() % 4)
        return int((data.view(torch.int32) if fits else data).sum())

    named = [*module.named_parameters(), *(module.named_buffers() if buffers else ())]
    known = [(name, t) for name, t in named if t.layout == torch.strided and not hasattr(t, "__tensor_flatten__")]
    return {name: word_sum(t) for name, t in known if t.numel() and not t.is_meta}


def all_finite(values: Tensor) -> bool:
    """Whether a floating-point tensor of 16 bits or more holds neither NaN nor infinity.

    By its extremes, which are NaN where one value is: a fraction of the time of asking each value.
    """
    return not values.numel() or all(math.isfinite(end) for end in values.aminmax())


def check_finite_weights(module: nn.Module, what: str) -> None:
    """ModelError ``<what>: ...`` naming the first floating-point parameter with NaN or infinity, if there is one.

    ``what`` is what the user typed, as ``model.path=...``.
    """
    import torch

    for name, parameter in module.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta:
            continue
        values = parameter.detach()
        if values.element_size() == 1:  # isfinite is not written for 8-bit floats
            values = values.float()
        if not all_finite(values):
            num_bad = values.numel() - int(torch.isfinite(values).sum())
            raise ModelError(
                f"{what}: {num_bad} of {values.numel()} values of {name} are NaN or infinite; "
                "nothing measured on these weights would mean anything, use an intact checkpoint"
            )
