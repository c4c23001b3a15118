"""Where a candidate's layers come from: copied from the reference on the device, or streamed from its files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from quantlab.backends.scheme import Scheme
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
from quantlab.modules.memory import note_held
from quantlab.modules.residence import Prompts
from quantlab.modules.source import Source
from quantlab.modules.spread import KEY as SPREAD
from quantlab.modules.spread import Over
from quantlab.planning.job import Job
from quantlab.progress import Advance, say
from quantlab.running.choice import (
    ORDER,
    WHOLE,
    chosen,
    first_fitting,
    gib,
    least,
    most_on_device,
    needs,
    refusal,
    together,
)
from quantlab.running.room import modules_of, needed
from quantlab.stages.observe import made_by
from quantlab.stages.price import price_component
from quantlab.stages.select import QuantizationRequest
from quantlab.tracking.provenance import code_digest
from quantlab.vocabulary.amounts import GIB
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.reports import MemoryReport
from quantlab.vocabulary.schema import APART, ExperimentConfig, MemoryConfig, ModelConfig


def load_placed(
    config: ExperimentConfig, device: str, cache: Path, advance: Advance, jobs: Sequence[Job] = ()
) -> tuple[LoadedModel, str]:
    """The model on ``device``; or on the host, and the placement in which :func:`placed` lets it run.

    ``memory.placement=auto`` takes the first one with which each of ``jobs``, which share the model, keeps to
    ``memory.device_gib`` (without it: to what a GPU has free), as ``quantlab plan`` counts it.
    """
    settings, asked = config.memory, config.model_with()
    family = family_of(asked)
    budget = budget_of(settings, device)
    is_told = settings.device_gib is not None and kind_of(device) in ("cpu", "cuda")
    if is_told and budget is not None and budget["device_bytes"] > (there := total_bytes(device)):
        told = f"{device} has {there / GIB:.4g} GiB in all, and what has no room there ends the process"
        say(f"memory.device_gib={settings.device_gib:g}: {told}; give no more than that", "warning")
    is_chosen = settings.placement == "auto" and budget is not None
    if settings.placement not in APART and not (is_chosen and family.trained is None):
        model = _noted(family.load(asked, device, cache, advance))
        if is_chosen and budget is not None:
            _apart(model, jobs, config, budget, WHOLE[:1])
        return model, ""
    if settings.placement == "spread":
        spread_over(settings, device)  # what is wrong is told before the long work
    model = _noted(family.load(_as_on(asked, device, family.name), "cpu", cache, advance))
    if budget is None or not is_chosen:
        return model, settings.placement
    on_device = replace(model, device=device)
    where = _apart(on_device, jobs, config, budget, ORDER if _can_be_read_again(model) else WHOLE[:1])
    if where:
        return model, where
    for module in modules_of(model).values():
        module.to(device)
    return on_device, ""


def budget_of(settings: MemoryConfig, device: str) -> dict[str, int] | None:
    """``device_bytes`` and ``host_bytes`` that a run may use, the latter where it is said; None for a CPU of which
    nothing is said."""
    if settings.device_gib is None and kind_of(device) != "cuda":
        return None
    on_device = free_bytes(device) if settings.device_gib is None else int(settings.device_gib * GIB)
    on_host = {} if settings.host_gib is None else {"host_bytes": int(settings.host_gib * GIB)}
    return {"device_bytes": on_device, **on_host}


def available(model: LoadedModel, settings: MemoryConfig) -> dict[str, int] | None:
    """What a run may use of the device, with what the model holds there already; None as :func:`budget_of`."""
    budget = budget_of(settings, model.device)
    if budget is not None and settings.device_gib is None:
        kind, modules = kind_of(model.device), modules_of(model).values()
        budget["device_bytes"] += sum(
            num_bytes(m) for m in modules if any(p.device.type == kind for p in m.parameters())
        )
    return budget


def _apart(
    model: LoadedModel, jobs: Sequence[Job], config: ExperimentConfig, budget: Mapping[str, int], usable: Sequence[str]
) -> str:
    """The placement of a model that has no room whole, for all of its jobs; "" where it has. What is chosen is told."""
    found = needed(model, jobs, budget)
    if not found:
        return ""
    every = [{name: rows for name, rows in phases.items() if name in usable} for _, phases in found]
    names, on_device = together(every, budget), budget["device_bytes"]
    if names == WHOLE and "group_offload" in usable and max(map(num_bytes, modules_of(model).values())) > on_device:
        return "group_offload"  # its jobs want it whole, where it cannot be: each is refused
    where = "" if names == WHOLE else names[0]
    largest = max(every, key=lambda phases: min(map(most_on_device, phases.values())))
    tried = [phases for phases in every if not refusal(phases, config.memory)]
    if unfit := [phases for phases in tried if not first_fitting(phases, budget, names)]:
        worst = max(unfit, key=lambda phases: most_on_device(phases[least(phases)]))
        name = chosen(worst, budget, [n for n in names if n in worst] or ORDER)
        told = f"no placement has room: {needs(worst, name)}; give it more, or ask quantlab plan what would fit"
        say(f"{_typed(config, budget)}: {told}", "warning")
    elif where:
        before = ", ".join(f"{n} {gib(most_on_device(rows))}" for n, rows in largest.items() if n != where)
        room = f"has room in {on_device / GIB:.4g} GiB"
        say(f"{model.name}: run {_IN_WORDS[where]}, as nothing before it {room} ({before})")
    return where


_IN_WORDS = {"alone": "part by part", "group_offload": "group by group"}


def _typed(config: ExperimentConfig, budget: Mapping[str, int]) -> str:
    """The key by which a placement is chosen, and what it says."""
    said = config.memory.device_gib
    return f"memory.device_gib={said:g}" if said is not None else f"memory.device_gib={_free(budget)}"


def _free(budget: Mapping[str, int]) -> str:
    return f"null (free: {budget['device_bytes'] / GIB:.4g} GiB)"


@contextlib.contextmanager
def in_typed_words(memory: MemoryConfig) -> Iterator[None]:
    """Errors about a placement that nobody typed begin with the key that chose it."""
    try:
        yield
    except ConfigError as error:
        start, _, rest = str(error).partition(": ")
        if memory.placement != "auto" or not start.startswith("memory.placement="):
            raise
        said = "null" if memory.device_gib is None else f"{memory.device_gib:g}"
        name = start.partition("=")[2]
        raise type(error)(f"memory.device_gib={said}: chosen by it, {name}: {rest}, or give it more") from error


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
    return all(has_origin(module) for module in modules_of(model).values() if any(True for _ in module.parameters()))


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


def spread_as_said(memory: MemoryConfig, num: int) -> Over:
    """As :func:`spread_over`, of ``num`` devices elsewhere, of which ``memory.device_gib`` is all that is known."""
    return _over(memory, ("meta",) * num)


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

    ``memory.placement=auto`` copies, unless that would not keep to ``memory.device_gib`` (without it: to what a GPU has
    free), as ``quantlab plan`` counts it. Raises ConfigError where the budget does not hold the largest layer, or a
    copy that cannot be streamed instead.
    """
    settings, names = job.config.memory, [name for name, scheme in schemes.items() if scheme is not None]
    if not names or settings.placement == "resident":
        return None
    if settings.placement == "auto" and job.needs_data and "groups" not in model.parts:
        return None
    if settings.device_gib is not None:
        check_largest({name: model.components[name] for name in names}, settings.device_gib)
    origins: Mapping[str, Any] = model.parts.get("origins", {})
    if spread := model.parts.get("spread"):
        if job.needs_data or not all(name in origins for name in names):
            return None
        return lambda name: spread.streamed(name, source_of(origins[name], model.dtype, spread.devices[0]))
    if origins:
        is_copied = job.needs_data and "groups" not in model.parts
        return None if is_copied else lambda name: source_of(origins[name], model.dtype, model.device)
    if settings.placement == "auto" and not _is_streamed(model, job, names):
        return None
    return lambda name: component_source(
        name, model.components[name], model.dtype, model.device, job.config.model.variant
    )


def _is_streamed(model: LoadedModel, job: Job, names: Sequence[str]) -> bool:
    """Whether a candidate beside a model that is whole on the device is streamed, where nobody says; it is told."""
    budget = available(model, job.config.memory)
    if budget is None:
        return False
    held = sum(map(num_bytes, modules_of(model).values()))
    [(_, phases)] = needed(model, [job], budget) or [(job, {})]
    usable = [name for name in WHOLE if name in phases]
    copied = sum(num_bytes(model.components[name]) for name in names)
    if usable and all(has_origin(model.components[name]) for name in names):
        if chosen(phases, budget, usable) == "resident":
            return False
        say(f"{job.name}: streamed from its files, as {needs(phases, 'resident')}")
        return True
    if usable and held + copied > budget["device_bytes"]:
        raise ConfigError(
            f"{_typed(job.config, budget)}: a copy of {copied / GIB:.4g} GiB has no room beside the model of "
            f"{held / GIB:.4g} GiB, and {model.name} was not read from files of its own, from which the copy's layers "
            "would come one by one; give it more, or pass memory.placement=resident"
        )
    return False


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


def check_largest(modules: Mapping[str, Any], device_gib: float) -> None:
    """ConfigError for a component with a layer that alone is more than the device holds."""
    for name, module in modules.items():
        for path, part in module.named_modules():
            size = sum(p.nbytes for p in part._parameters.values() if p is not None)
            if size > int(device_gib * GIB):
                raise ConfigError(
                    f"memory.device_gib={device_gib:g}: {path} of {name} alone takes {size / GIB:.4g} GiB; "
                    "give it more, or another model"
                )
