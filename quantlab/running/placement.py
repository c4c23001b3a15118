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
from quantlab.models.architectures import read_architecture
from quantlab.models.loaded import LoadedModel
from quantlab.models.part_by_part import placed_alone, placed_by_groups, placed_spread
from quantlab.models.reading import HOLLOW, chosen_dtype
from quantlab.models.sources import component_source, has_origin, origin_of, source_of
from quantlab.models.stored_dtype import dtype_on
from quantlab.models.table import family_of
from quantlab.modules.device import free_bytes, kind_of, total_bytes
from quantlab.modules.groups import num_bytes
from quantlab.modules.memory import note_held, storages
from quantlab.modules.residence import Prompts
from quantlab.modules.source import Source
from quantlab.modules.spread import KEY as SPREAD
from quantlab.modules.spread import Over
from quantlab.planning.job import Job
from quantlab.planning.placing import by_itself
from quantlab.progress import Advance, say
from quantlab.stages.observe import made_by
from quantlab.stages.price import price_component
from quantlab.stages.select import QuantizationRequest
from quantlab.tracking.provenance import code_digest
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.reports import MemoryReport
from quantlab.vocabulary.schema import APART, ExperimentConfig, MemoryConfig, ModelConfig

GIB = 2**30


def load_placed(config: ExperimentConfig, device: str, cache: Path, advance: Advance) -> tuple[LoadedModel, str]:
    """The model on ``device``; or on the host, and the placement in which :func:`placed` lets it run.

    ``memory.placement=auto`` takes a pipeline part by part that is larger than ``memory.device_gib`` (without it: than
    what a GPU has free), and group by group what is larger in one part.
    """
    settings, asked = config.memory, config.model_with()
    family = family_of(asked)
    budget = int(settings.device_gib * GIB) if settings.device_gib is not None else None
    if budget is not None and kind_of(device) in ("cpu", "cuda") and budget > (there := total_bytes(device)):
        told = f"{device} has {there / GIB:.4g} GiB in all, and what has no room there ends the process"
        say(f"memory.device_gib={settings.device_gib:g}: {told}; give no more than that", "warning")
    if budget is None and kind_of(device) == "cuda":
        budget = free_bytes(device)
    is_open = settings.placement == "auto" and config.model.path is not None and budget is not None
    if settings.placement not in APART and not is_open:
        return _noted(family.load(asked, device, cache, advance)), ""
    if settings.placement == "spread":
        spread_over(settings, device)  # what is wrong is told before the long work
    model = _noted(family.load(_as_on(asked, device, family.name), "cpu", cache, advance))
    if not is_open or budget is None:
        return model, settings.placement
    pipe: Any = model.parts.get("pipeline")
    every = model.components if pipe is None else pipe.components
    sizes = {name: num_bytes(m) for name, m in every.items() if hasattr(m, "named_parameters")}
    room, whole = f"in {budget / GIB:.4g} GiB", sum(sizes.values())
    largest = max(sizes, key=lambda name: sizes[name])
    where = by_itself(sizes, budget, is_pipeline=pipe is not None, is_read_again=_can_be_read_again(model))
    if where == "group_offload":
        say(f"{model.name}: run group by group, as {largest} of {sizes[largest] / GIB:.4g} GiB has no room {room}")
    elif where:
        say(f"{model.name}: run part by part, as {whole / GIB:.4g} GiB have no room {room}")
    if where:
        return model, where
    for module in every.values():
        if hasattr(module, "named_parameters"):
            module.to(device)
    return replace(model, device=device), ""


def _noted(model: LoadedModel) -> LoadedModel:
    for module in model.components.values():
        note_held(module)
    return model


def hollow(config: ExperimentConfig, device: str, cache: Path, advance: Advance) -> LoadedModel:
    """The model without the values of its weights, which candidates are streamed from: for what only its shape, its
    tokenizer and what its files say are needed. Of a pipeline the parts come from their files when they are called.

    Raises ConfigError and ModelError, beginning with the key, for a model that is not read from safetensors files as it
    stands in them.
    """
    asked = config.model_with()
    family = family_of(asked)
    if asked.path is None or (asked.variant is not None and family.look is None):
        raise ConfigError(
            "model.path: it is not read from safetensors files of its own; pass memory.placement=resident"
        )
    model = family.load(_explicit(asked, device, family.name), HOLLOW, cache, advance)
    model = replace(model, device=device)
    if "pipeline" in model.parts:
        return placed_alone(model, device, asked.variant, _prompts(model, device, cache))
    origins = {name: origin_of(name, module, asked.variant) for name, module in model.components.items()}
    sources = {name: source_of(origin, model.dtype, device) for name, origin in origins.items()}
    for name, source in sources.items():
        if lacking := source.lacking():
            raise ConfigError(
                f"{source.shards.key}: {lacking[0]} of {name} stands otherwise in its files; pass "
                "memory.placement=resident"
            )
    components = {name: source.module for name, source in sources.items()}
    return replace(model, components=components, parts={**model.parts, "origins": origins})


def _explicit(asked: ModelConfig, device: str, family: str) -> ModelConfig:
    """The model in the dtype that it would have on ``device``, spelled out."""
    found = _as_on(asked, device, family)
    return replace(found, dtype="float32") if found.dtype == "auto" else found


def _as_on(asked: ModelConfig, device: str, family: str) -> ModelConfig:
    """The model in the dtype that it would have on ``device``: what is loaded on the host is asked for in float32."""
    if kind_of(device) != "cuda":
        return asked
    if family == "diffusers":
        return replace(asked, dtype=chosen_dtype(asked, "bfloat16"))
    if asked.dtype != "auto" or asked.path is None:
        return asked
    return replace(asked, dtype=dtype_on(asked, device, read_architecture(asked, "model").dtype))


def _can_be_read_again(model: LoadedModel) -> bool:
    """Whether its parts were read from files of their own, from which candidates are streamed."""
    return all(has_origin(module) for module in model.components.values())


def placed(model: LoadedModel, where: str, config: ExperimentConfig, device: str, cache: Path) -> LoadedModel:
    """A model as it is to run: part by part or group by group, or as it is; encoded prompts are kept in ``cache``.

    The encoders of a pipeline that stays where it is stay with it: ``memory.placement=auto`` takes one apart that has
    no room. Raises ConfigError for ``alone`` and a model that is no pipeline, and for ``spread`` where the devices, or
    the places where a model may be cut, do not allow it.
    """
    if where == "spread":
        over = spread_over(config.memory, device)
        return placed_spread(model, device, over, config.model.variant, _prompts(model, device, cache))
    if where == "alone":
        return placed_alone(model, device, config.model.variant, _prompts(model, device, cache))
    if where == "group_offload":
        return placed_by_groups(model, device, config.model.variant, _prompts(model, device, cache))
    if "pipeline" not in model.parts:
        return model
    found = replace(model, parts={**model.parts, "prompts": _prompts(model, model.device, cache)})
    vars(found)["identity"] = model.identity
    return found


def spread_over(memory: MemoryConfig, device: str) -> Over:
    """The devices of this node over which a model is spread, and what each may hold.

    Raises ConfigError where there are not as many, or where they are of several kinds, whose numbers differ.
    """
    if kind_of(device) == "cpu":
        if memory.devices is None:
            raise ConfigError(
                f"{SPREAD}: this run is on a CPU, which is one device; run it where CUDA devices are, or pass "
                "memory.devices=2 for a rehearsal in the CPU's own memory"
            )
        return _over(memory, ("cpu",) * memory.devices)
    import torch

    num = torch.cuda.device_count()
    if num < (memory.devices or 2):
        asked = SPREAD if memory.devices is None else f"memory.devices={memory.devices}"
        raise ConfigError(
            f"{asked}: this process sees {num} CUDA device{'' if num == 1 else 's'}; give it more "
            "(CUDA_VISIBLE_DEVICES, launcher.settings), or pass memory.placement=group_offload"
        )
    found = range(memory.devices or num)
    names = [torch.cuda.get_device_name(i) for i in found]
    if len(set(names)) > 1:
        raise ConfigError(
            f"{SPREAD}: the devices are {', '.join(names)}, whose numbers are not the same; choose those of one kind "
            "with CUDA_VISIBLE_DEVICES"
        )
    return _over(memory, tuple(f"cuda:{i}" for i in found))


def _over(memory: MemoryConfig, devices: tuple[str, ...]) -> Over:
    if memory.device_gib is not None:
        return Over(
            devices=devices, budget=int(memory.device_gib * GIB), said=f"memory.device_gib={memory.device_gib:g}"
        )
    free = min(map(free_bytes, devices)) if kind_of(devices[0]) == "cuda" else None
    return Over(devices=devices, budget=free, said="")


def _prompts(model: LoadedModel, device: str, cache: Path) -> Prompts:
    said = canonical_json([dict(model.identity), model.dtype, made_by(replace(model, device=device)), code_digest()])
    return Prompts(folder=cache / "prompts", key=hashlib.sha256(said.encode()).hexdigest())


def source_for(model: LoadedModel, job: Job, schemes: Mapping[str, Scheme | None]) -> Callable[[str], Source] | None:
    """What a job's candidate is streamed from; None where it is copied.

    ``memory.placement=auto`` copies, unless ``memory.device_gib`` (without it: what a GPU has free) would not hold the
    copy beside the reference. Raises ConfigError where the budget does not hold the largest layer.
    """
    settings, names = job.config.memory, [name for name, scheme in schemes.items() if scheme is not None]
    if not names or settings.placement == "resident":
        return None
    if settings.placement == "auto" and job.needs_data and "groups" not in model.parts:
        return None
    budget = None if settings.device_gib is None else int(settings.device_gib * GIB)
    if budget is not None:
        _check_layers(model, names, budget)
    origins: Mapping[str, Any] = model.parts.get("origins", {})
    if spread := model.parts.get("spread"):
        if job.needs_data or not all(name in origins for name in names):
            return None
        return lambda name: spread.streamed(name, source_of(origins[name], model.dtype, spread.devices[0]))
    if origins:
        is_copied = job.needs_data and "groups" not in model.parts
        return None if is_copied else lambda name: source_of(origins[name], model.dtype, model.device)
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


def planned(
    model: LoadedModel, job: Job, schemes: Mapping[str, Scheme | None], reads: Mapping[str, tuple[str, ...]]
) -> dict[str, MemoryReport]:
    """The ledger that each component with a scheme should have, from the reference's shapes and from which of its
    weights it was seen to read."""
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
            read=reads.get(name, ()),
        )
        module = model.components[name]
        if groups := model.parts.get("groups"):  # whose layers' own calls are not theirs
            module = groups.source(name, model.device).module
        price = price_component(name, module, request)
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
