"""A model whose modules have their tensors only while they work, or whose layers are on the device only then.

Encoders, denoisers and autoencoder follow one another in a pipeline's call, so that the largest of them is all that the
device must hold.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantlab.backends.table import held_packages
from quantlab.errors import ConfigError
from quantlab.models.encoded_prompts import candidates_of
from quantlab.models.loaded import LoadedModel, Parts, Pipeline
from quantlab.models.sources import has_origin, origin_of, source_of
from quantlab.modules.groups import KEY as GROUPED
from quantlab.modules.groups import Groups
from quantlab.modules.residence import Prompts, Residence, part_by_part, says
from quantlab.modules.spread import KEY as SPREAD
from quantlab.modules.spread import Over, Spread, plan_map

if TYPE_CHECKING:
    from torch import nn

KEY = "memory.placement=alone"


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


def placed_by_groups(model: LoadedModel, device: str, variant: str | None, prompts: Prompts) -> LoadedModel:
    """A model that was loaded on the host, to be run on ``device`` group by group.

    Raises ConfigError, beginning with ``memory.placement=group_offload``, for one that was not read from files of its
    own, or of which a part cannot run so.
    """
    modules = _with_parameters(model)
    origins = {name: origin_of(name, module, variant, GROUPED) for name, module in modules.items()}
    groups = Groups(lambda name, where: source_of(origins[name], model.dtype, where), device)
    parts: Parts = {**model.parts, "origins": origins, "groups": groups}
    return _placed(model, device, modules, groups, parts, prompts)


def placed_spread(model: LoadedModel, device: str, over: Over, variant: str | None, prompts: Prompts) -> LoadedModel:
    """A model that was loaded on the host, to be run on several devices of the kind of ``device``.

    Raises ConfigError as :func:`quantlab.modules.spread.plan_map`.
    """
    modules = _with_parameters(model)
    origins = {name: origin_of(name, m, variant, SPREAD) for name, m in modules.items() if has_origin(m)}
    spread = Spread(plan_map(modules, len(over.devices), over.budget, over.said), over.devices)
    parts: Parts = {**model.parts, "origins": origins, "spread": spread}
    return _placed(model, device, modules, spread, parts, prompts)


def _with_parameters(model: LoadedModel) -> dict[str, nn.Module]:
    """A model's components, and of a pipeline its other parts, that have weights."""
    pipe: Any = model.parts.get("pipeline")
    every: dict[str, Any] = {**(pipe.components if pipe is not None else {}), **model.components}
    return {n: m for n, m in every.items() if hasattr(m, "named_parameters") and any(True for _ in m.parameters())}


def _placed(
    model: LoadedModel, device: str, modules: dict[str, nn.Module], by: Groups | Spread, parts: Parts, prompts: Prompts
) -> LoadedModel:
    identity = model.identity  # what was loaded is what it is
    for name, module in modules.items():
        by.place(name, module)
    if "pipeline" in parts:
        parts["prompts"] = prompts
    placed = replace(model, device=device, parts=parts)
    vars(placed)["identity"] = identity
    return placed


@contextlib.contextmanager
def run_part_by_part(pipe: Pipeline, model: LoadedModel, residence: Residence) -> Iterator[None]:
    """While open, a pipeline says where it runs, and its parts come and go: also those of a candidate, in whose place a
    decoder lies on the device."""
    says(pipe, residence.device, "device", "_execution_device")
    with residence.guests(candidates_of(model), held_packages()):
        try:
            yield
        finally:
            residence.leave()
