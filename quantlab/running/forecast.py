"""Forecast: what each combination of a request will occupy, and whether it fits; no weights are read.

A model is built once on the meta device, and priced as often as there are combinations.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from quantlab.backends.scheme import Scheme, scheme_of
from quantlab.backends.table import loggers, offers
from quantlab.errors import ConfigError, MissingPackage, nearest
from quantlab.models.outline import Outline
from quantlab.models.outlines import outline
from quantlab.models.spared import spared
from quantlab.modules.device import free_bytes
from quantlab.modules.read_in_source import reads_in_source
from quantlab.modules.remembered import remembered
from quantlab.planning.architectures import shipped_architecture
from quantlab.planning.components import DEFAULT, check_contradiction, told
from quantlab.planning.job import Job, Plan, scheme_name
from quantlab.planning.words import COMPONENTS
from quantlab.quiet import quiet_libraries
from quantlab.running.phases import phases
from quantlab.running.shares import spread_phases
from quantlab.stages.price import price_component
from quantlab.stages.select import QuantizationRequest
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.dtypes import COMPUTE_DTYPES, DTYPES
from quantlab.vocabulary.native import canonical_json
from quantlab.vocabulary.prices import ComponentPrice, Phase, Price, Share
from quantlab.vocabulary.schema import ExperimentConfig

if TYPE_CHECKING:
    from torch import nn

GIB = 2**30


def forecast(plan: Plan, *, is_last: bool = False) -> list[Price]:
    """One price for each combination of the request, those that are impossible last, with the reason.

    ``device=auto`` is a CUDA device: that is what memory is planned for. ``is_last``: nothing else comes in this
    process, so that much need not be imported (:func:`quantlab.models.spared.spared`). Raises ModelError, beginning
    with ``model.path=``, for a model that cannot be found or built.
    """
    quiet_libraries(loggers())
    books: dict[str, Book] = {}
    prices = []
    for job in plan.jobs:
        if job.config.checkpoint is not None:
            told = f"checkpoint={job.config.checkpoint}: its bytes are those of its files; a run reads them back"
            prices.append(_impossible(job.name, told))
            continue
        key = canonical_json([asdict(job.config.model), _device(job.config)])
        if key not in books:
            with spared() if is_last else contextlib.nullcontext():
                books[key] = book_of(job.config)
        prices.append(price_of(books[key], job))
    return [*prices, *(_impossible(combination, reason) for combination, reason in plan.invalid)]


_RUNNING = ("encode prompts", "evaluate", "decode")
"""Phases that a user of the quantized model has too."""


@dataclass(frozen=True, kw_only=True)
class Book:
    """A model on the meta device."""

    outline: Outline


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
    placed = replace(price, placement=_placement(price, budget, job.config.memory.placement))
    if placed.placement:
        return placed
    return replace(placed, advice=_advice(book, job, price))


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


def _price(book: Book, job: Job) -> Price:
    made, device = book.outline, _device(job.config)
    schemes = _schemes(made, job)
    components = [_component(made, part, schemes, job, device) for part in made.components]
    axes = [scheme.axes for scheme in schemes.values() if scheme is not None] or [job.config.quantization]
    budget, evaluation = _budget(job.config, device), job.config.evaluation
    rows = phases(made, components, evaluation, job.needs_data, budget.get("device_bytes", 0), device)
    shares: tuple[Share, ...] = ()
    if job.config.memory.placement == "spread":
        num = _num_devices(job.config)
        rows["spread"], shares = spread_phases(made, components, evaluation, job.needs_data, num)
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
        phases=rows,
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
    is_cast = part in schemes and job.config.quantization.backend == "none" and cast != "auto"
    if scheme is None and is_cast:
        return replace(price_component(part, _cast(module, cast), None), scheme=job.name)
    if scheme is None:
        return _as_it_is(part, module)
    request = QuantizationRequest(
        component=part,
        scheme=scheme,
        compute_dtype=made.dtype if scheme.axes.compute_dtype == "auto" else scheme.axes.compute_dtype,
        device=device,
        default_exclusions=made.default_exclusions.get(part, ()),
        read=_read(module),
        typed=job.key_of(part),
    )
    axes, key = scheme.axes, job.key_of(part)
    settings = {name: getattr(scheme.native, name) for name in scheme.backend.settings}
    price = price_component(part, module, request, scheme_name(axes, scheme, settings) if key else job.name)
    refused = tuple(told(key, reason) for reason in price.refused)
    return replace(price, backend=axes.backend, dtype=axes.dtype, group_size=axes.group_size, refused=refused)


@remembered
def _read(module: nn.Module) -> tuple[str, ...]:
    """Which weights the model reads, by its code: a run sees which it reads."""
    return reads_in_source(module)


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
    if price.why_refused:
        return ""
    for name, rows in price.phases.items():
        if (asked == name or (asked == "auto" and name != "spread")) and not _short(rows, budget):
            return name
    return ""


def _short(rows: Sequence[Phase], budget: Mapping[str, int]) -> str:
    """The first phase that does not fit; "" where all do."""
    for phase in rows:
        for key in ("device_bytes", "host_bytes"):
            if key in budget and getattr(phase, key) > budget[key]:
                return phase.name
    return ""


def _advice(book: Book, job: Job, price: Price) -> str:
    """The nearest change that would fit: a placement, a narrower dtype, another component; else what is missing."""
    budget = price.budget
    if price.why_refused:
        return ""
    if job.config.memory.placement != "auto" and (other := _placement(price, budget, "auto")):
        return f"memory.placement={other} fits"
    for words, changed in (*_tiled(book, job), *_changes(book, job)):
        if found := _placement(found_price := _price(book, changed), budget, "auto"):
            return f"{words} would fit ({found}, {_largest(found_price, found) / GIB:.1f} GiB)"
    name = list(price.phases)[-1]
    short = _short(price.phases[name], budget)
    phase = next(p for p in price.phases[name] if not short or p.name == short)
    return (
        f"nothing found that fits: {phase.name} needs {phase.device_bytes / GIB:.1f} GiB on the device and "
        f"{phase.host_bytes / GIB:.1f} GiB on the host ({name})"
    )


def _largest(price: Price, placement: str) -> int:
    return max(p.device_bytes for p in price.phases[placement])


def _changes(book: Book, job: Job) -> Iterator[tuple[str, Job]]:
    """Other requests, the nearest first: (what to type, the job)."""
    modules, done = book.outline.components, job.components(book.outline.quantized)
    encoders = [n for n in modules if n not in done and n != "vae"]
    largest = max(encoders, key=lambda n: _num(modules[n]), default="")
    for key, scheme in job.schemes.items():
        if largest:
            yield _wider(job, key, scheme, largest, list(done))
        start = f"{COMPONENTS}.{key}." if key else ""
        others = {dtype: other for dtype in _narrower(scheme) if (other := _other(scheme, dtype)) is not None}
        changed = {dtype: replace(job, schemes={**job.schemes, key: other}) for dtype, other in others.items()}
        yield from ((f"{start}dtype={dtype}", narrow) for dtype, narrow in changed.items())
        for dtype, narrow in changed.items():
            if largest:
                words, both = _wider(narrow, key, others[dtype], largest, list(done))
                yield f"{start}dtype={dtype} {words}", both


def _tiled(book: Book, job: Job) -> Iterator[tuple[str, Job]]:
    """The same request with images decoded in tiles, where its decoder can."""
    evaluation = job.config.evaluation
    if not evaluation.tiled_decoding and hasattr(book.outline.components.get("vae"), "enable_tiling"):
        tiled = replace(job.config, evaluation=replace(evaluation, tiled_decoding=True))
        yield "evaluation.tiled_decoding=true", replace(job, config=tiled)


def _narrower(scheme: Scheme) -> list[str]:
    rows, bits = offers()[scheme.axes.backend].rows, DTYPES[scheme.axes.dtype].bits
    return sorted((d for d in rows if DTYPES[d].bits < bits), key=lambda d: -DTYPES[d].bits)


def _wider(job: Job, key: str, scheme: Scheme, name: str, done: Sequence[str]) -> tuple[str, Job]:
    """The job with one more component, quantized as that of ``key`` is."""
    config = job.config
    if key == DEFAULT:
        names = [*(config.model.components or [n for n in done if n not in config.components]), name]
        return f"model.components=[{','.join(names)}]", replace(job, config=_with_components(config, names))
    node = {k: v for k, v in config.components[key].items() if k in ("backend", "dtype")}
    words = f"{COMPONENTS}.{name}={{backend: {node['backend']}, dtype: {scheme.axes.dtype}}}"
    own = replace(config, components={**config.components, name: node})
    return words, replace(job, config=own, schemes={**job.schemes, name: scheme})


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
