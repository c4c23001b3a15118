"""Where a candidate's layers come from: copied from the reference on the device, or streamed from its files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import held_packages
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.models.part_by_part import placed_alone
from quantlab.models.reading import chosen_dtype
from quantlab.models.sources import component_source, source_of
from quantlab.models.table import family_of
from quantlab.modules.device import free_bytes, kind_of
from quantlab.modules.memory import storages
from quantlab.modules.residence import Prompts
from quantlab.modules.source import Source
from quantlab.planning.job import Job
from quantlab.progress import Advance, say
from quantlab.stages.observe import made_by
from quantlab.stages.price import price_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.reports import MemoryReport
from quantlab.vocabulary.schema import ExperimentConfig

GIB = 2**30


def load_placed(config: ExperimentConfig, device: str, cache: Path, advance: Advance) -> tuple[LoadedModel, bool]:
    """The model on ``device``; or on the host, and True, where it is to be run part by part (:func:`alone`).

    ``memory.placement=auto`` does so with a pipeline that is larger than ``memory.device_gib`` (without it: than what a
    GPU has free).
    """
    settings, asked = config.memory, config.model_with()
    family = family_of(asked)
    budget = int(settings.device_gib * GIB) if settings.device_gib is not None else None
    if budget is None and kind_of(device) == "cuda":
        budget = free_bytes(device)
    is_open = settings.placement == "auto" and family.name == "diffusers" and budget is not None
    if settings.placement != "alone" and not is_open:
        return family.load(asked, device, cache, advance), False
    dtype = chosen_dtype(asked, "bfloat16" if kind_of(device) == "cuda" else "float32")
    model = family.load(replace(asked, dtype=dtype), "cpu", cache, advance)
    pipe: Any = model.parts.get("pipeline")
    if not is_open or pipe is None:
        return model, True
    size = sum(sum(storages(m, ()).values()) for m in pipe.components.values() if hasattr(m, "named_parameters"))
    if budget is not None and size > budget:
        say(f"{model.name}: run part by part, as {size / GIB:.4g} GiB have no room in {budget / GIB:.4g} GiB")
        return model, True
    pipe.to(device)
    return replace(model, device=device), False


def alone(model: LoadedModel, config: ExperimentConfig, device: str, cache: Path) -> LoadedModel:
    """A pipeline that was loaded on the host, part by part on ``device``; its encoded prompts are kept in ``cache``.

    Raises ConfigError for a model that is no pipeline.
    """
    return placed_alone(model, device, config.model.variant, _prompts(model, device, cache))


def with_prompts(model: LoadedModel, cache: Path) -> LoadedModel:
    """The model; a pipeline, which stays where it is with all its parts, takes encoded prompts from ``cache`` as well.

    Its encoders stay, too: ``memory.placement=auto`` takes a pipeline apart that has no room.
    """
    if "pipeline" not in model.parts:
        return model
    found = replace(model, parts={**model.parts, "prompts": _prompts(model, model.device, cache)})
    vars(found)["identity"] = model.identity
    return found


def _prompts(model: LoadedModel, device: str, cache: Path) -> Prompts:
    said = canonical_json([dict(model.identity), model.dtype, made_by(replace(model, device=device))])
    return Prompts(folder=cache / "prompts", key=hashlib.sha256(said.encode()).hexdigest())


def source_for(model: LoadedModel, job: Job, schemes: Mapping[str, Scheme | None]) -> Callable[[str], Source] | None:
    """What a job's candidate is streamed from; None where it is copied.

    ``memory.placement=auto`` copies, unless ``memory.device_gib`` (without it: what a GPU has free) would not hold the
    copy beside the reference. Raises ConfigError where the budget does not hold the largest layer.
    """
    settings, names = job.config.memory, [name for name, scheme in schemes.items() if scheme is not None]
    if not names or settings.placement == "resident":
        return None
    if settings.placement == "auto" and job.needs_data:
        return None
    budget = None if settings.device_gib is None else int(settings.device_gib * GIB)
    if budget is not None:
        _check_layers(model, names, budget)
    origins: Mapping[str, Any] = model.parts.get("origins", {})
    if origins:
        return None if job.needs_data else lambda name: source_of(origins[name], model.dtype, model.device)
    if settings.placement == "auto":
        sizes = {name: sum(storages(part, held_packages()).values()) for name, part in model.components.items()}
        copied = sum(sizes[name] for name in names)
        room = free_bytes(model.device) if budget is None else budget - sum(sizes.values())
        if copied <= room or (budget is None and kind_of(model.device) == "cpu"):
            return None
        say(
            f"{job.name}: streamed from its files, as a copy of {copied / GIB:.4g} GiB has no room beside the reference"
        )
    return lambda name: component_source(
        name, model.components[name], model.dtype, model.device, job.config.model.variant
    )


def planned(model: LoadedModel, job: Job, schemes: Mapping[str, Scheme | None]) -> dict[str, MemoryReport]:
    """The ledger that each component with a scheme should have, from the reference's shapes."""
    found = {}
    for name, scheme in schemes.items():
        if scheme is None:
            continue
        asked = scheme.axes.compute_dtype
        request = QuantizationRequest(
            component=name,
            scheme=scheme,
            compute_dtype=model.dtype if asked == "auto" else asked,
            device=model.device,
            default_exclusions=model.default_exclusions.get(name, ()),
        )
        price = price_component(name, model.components[name], request)
        if not price.refused:
            found[name] = price.memory
    return found


def _check_layers(model: LoadedModel, names: Sequence[str], budget: int) -> None:
    for name in names:
        for path, part in model.components[name].named_modules():
            size = sum(p.nbytes for p in part._parameters.values() if p is not None)
            if size > budget:
                raise ConfigError(
                    f"memory.device_gib={budget / GIB:.4g}: {path} of {name} alone takes {size / GIB:.4g} GiB; "
                    "give it more, or another model"
                )
