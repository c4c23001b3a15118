"""Forecast: what each combination of a request will occupy, and whether it fits; no weights are read.

A model is built once on the meta device, and priced as often as there are combinations.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from quantlab.backends.scheme import Scheme, scheme_of
from quantlab.backends.table import loggers, offers
from quantlab.errors import ConfigError, MissingPackage
from quantlab.models.outline import Outline
from quantlab.models.outlines import outline
from quantlab.modules.device import free_bytes
from quantlab.modules.remembered import remembered
from quantlab.planning.architectures import shipped_architecture
from quantlab.planning.job import Plan
from quantlab.quiet import quiet_libraries
from quantlab.running.phases import phases
from quantlab.stages.price import price_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, DTYPES
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.prices import ComponentPrice, Phase, Price
from quantlab.vocabulary.schema import PLACEMENTS, ExperimentConfig

if TYPE_CHECKING:
    from torch import nn

GIB = 2**30


def forecast(plan: Plan) -> list[Price]:
    """One price for each combination of the request, those that are impossible last, with the reason.

    ``device=auto`` is a CUDA device: that is what memory is planned for. Raises ModelError, beginning with
    ``model.path=``, for a model that cannot be found or built.
    """
    quiet_libraries(loggers())
    books: dict[str, _Book] = {}
    prices = []
    for job in plan.jobs:
        key = canonical_json([asdict(job.config.model), _device(job.config)])
        if key not in books:
            books[key] = _Book(outline=outline(job.config.model, _device(job.config), shipped_architecture))
        prices.append(price_of(books[key], job.config, job.scheme, job.name))
    return [*prices, *(_impossible(combination, reason) for combination, reason in plan.invalid)]


@dataclass(frozen=True, kw_only=True)
class _Book:
    """A model on the meta device."""

    outline: Outline


def _device(config: ExperimentConfig) -> str:
    return "cpu" if config.device == "cpu" else "cuda"


def price_of(book: _Book, config: ExperimentConfig, scheme: Scheme | None, name: str) -> Price:
    """The price of one combination on a model that is built already."""
    price = _price(book, config, scheme, name)
    budget = _budget(config, price.device)
    price = replace(price, budget=budget)
    if not budget:
        return price
    placed = replace(price, placement=_placement(price, budget, config.memory.placement))
    if placed.placement:
        return placed
    return replace(placed, advice=_advice(book, config, scheme, price))


def _price(book: _Book, config: ExperimentConfig, scheme: Scheme | None, name: str) -> Price:
    made, device = book.outline, _device(config)
    components = [_component(made, part, scheme, config, device, name) for part in made.components]
    axes = scheme.axes if scheme is not None else config.quantization
    budget = _budget(config, device)
    needs_data = scheme is not None and scheme.native.needs_data
    return Price(
        name=name,
        backend=axes.backend,
        dtype=axes.dtype,
        group_size=axes.group_size,
        device=device,
        compute_dtype=made.dtype if axes.compute_dtype == "auto" else axes.compute_dtype,
        components=tuple(components),
        phases=phases(made, components, config.evaluation, needs_data, budget.get("device_bytes", 0)),
    )


def _component(
    made: Outline, part: str, scheme: Scheme | None, config: ExperimentConfig, device: str, name: str
) -> ComponentPrice:
    module = made.components[part]
    if part not in made.quantized or (scheme is None and config.quantization.dtype == "auto"):
        return _as_it_is(part, module)
    if scheme is None:
        return replace(price_component(part, _cast(module, config.quantization.dtype), None), scheme=name)
    request = QuantizationRequest(
        component=part,
        scheme=scheme,
        compute_dtype=made.dtype if scheme.axes.compute_dtype == "auto" else scheme.axes.compute_dtype,
        device=device,
        default_exclusions=made.default_exclusions.get(part, ()),
    )
    return price_component(part, module, request, name)


@remembered
def _unquantized(module: nn.Module) -> ComponentPrice:
    return price_component("", module, None)


def _as_it_is(part: str, module: nn.Module) -> ComponentPrice:
    return replace(_unquantized(module), name=part)


def _cast(module: nn.Module, dtype: str) -> nn.Module:
    import torch

    return torch.nn.Module.to(copy.deepcopy(module), getattr(torch, dtype))


def _impossible(combination: str, reason: str) -> Price:
    said = dict(word.partition("=")[::2] for word in combination.split())
    return Price(
        name=combination,
        backend=said.get("backend", ""),
        dtype=said.get("dtype", ""),
        group_size=said.get("group_size", "auto"),
        device="",
        compute_dtype="",
        refused=(reason,),
    )


# -- the budget


def _budget(config: ExperimentConfig, device: str) -> dict[str, int]:
    """What there is, as far as it is said or can be asked."""
    import torch

    found = {}
    if config.memory.device_gib is not None:
        found["device_bytes"] = int(config.memory.device_gib * GIB)
    elif device == "cuda" and torch.cuda.is_available():
        found["device_bytes"] = free_bytes("cuda")
    if config.memory.host_gib is not None:
        found["host_bytes"] = int(config.memory.host_gib * GIB)
    return found


def _placement(price: Price, budget: Mapping[str, int], asked: str) -> str:
    """The first placement whose phases all fit; "" where none does."""
    if price.refused or any(c.refused for c in price.components):
        return ""
    for name, rows in price.phases.items():
        if asked in ("auto", name) and not _short(rows, budget):
            return name
    return ""


def _short(rows: Sequence[Phase], budget: Mapping[str, int]) -> str:
    """The first phase that does not fit; "" where all do."""
    for phase in rows:
        for key in ("device_bytes", "host_bytes"):
            if key in budget and getattr(phase, key) > budget[key]:
                return phase.name
    return ""


def _advice(book: _Book, config: ExperimentConfig, scheme: Scheme | None, price: Price) -> str:
    """The nearest change that would fit: a placement, a narrower dtype, another component; else what is missing."""
    budget = price.budget
    if any(c.refused for c in price.components):
        return ""
    if config.memory.placement != "auto" and (other := _placement(price, budget, "auto")):
        return f"memory.placement={other} fits" if other in PLACEMENTS else "part by part it fits"
    for words, other_config, other_scheme in _changes(book, config, scheme):
        wider = _Book(outline=replace(book.outline, quantized=tuple(other_config.model.components)))
        changed = _price(wider if other_config is not config else book, other_config, other_scheme, words)
        if found := _placement(changed, budget, "auto"):
            return f"{words} would fit ({found}, {_largest(changed, found) / GIB:.1f} GiB)"
    name = list(price.phases)[-1]
    short = _short(price.phases[name], budget)
    phase = next(p for p in price.phases[name] if not short or p.name == short)
    return (
        f"nothing found that fits: {phase.name} needs {phase.device_bytes / GIB:.1f} GiB on the device and "
        f"{phase.host_bytes / GIB:.1f} GiB on the host ({name})"
    )


def _largest(price: Price, placement: str) -> int:
    return max(p.device_bytes for p in price.phases[placement])


def _changes(
    book: _Book, config: ExperimentConfig, scheme: Scheme | None
) -> Iterator[tuple[str, ExperimentConfig, Scheme | None]]:
    """Other requests, the nearest first: (what to type, config, scheme)."""
    rows = offers()[scheme.axes.backend if scheme is not None else config.quantization.backend].rows
    bits = DTYPES[scheme.axes.dtype].bits if scheme is not None else 32
    narrower = sorted((d for d in rows if DTYPES[d].bits < bits), key=lambda d: -DTYPES[d].bits)
    schemes = {dtype: _other(scheme, dtype) for dtype in narrower if scheme is not None}
    encoders = [n for n in book.outline.components if n not in book.outline.quantized and n != "vae"]
    largest = max(encoders, key=lambda n: _num(book.outline.components[n]), default="")
    wider = [*book.outline.quantized, largest] if largest else []
    if wider and scheme is not None:
        yield f"model.components=[{','.join(wider)}]", _with_components(config, wider), scheme
    for dtype, other in schemes.items():
        if other is not None:
            yield f"dtype={dtype}", config, other
    for dtype, other in schemes.items():
        if other is not None and wider:
            typed = f"dtype={dtype} model.components=[{','.join(wider)}]"
            yield typed, _with_components(config, wider), other


def _num(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _with_components(config: ExperimentConfig, names: Sequence[str]) -> ExperimentConfig:
    return replace(config, model=replace(config.model, components=list(names)))


def _other(scheme: Scheme | None, dtype: str) -> Scheme | None:
    """The scheme with another dtype and what belongs to it; None where that is no plain scheme."""
    if scheme is None or dtype in COMPUTE_DTYPES:
        return None
    asked = QuantizationAxes(
        backend=scheme.axes.backend,
        dtype=dtype,
        compute_dtype=scheme.axes.compute_dtype,
        modules_to_not_convert=scheme.axes.modules_to_not_convert,
        on_mismatch="skip",
    )
    try:
        return scheme_of(asked)
    except (ConfigError, MissingPackage):
        return None
