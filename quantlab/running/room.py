"""What jobs on a loaded model need in each placement: priced as their plan is, where there is not plenty of room."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from quantlab.backends.table import offers
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.models.outline import Outline
from quantlab.modules.groups import num_bytes
from quantlab.modules.twin import on_meta
from quantlab.planning.job import Job
from quantlab.running.choice import ORDER, Phases
from quantlab.running.forecast import Book, phases_of
from quantlab.running.phases import activations
from quantlab.vocabulary.schema import ExperimentConfig

if TYPE_CHECKING:
    from torch import nn

_WIDEST_BYTES = 4
"""Of a number, whatever it is cast to."""


def needed(model: LoadedModel, jobs: Sequence[Job], budget: Mapping[str, int]) -> list[Phases] | None:
    """Of each job that can be priced, its phases in every placement but ``spread``; None where each has plenty of room
    with the whole model on the device, as far as its weights say: a model is then not looked at any further.
    """
    modules = modules_of(model)
    if all(_has_plenty(_outline(model, modules, job.config), job, budget["device_bytes"]) for job in jobs):
        return None
    twins = {name: on_meta(module) for name, module in modules.items()}
    found: list[Phases] = []
    for job in jobs:
        book = Book(outline=_outline(model, twins, job.config), device=model.device, budget=budget)
        try:
            phases = phases_of(book, job)
        except ConfigError:  # what is wrong with a job is told in its own row
            continue
        found.append({name: rows for name, rows in phases.items() if name in ORDER})
    return found


def modules_of(model: LoadedModel) -> dict[str, nn.Module]:
    """Every module of a model that has tensors, those that may be quantized first."""
    pipe: Any = model.parts.get("pipeline")
    every: dict[str, Any] = {**model.components, **(pipe.components if pipe is not None else {})}
    return {name: module for name, module in every.items() if hasattr(module, "named_parameters")}


def _outline(model: LoadedModel, modules: Mapping[str, nn.Module], config: ExperimentConfig) -> Outline:
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
    active = activations(outline, job.config.evaluation)
    return 2 * weights + copied + layer + max(active.running, active.decoding, active.reading) <= budget
