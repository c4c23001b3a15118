"""A model on the meta device: shapes, dtypes and ties as they will be once it is loaded, and no values."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from quantlab.errors import ModelError, first_line
from quantlab.models.architectures import Architecture, Part, class_of
from quantlab.models.reading import check_settings, frozen, quiet_loading, unreadable
from quantlab.modules.compute_dtype import cast, torch_dtype
from quantlab.modules.source import uninitialized

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

_M = TypeVar("_M", bound="nn.Module")


_SHORT = 2**24


@dataclass(frozen=True, kw_only=True)
class Outline:
    """What a family's model will be made of."""

    components: Mapping[str, nn.Module]
    """Every module that is loaded, on the meta device, those that are quantized first."""
    quantized: tuple[str, ...]
    """The components that a scheme is for."""
    dtype: str
    """Compute dtype of the reference."""
    denoiser: str = ""
    """Diffusion: the component that is called at each step."""
    default_exclusions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def empty(key: str, part: Part, dtype: str) -> nn.Module:
    """One component whose parameters are on the meta device and whose buffers have values: to be filled from its files.

    Raises ModelError as :func:`build` does.
    """
    return _built(key, part, dtype, is_filled=True)


def build(key: str, architecture: Architecture, dtype: str) -> dict[str, nn.Module]:
    """Component -> module on the meta device, as ``from_pretrained`` with ``dtype`` would make it.

    Raises ModelError, beginning with ``key``, for a configuration that cannot be built without values.
    """
    return {name: _built(f"{key} ({name})", part, dtype) for name, part in architecture.parts.items()}


def _built(key: str, part: Part, dtype: str, is_filled: bool = False) -> nn.Module:
    import diffusers
    from transformers.utils import logging

    made = class_of(part.class_name, part.module)
    if made is None:
        raise ModelError(f"{key}: the installed libraries have no class {part.class_name}; name another model")
    check_settings(key, f"the configuration of {part.class_name}", part.config)
    config = {k: v for k, v in part.config.items() if k not in ("quantization_config", "auto_map")}
    try:
        where = uninitialized() if is_filled else _without_values()
        with _default_dtype(torch_dtype(dtype)), where, quiet_loading(logging), _silent(logging):
            is_diffusers = issubclass(made, diffusers.ModelMixin)
            module = made.from_config(config) if is_diffusers else made(_config_in(made.config_class, config, dtype))
        if is_filled and is_of_transformers(module):
            _make_buffers_again(module)
        if hasattr(module, "tie_weights"):  # out there, where what is assigned is what is held
            module.tie_weights()
    except unreadable() as error:
        raise ModelError(
            f"{key}: {part.class_name} cannot be built from its configuration alone ({first_line(error)}); "
            "check that the installed library is the one that wrote it"
        ) from error
    return frozen(as_loaded(module, dtype))


def _config_in(kind: Any, said: Mapping[str, Any], dtype: str) -> Any:
    """A configuration of transformers, and those in it, by which parts are made in ``dtype``."""
    config = kind.from_dict(said)
    inner = [getattr(config, name, None) for name in config.sub_configs]
    for one in (config, *(found for found in inner if found is not None)):
        one.dtype = torch_dtype(dtype)
    return config


def _make_buffers_again(module: Any) -> None:
    """Give buffers that are in no checkpoint the values that transformers gives them: it makes the module without any,
    and then these in the dtype that is torch's own. Computed in 16 bit they are others (GPT-J's positions)."""
    in_files = {id(tensor) for tensor in module.state_dict(keep_vars=True).values()}
    for tensor in (*module.parameters(), *(b for b in module.buffers() if id(b) in in_files)):
        tensor._is_hf_initialized = True  # as transformers marks what it has loaded
    for part in module.modules():
        part._is_hf_initialized = False
    module.initialize_weights()


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _without_values() -> Iterator[None]:
    """Inside, tensors are made on the meta device, and nothing is computed of what would fill them: torch does that
    there operator by operator in Python, with a library of symbols beside it."""
    import torch
    from torch.overrides import TorchFunctionMode

    fills = {
        *(getattr(torch.nn.init, name) for name in ("uniform_", "normal_", "kaiming_uniform_")),
        *(getattr(torch.Tensor, name) for name in ("uniform_", "normal_")),
    }

    class Unfilled(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in fills and (tensor := args[0] if args else kwargs["tensor"]).is_meta:
                return tensor
            if func is torch.arange and "device" not in kwargs and _is_short(*args, *kwargs.values()):
                return torch.arange(*args, **kwargs, device="cpu").to("meta")
            return func(*args, **kwargs)

    with torch.device("meta"), Unfilled():
        yield


def _is_short(*words: object) -> bool:
    """Whether a range of these ends takes no memory to speak of."""
    return all(abs(word) < _SHORT for word in words if isinstance(word, (int, float)))


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """Without what a library tells of configurations."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def as_loaded(module: nn.Module, dtype: str) -> nn.Module:
    """The module, its tensors in the dtypes that ``from_pretrained(dtype=...)`` gives them; in place, ties kept.

    Diffusers keeps what ``_keep_in_fp32_modules`` of the class names in float32; transformers does so for float16, and
    for bfloat16 what ``_keep_in_fp32_modules_strict`` names, and leaves all else in the dtype in which the class makes
    it. Buffers that are in no checkpoint stay as they were made.
    """
    import torch

    target = None if is_of_transformers(module) else torch_dtype(dtype)
    changed: dict[int, tuple[Tensor, Tensor]] = {}  # with the old one: an id is only one's own while it lives
    kept = _kept_rule(module, dtype)
    for path, part in module.named_modules():
        for name, value in (*part._parameters.items(), *part._buffers.items()):
            if value is None or not value.is_floating_point() or name in part._non_persistent_buffers_set:
                continue
            wanted = torch.float32 if kept(f"{path}.{name}".lstrip(".")) else target or value.dtype
            if value.dtype == wanted:
                continue
            if id(value) not in changed:
                cast = value.detach().to(wanted)
                is_parameter = isinstance(value, torch.nn.Parameter)
                changed[id(value)] = torch.nn.Parameter(cast, requires_grad=False) if is_parameter else cast, value
            new = changed[id(value)][0]
            holder = part._parameters if name in part._parameters else part._buffers
            holder[name] = new
    return module


def cast_as_loaded(module: _M, dtype: str) -> _M:
    """The module in another dtype, in place: each tensor in that which ``from_pretrained(dtype=...)`` gives it.

    What transformers and Diffusers hold in float32 whatever is asked (positions that are in no checkpoint, some norms)
    is not rounded, in a model that is a part of another either. Of other modules every floating tensor is cast.
    """
    others: dict[str, torch.dtype] = {}
    inside: tuple[str, ...] = ()
    for path, part in module.named_modules():
        if not path.startswith(inside) and (found := _loaded_dtypes(part, dtype)):
            prefix = f"{path}." if path else ""
            inside = (*inside, prefix)
            others |= {f"{prefix}{name}": loaded for name, loaded in found.items()}
    cast(module, torch_dtype(dtype), others)
    return module


def _loaded_dtypes(module: Any, dtype: str) -> dict[str, torch.dtype]:
    """Path of a floating tensor -> the dtype that it is loaded in; none of what is no library's model that its settings
    alone build."""
    if not hasattr(getattr(module, "config", None), "to_dict") and not is_of_diffusers(module):
        return {}
    from transformers.utils import logging

    try:
        with _default_dtype(torch_dtype(dtype)), _without_values(), quiet_loading(logging), _silent(logging):
            if is_of_diffusers(module):
                twin = type(module).from_config(dict(module.config))
            else:
                twin = type(module)(_config_in(type(module.config), module.config.to_dict(), dtype))
    except unreadable():
        return {}
    as_loaded(twin, dtype)
    named = (*twin.named_parameters(remove_duplicate=False), *twin.named_buffers(remove_duplicate=False))
    return {path: tensor.dtype for path, tensor in named if tensor.is_floating_point()}


def _kept_rule(module: nn.Module, dtype: str) -> Any:
    """Path of a tensor -> whether loading keeps it in float32."""
    entries = set(_names(module, "_keep_in_fp32_modules_strict")) if dtype != "float32" else set()
    if not is_of_transformers(module):  # Diffusers' rule: a component of the path
        entries = set(_names(module, "_keep_in_fp32_modules"))
        return lambda path: not entries.isdisjoint(path.split("."))
    if dtype == "float16":
        entries |= set(_names(module, "_keep_in_fp32_modules"))
    patterns = [re.compile(rf"(?:^|\.){entry}(?:$|\.)") for entry in entries]
    return lambda path: any(p.search(path) for p in patterns)


def is_of_transformers(module: nn.Module) -> bool:
    """Whether it is a model of transformers; the others are of Diffusers."""
    return hasattr(module, "get_output_embeddings")


def is_of_diffusers(module: nn.Module) -> bool:
    """Whether Diffusers loads it, and not transformers."""
    return any(c.__module__.startswith("diffusers.") for c in type(module).__mro__) and hasattr(module, "from_config")


def _names(module: nn.Module, attribute: str) -> tuple[str, ...]:
    found = getattr(module, attribute, None) or ()
    return (found,) if isinstance(found, str) else tuple(found)
