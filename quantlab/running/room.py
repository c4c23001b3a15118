"""What jobs on a loaded model need in each placement: priced as their plan is, where there is not plenty of room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from quantlab.backends.table import offers
from quantlab.models.loaded import LoadedModel
from quantlab.models.outline import Outline
from quantlab.modules.device import free_bytes
from quantlab.modules.groups import num_bytes
from quantlab.modules.twin import on_meta
from quantlab.planning.job import Job
from quantlab.running.choice import ORDER, WHOLE, Phases, gib, refusal
from quantlab.running.floor_room import floors_of, left_out
from quantlab.running.forecast import Book, phases_of_each, phases_of_floors
from quantlab.running.phases import activations
from quantlab.vocabulary.amounts import GIB
from quantlab.vocabulary.numbers import FLOOR_FP32
from quantlab.vocabulary.schema import ExperimentConfig, MemoryConfig

if TYPE_CHECKING:
    from torch import nn

_WIDEST_BYTES = 4
"""Of a number, whatever it is cast to."""


def needed(model: LoadedModel, jobs: Sequence[Job], budget: Mapping[str, int]) -> list[tuple[Job, Phases]] | None:
    """Each job that can be priced, with its phases in every placement but ``spread``.

    None where each has plenty of room with the whole model on the device, as far as its weights say: a model is then
    not looked at any further.
    """
    modules = modules_of(model)
    if all(_has_plenty(outline_of(model, modules, job.config), job, budget["device_bytes"]) for job in jobs):
        return None
    twins = {name: on_meta(module) for name, module in modules.items()}
    found: list[tuple[Job, Phases]] = []
    for job in jobs:
        book = Book(outline=outline_of(model, twins, job.config), device=model.device, budget=budget)
        for _, phases in phases_of_each(book, [job]):
            found.append((job, {name: rows for name, rows in phases.items() if name in ORDER}))
    return found


def floors_without_room(
    model: LoadedModel, config: ExperimentConfig, jobs: Sequence[Job], budget: Mapping[str, int] | None, where: str
) -> dict[str, str] | None:
    """Name of a floor -> why it is left out; None where nothing says what there is, or for a model on several devices.

    Args:
        model: before it has hooks of a placement.
        jobs: those that share it.
        budget: what a run may use of the device, with what of the model is there already.
        where: the placement that is chosen; "" where the model is whole on the device.
    """
    if budget is None or where == "spread":
        return None
    modules, available = modules_of(model), budget["device_bytes"]
    outline = outline_of(model, modules, config)
    if all(_has_plenty(outline, job, available) for job in floors_of(config, outline.dtype, outline.quantized)):
        return {}
    twins = {name: on_meta(module) for name, module in modules.items()}
    book = Book(outline=replace(outline, components=twins), device=model.device, budget=budget)
    typed = config.memory.device_gib
    said = f"{gib(available)} are there" if typed is None else f"memory.device_gib={typed:g}"
    floors = phases_of_floors(book, config)
    return left_out(floors, phases_of_each(book, jobs), where or WHOLE[0], available, said)


def jobs_without_room(model: LoadedModel, jobs: Sequence[Job], budget: Mapping[str, int] | None) -> dict[str, str]:
    """Name of a job -> why the memory that a user gives does not hold it.

    Args:
        model: before it has hooks of a placement.
        budget: what a run may use of the device.
    """
    sized = [job for job in jobs if job.config.checkpoint is None]  # of others' files no plan knows the size
    found = [] if budget is None else needed(model, sized, budget) or []
    return {job.name: why for job, phases in found if (why := refusal(phases, job.config.memory))}


def without_float32(model: LoadedModel, settings: MemoryConfig) -> dict[str, str]:
    """The float32 copy, which is a floor, where memory has no room for it, as far as weights say."""
    if model.dtype == "float32":
        return {}
    needed = 4 * sum(p.numel() for module in model.components.values() for p in module.parameters())
    spread = model.parts.get("spread")
    devices = {model.device} if spread is None else {*spread.devices}
    free, where = sum(map(free_bytes, devices)), "are free"
    if settings.device_gib is not None:
        held = sum(map(num_bytes, modules_of(model).values()))
        left = max(int(settings.device_gib * GIB) * len(devices) - held, 0)
        if left < free:
            free, where = left, f"are left of memory.device_gib={settings.device_gib:g}"
    if needed <= 0.8 * free:
        return {}
    told = f"it needs {gib(needed)} for a float32 copy and {gib(free)} {where}"
    return {FLOOR_FP32: f"{FLOOR_FP32}: left out, {told}; verdicts use the other floors"}


def modules_of(model: LoadedModel) -> dict[str, nn.Module]:
    """Every module of a model that has tensors, those that may be quantized first."""
    pipe: Any = model.parts.get("pipeline")
    every: dict[str, Any] = {**model.components, **(pipe.components if pipe is not None else {})}
    return {name: module for name, module in every.items() if hasattr(module, "named_parameters")}


def outline_of(model: LoadedModel, modules: Mapping[str, nn.Module], config: ExperimentConfig) -> Outline:
    denoisers = model.parts.get("denoisers", ())
    return Outline(
        components=modules,
        quantized=tuple(config.model.components) or denoisers or tuple(model.components),
        dtype=model.dtype,
        denoiser=next(iter(denoisers), ""),
        default_exclusions=model.default_exclusions,
    )


def _has_plenty(outline: Outline, job: Job, budget: int) -> bool:
    """Whether the model, the widest copy of it and what is there while the largest layer is quantized have room."""
    parameters = [p.numel() for module in outline.components.values() for p in module.parameters()]
    at_once = max(row.layers_at_once for offer in offers().values() for row in offer.rows.values())
    weights = sum(map(num_bytes, outline.components.values()))
    copied = max(weights, _WIDEST_BYTES * sum(parameters))
    layer = int(_WIDEST_BYTES * at_once * max(parameters, default=0))
    active = activations(outline, job.evaluation, job.plain_attention)
    return 2 * weights + copied + layer + max(active.running, active.decoding, active.reading) <= budget
