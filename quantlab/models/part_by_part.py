"""A pipeline whose modules have their tensors only while they work, and whose prompts are encoded once.

Encoders, denoisers and autoencoder follow one another in a pipeline's call, so that the largest of them is all that the
device must hold. What a prompt was encoded to is kept on the disk, by all that it depends on.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel, Pipeline
from quantlab.models.sources import origin_of, source_of
from quantlab.modules.kept import SUFFIX, Damaged, read_tree, set_aside, write_tree
from quantlab.modules.residence import Prompts, Residence, part_by_part, says
from quantlab.modules.trees import replaced
from quantlab.vocabulary.native import canonical_json

if TYPE_CHECKING:
    from torch import nn

KEY = "memory.placement=alone"
_ENCODE = "encode_prompt"


def placed_alone(model: LoadedModel, device: str, variant: str | None, prompts: Prompts) -> LoadedModel:
    """A pipeline that was loaded on the host, to be run on ``device`` part by part.

    Raises ConfigError, beginning with ``memory.placement=alone``, for a model that is none or was not read from files.
    """
    pipe: Any = model.parts.get("pipeline")
    if pipe is None:
        raise ConfigError(f"{KEY}: {model.name} is one model and no pipeline of parts; pass memory.placement=streamed")
    origins = {}
    for name, module in pipe.components.items():
        if hasattr(module, "named_parameters") and any(True for _ in module.parameters()):
            origins[name] = origin_of(name, module, variant, KEY)
    sources = {name: source_of(origin, model.dtype, device) for name, origin in origins.items()}
    residence = part_by_part(sources, device)
    modules: dict[str, nn.Module] = {name: source.module for name, source in sources.items()}
    for name, module in modules.items():
        module.train(pipe.components[name].training)
        setattr(pipe, name, module)
    components = {name: modules.get(name, module) for name, module in model.components.items()}
    placed = replace(
        model,
        components=components,
        device=device,
        parts={**model.parts, "residence": residence, "prompts": prompts, "origins": origins},
    )
    vars(placed)["identity"] = model.identity  # what was loaded is what it is
    return placed


def run_part_by_part(pipe: Pipeline, model: LoadedModel, residence: Residence) -> None:
    """Let a pipeline say where it runs and take encoded prompts from the disk; encoders go when they have encoded some.

    Where an encoder is a candidate's each prompt is encoded by it.
    """
    says(pipe, residence.device, "device", "_execution_device")
    changed: Any = pipe
    others = set(model.components) - {*model.parts["denoisers"], "vae"}
    is_measured = any(model.components[n] is not residence.sources[n].module for n in others if n in residence.sources)
    prompts = None if is_measured else model.parts.get("prompts")
    own = getattr(changed, _ENCODE, None)
    if callable(own):
        setattr(changed, _ENCODE, functools.partial(_encoded, own, residence, prompts))


def _encoded(own: Callable[..., Any], residence: Residence, prompts: Prompts | None, *args: Any, **kwargs: Any) -> Any:
    said = None if prompts is None else _said([list(args), kwargs])
    if prompts is None or said is None:
        found = own(*args, **kwargs)
        residence.leave()
        return found
    digest = hashlib.sha256(f"{prompts.key}|{said}".encode()).hexdigest()[:32]
    file = prompts.folder / f"{digest}{SUFFIX}"
    if file.exists():
        try:
            return replaced(read_tree(file), lambda t: t.to(residence.device) if hasattr(t, "to") else None)
        except Damaged as error:
            set_aside(file, error)
    found = own(*args, **kwargs)
    residence.leave()
    prompts.folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(TypeError):  # of other things than tensors and plain values
        write_tree(found, file)
    return found


def _said(given: object) -> str | None:
    """What a call is given as text; None where something in it is not known by its value."""
    import torch

    def plain(value: object) -> object:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (torch.device, torch.dtype)):
            return str(value)
        if isinstance(value, torch.Tensor):
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            return [str(value.dtype), list(value.shape), hashlib.sha256(raw.numpy().data).hexdigest()]
        if isinstance(value, Mapping):
            return {str(k): plain(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        raise TypeError(type(value).__name__)

    try:
        return canonical_json(plain(given))
    except TypeError:
        return None
