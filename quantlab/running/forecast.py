"""Forecast: what each combination of a request will occupy, and whether it fits; no weights are read.

A model is built once on the meta device, and priced as often as there are combinations.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import loggers
from quantlab.errors import ConfigError, nearest
from quantlab.models.outline import Outline, cast_as_loaded
from quantlab.models.outlines import outline
from quantlab.models.spared import spared
from quantlab.modules.device import free_bytes, kind_of
from quantlab.modules.read_in_source import reads_in_source
from quantlab.modules.remembered import remembered
from quantlab.planning.architectures import shipped_architecture
from quantlab.planning.components import check_contradiction, told
from quantlab.planning.job import Job, Plan, scheme_name
from quantlab.planning.placing import is_possible, needs_of
from quantlab.planning.words import COMPONENTS
from quantlab.quiet import quiet_libraries
from quantlab.running.choice import Phases, first_fitting, gib, together
from quantlab.running.fitting import Fitting
from quantlab.running.floor_room import floors_of, left_out
from quantlab.running.known import bench_key
from quantlab.running.phases import phases
from quantlab.running.shares import spread_phases
from quantlab.stages.price import price_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.amounts import GIB
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.prices import ComponentPrice, Phase, Price, Share
from quantlab.vocabulary.schema import ExperimentConfig

if TYPE_CHECKING:
    from torch import nn


def forecast(plan: Plan, *, is_last: bool = False) -> list[Price]:
    """One price for each combination of the request, those that are impossible last, with the reason.

    ``device=auto`` is a CUDA device: that is what memory is planned for. ``is_last``: nothing else comes in this
    process, so that much need not be imported (:func:`quantlab.models.spared.spared`). Raises ModelError, beginning
    with ``model.path=``, for a model that cannot be found or built.
    """
    quiet_libraries(loggers())
    books: dict[str, Book] = {}
    prices: list[Price] = []
    sharing: dict[str, list[int]] = {}
    priced: dict[int, tuple[Book, Job]] = {}
    for job in plan.jobs:
        if job.config.checkpoint is not None:
            told = f"checkpoint={job.config.checkpoint}: its bytes are those of its files; a run reads them back"
            prices.append(_impossible(job.name, told))
            continue
        key = canonical_json([asdict(job.config.model), _device(job.config)])
        if key not in books:
            with spared() if is_last else contextlib.nullcontext():
                books[key] = book_of(job.config)
        if job.config.memory.placement == "auto":
            sharing.setdefault(bench_key(job.config), []).append(len(prices))
        priced[len(prices)] = books[key], job
        prices.append(price_of(books[key], job))
    for places in sharing.values():
        for i, price in zip(places, _shared([prices[i] for i in places]), strict=True):
            prices[i] = price
    for i, (book, job) in priced.items():
        prices[i] = with_floors(prices[i], book, job)
    return [*prices, *(_impossible(combination, reason) for combination, reason in plan.invalid)]


def _shared(prices: Sequence[Price]) -> list[Price]:
    """The prices of jobs that share a model, which lies for all of them where it does in a run."""
    if not prices[0].budget:
        return list(prices)
    names = together([price.phases for price in prices], prices[0].budget)
    found = []
    for price in prices:
        placement = first_fitting(price.phases, price.budget, names)
        if not price.placement or price.placement == placement:
            found.append(price)
            continue
        told = f"{placement or 'no room'}, as it shares its model with others here; by itself {price.placement}"
        found.append(replace(price, placement=placement, advice=told))
    return found


_RUNNING = ("encode prompts", "evaluate", "decode")
"""Phases that a user of the quantized model has too."""


@dataclass(frozen=True, kw_only=True)
class Book:
    """A model on the meta device, and for what it is priced."""

    outline: Outline
    device: str = ""
    """Where a run is that asks; "": where a plan is for."""
    budget: Mapping[str, int] | None = None
    """What that run has; None: what the request says, or a GPU has free."""
    floors: dict[str, Mapping[str, Phases]] = field(default_factory=dict)
    """By what they depend on, the phases of floors, which the combinations share."""

    def device_for(self, config: ExperimentConfig) -> str:
        """``cpu`` or ``cuda``."""
        return kind_of(self.device) if self.device else _device(config)

    def budget_for(self, config: ExperimentConfig) -> Mapping[str, int]:
        """``device_bytes`` and ``host_bytes``, as far as they are known."""
        return _budget(config, _device(config)) if self.budget is None else self.budget


def book_of(config: ExperimentConfig) -> Book:
    """The model of a request; ModelError as :func:`forecast`."""
    return Book(outline=outline(config.model, _device(config), shipped_architecture))


def _device(config: ExperimentConfig) -> str:
    return "cpu" if config.device == "cpu" else "cuda"


def price_of(book: Book, job: Job) -> Price:
    """The price of one combination on a model that is built already."""
    price = _price(book, job)
    budget = _budget(job.config, price.device)
    price = replace(price, budget=budget)
    if not budget:
        return price
    found = Fitting(outline=book.outline, price=lambda other: _price(book, other), budget=budget)
    placement = found.placement(job, price)
    return replace(price, placement=placement, advice=found.advice(job, price, placement))


def with_floors(price: Price, book: Book, job: Job) -> Price:
    """The price with the floors that a run with it would leave out."""
    available, config = price.budget.get("device_bytes", 0), job.config
    if not (config.sweep.floors and available and price.placement) or price.placement == "spread":
        return price
    typed = config.memory.device_gib
    said = f"{gib(available)} are free" if typed is None else f"memory.device_gib={typed:g}"
    floors = phases_of_floors(book, config)
    return replace(price, left_out=left_out(floors, [(job, price.phases)], price.placement, available, said))


def phases_of_floors(book: Book, config: ExperimentConfig) -> Mapping[str, Phases]:
    """Name of a floor of the request -> its phases in each placement."""
    jobs = floors_of(config, book.outline.dtype, book.outline.quantized)
    names = [[job.name, *job.components(book.outline.quantized)] for job in jobs]
    key = canonical_json([names, asdict(config.evaluation), asdict(config.memory), book.device_for(config)])
    if key not in book.floors:
        book.floors[key] = {job.name: found for job, found in phases_of_each(book, jobs)}
    return book.floors[key]


def phases_of_each(book: Book, jobs: Iterable[Job]) -> Iterator[tuple[Job, Phases]]:
    """The jobs that can be priced, with their phases: what is wrong with another is told in its own row."""
    for job in jobs:
        with contextlib.suppress(ConfigError):
            yield job, phases_of(book, job)


def bytes_to_run(job: Job) -> dict[str, int]:
    """In words -> bytes: what the quantized model takes on one device, its other components with it, as planned.

    Nothing for a model that cannot be looked at without its weights.
    """
    try:
        price = price_of(book_of(job.config), job)
    except ConfigError:
        return {}
    active = max((p.activation_bytes for rows in price.phases.values() for p in rows if p.name in _RUNNING), default=0)
    return {"to run it on one device, planned (activations estimated)": price.total_bytes + active}


def phases_of(book: Book, job: Job) -> Mapping[str, Sequence[Phase]]:
    """Placement -> the phases of a run of the job on a model that is built; ConfigError for a component that it has
    not."""
    return _price(book, job).phases


def _price(book: Book, job: Job) -> Price:
    made, device = book.outline, book.device_for(job.config)
    schemes = _schemes(made, job)
    components = [_component(made, part, schemes, job, device) for part in made.components]
    axes = [scheme.axes for scheme in schemes.values() if scheme is not None] or [job.config.quantization]
    budget, evaluation = book.budget_for(job.config), job.evaluation
    available = budget.get("device_bytes", 0)
    is_looked_at = job.config.calibration.num_evidence_calls > 0
    rows = phases(
        made, components, evaluation, needs_of(job.schemes), available, device, job.plain_attention, is_looked_at
    )
    shares: tuple[Share, ...] = ()
    if job.config.memory.placement == "spread":
        num = _num_devices(job.config)
        rows["spread"], shares = spread_phases(made, components, evaluation, job.needs_data, num, is_looked_at)
    return Price(
        name=job.name,
        backend=_joined(a.backend for a in axes),
        dtype=_joined(a.dtype for a in axes),
        group_size=axes[0].group_size
        if len({a.group_size for a in axes}) == 1
        else _joined(a.group_size for a in axes),
        device=device,
        compute_dtype=_joined(made.dtype if a.compute_dtype == "auto" else a.compute_dtype for a in axes),
        components=tuple(components),
        phases={name: found for name, found in rows.items() if is_possible(job.config, name)},
        shares=shares,
    )


def _num_devices(config: ExperimentConfig) -> int:
    import torch

    num = config.memory.devices or torch.cuda.device_count()
    if num < 2:
        raise ConfigError(
            f"memory.placement=spread: this machine has {num} CUDA devices; memory.devices=2 plans for a node of two"
        )
    return num


def _joined(words: Iterable[object]) -> str:
    return " + ".join(dict.fromkeys(map(str, words)))


def _schemes(made: Outline, job: Job) -> dict[str, Scheme | None]:
    """Component -> its scheme, of all that the job is about; ConfigError for one that the model has not."""
    check_contradiction(job.config, made.quantized)
    for name in job.config.components:
        if name not in made.components:
            raise ConfigError(
                f"{COMPONENTS}.{name}: {job.config.model.path or job.config.model.family} has "
                f"{', '.join(sorted(made.components))}{nearest(name, made.components)}"
            )
    return job.components(made.quantized)


def _component(made: Outline, part: str, schemes: Mapping[str, Scheme | None], job: Job, device: str) -> ComponentPrice:
    module, scheme, cast = made.components[part], schemes.get(part), job.config.quantization.dtype
    if scheme is None and part in schemes and job.config.checkpoint is not None:  # at most: what is in its files
        return replace(_as_it_is(part, module), scheme=job.name)
    is_cast = part in schemes and job.config.quantization.backend == "none" and cast != "auto"
    if scheme is None and is_cast:
        original_bytes = _as_it_is(part, module).original_bytes
        found = price_component(part, cast_as_loaded(copy.deepcopy(module), cast), None)
        return replace(found, scheme=job.name, original_bytes=original_bytes)
    if scheme is None:
        return _as_it_is(part, module)
    request = QuantizationRequest(
        component=part,
        scheme=scheme,
        compute_dtype=made.dtype if scheme.axes.compute_dtype == "auto" else scheme.axes.compute_dtype,
        device=device,
        default_exclusions=made.default_exclusions.get(part, ()),
        read=read_by_code(module),
        typed=job.key_of(part),
    )
    axes, key = scheme.axes, job.key_of(part)
    settings = {name: getattr(scheme.native, name) for name in scheme.backend.settings}
    price = price_component(part, module, request, scheme_name(axes, scheme, settings) if key else job.name)
    refused = tuple(told(key, reason) for reason in price.refused)
    return replace(price, backend=axes.backend, dtype=axes.dtype, group_size=axes.group_size, refused=refused)


@remembered
def read_by_code(module: nn.Module) -> tuple[str, ...]:
    """Which weights the model reads, by its code: a run sees which it reads."""
    return reads_in_source(module)


@remembered
def _unquantized(module: nn.Module) -> ComponentPrice:
    return price_component("", module, None)


def _as_it_is(part: str, module: nn.Module) -> ComponentPrice:
    return replace(_unquantized(module), name=part)


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
