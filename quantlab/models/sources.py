"""The files that a loaded component came from, as a source that its candidates are streamed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError
from quantlab.models.architectures import Part, module_of
from quantlab.models.converted import as_loaded_by_name
from quantlab.models.outline import empty, is_of_transformers
from quantlab.models.reading import as_model_error
from quantlab.modules.memory import note_held
from quantlab.modules.source import Shards, Source, shards_of

if TYPE_CHECKING:
    from torch import nn

KEY = "memory.placement=streamed"


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a component was read from, and what it is."""

    key: str
    """With it messages begin."""
    folder: Path
    part: Part
    variant: str | None
    without: tuple[str, ...] = ()
    """Parts that the class has and this one does not: a pooler, where the files are those of another class."""


def origin_of(name: str, component: nn.Module, variant: str | None = None, key: str = KEY) -> Origin:
    """Where a component lies that Diffusers or transformers loaded.

    Raises ConfigError for one that was made otherwise, ModelError where its files are not here.
    """
    config: Any = getattr(component, "config", None)
    is_mapping = isinstance(config, Mapping)
    origin = _path_of(config)
    if not origin:
        raise ConfigError(
            f"{key}: {name} ({type(component).__name__}) was not read from files of its own; pass "
            "memory.placement=resident"
        )
    folder = Path(origin)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        with as_model_error(f"{key}: {name}", "pass memory.placement=resident"):
            folder = Path(snapshot_download(str(origin), local_files_only=True))
    said = dict(config) if is_mapping else config.to_dict()
    part = Part(class_name=type(component).__name__, module=module_of(type(component)), config=said)
    without = tuple(n for n, part in {**vars(component), **component._modules}.items() if part is None)
    return Origin(key=f"{key}: {folder.name}", folder=folder, part=part, variant=variant, without=without)


def has_origin(component: nn.Module) -> bool:
    """Whether Diffusers or transformers say where they loaded a component from."""
    return bool(_path_of(getattr(component, "config", None)))


def _path_of(config: Any) -> str | None:
    found = config.get("_name_or_path") if isinstance(config, Mapping) else getattr(config, "_name_or_path", None)
    return str(found) if found else None


def source_of(origin: Origin, dtype: str, device: str) -> Source:
    """The component's empty module, and its tensors. Raises ModelError where its files cannot be read."""
    module = empty(origin.key, origin.part, dtype)
    for name, _ in list(module.named_children()):
        if name in origin.without:
            setattr(module, name, None)
    shards = named_as_in(module, shards_of(origin.key, origin.folder, origin.variant))
    untie(module, shards)
    note_held(module)
    return Source(module=module, shards=shards, device=device)


def named_as_in(module: nn.Module, shards: Shards) -> Shards:
    """A component's tensors by the names that it has for them, also where its library loads them under others."""
    return as_loaded_by_name(module, shards) if is_of_transformers(module) else shards


def untie(module: nn.Module, shards: Shards) -> None:
    """Give each place of a weight its own where the files hold other values for it, in place: whatever the
    configuration says, transformers then ties nothing."""
    import torch

    places: dict[int, list[tuple[dict[str, Any], str, str]]] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        for name, tensor in part._parameters.items():
            if tensor is not None and (full := f"{path}.{name}".lstrip(".")) in shards:
                places.setdefault(id(tensor), []).append((part._parameters, name, full))
    for first, *others in places.values():
        for holder, name, full in others:
            like = holder[name]
            if not torch.equal(*(shards.tensor(n, like.dtype) for n in (first[2], full))):
                holder[name] = torch.nn.Parameter(torch.empty_like(like), requires_grad=False)


def component_source(name: str, component: nn.Module, dtype: str, device: str, variant: str | None = None) -> Source:
    """Where the tensors of a loaded component lie, and its empty module. Raises as :func:`origin_of`."""
    return source_of(origin_of(name, component, variant), dtype, device)
