"""Where a candidate's layers come from: copied from the reference on the device, or streamed from its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import held_packages
from quantlab.errors import ConfigError
from quantlab.models.loaded import LoadedModel
from quantlab.models.sources import component_source
from quantlab.modules.device import free_bytes, kind_of
from quantlab.modules.memory import storages
from quantlab.modules.source import Source
from quantlab.planning.job import Job
from quantlab.progress import say
from quantlab.stages.price import price_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.reports import MemoryReport

GIB = 2**30


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
