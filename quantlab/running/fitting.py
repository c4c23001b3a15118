"""Whether a request fits a budget, how, and which change of what was typed would: no weights are read."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from quantlab.backends.scheme import Scheme
from quantlab.backends.table import offers
from quantlab.errors import ConfigError, MissingPackage
from quantlab.models.outline import Outline
from quantlab.planning.components import DEFAULT, Decided, component_nodes, decided
from quantlab.planning.composition import node_class
from quantlab.planning.job import Job
from quantlab.planning.words import COMPONENTS
from quantlab.running.choice import ORDER, first_fitting, gib, least, most_on_device, needs
from quantlab.vocabulary.axes import QuantizationAxes
from quantlab.vocabulary.dtypes import DTYPES
from quantlab.vocabulary.prices import Price

_PLACEMENT = "memory.placement"
_OF_THE_DTYPE = ("group_size", "activation_dtype", "algorithm")
"""Axes of which another dtype may offer other values."""

Change = tuple[tuple[str, ...], Job]
"""Words to type beside those that were typed, and the job of them all."""


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """A model and what there is room for."""

    outline: Outline
    price: Callable[[Job], Price]
    budget: Mapping[str, int]
    """``device_bytes`` and ``host_bytes``, as far as they are known."""

    def placement(self, job: Job, price: Price, asked: str = "") -> str:
        """The first placement whose phases all fit; "" where none does. ``asked``: as if it were typed."""
        if price.why_refused:
            return ""
        asked = asked or job.config.memory.placement
        return first_fitting(price.phases, self.budget, ORDER if asked == "auto" else (asked,))

    def advice(self, job: Job, price: Price, placement: str) -> str:
        """Where no placement fits, the nearest change that would: a placement, a narrower dtype, another component;
        else what is missing."""
        if price.why_refused or placement:
            return ""
        if job.config.memory.placement != "auto" and (other := self.placement(job, price, "auto")):
            return f"{_PLACEMENT}={other} fits"
        for words, changed in self._changes(job):
            found_price = self.price(changed)
            if found := self.placement(changed, found_price, "auto"):
                asked = changed.config.memory.placement
                typed = () if asked in ("auto", found) else (f"{_PLACEMENT}={found}",)
                told = " ".join(map(shlex.quote, (*words, *typed)))
                return f"{told} would fit ({found}, {gib(most_on_device(found_price.phases[found]))})"
        return self._missing(job, price)

    def _missing(self, job: Job, price: Price) -> str:
        """What the placement that takes least of the device would need."""
        asked = job.config.memory.placement
        name = least(price.phases, ORDER if asked == "auto" else (asked,))
        on_host = max(row.host_bytes for row in price.phases[name])
        return f"nothing found that fits: {needs(price.phases, name)} and {gib(on_host)} on the host"

    def _changes(self, job: Job) -> Iterator[Change]:
        """Other requests, the nearest first."""
        yield from self._tiled((), job)
        if job.needs_data and job.config.calibration.num_evidence_calls:
            calibration = replace(job.config.calibration, num_evidence_calls=0)
            unseen = replace(job, config=replace(job.config, calibration=calibration))
            yield ("calibration.num_evidence_calls=0",), unseen
            yield from self._tiled(("calibration.num_evidence_calls=0",), unseen)
        others = list(self._other_schemes(job))
        yield from others
        for words, changed in others:
            yield from self._tiled(words, changed)

    def _tiled(self, words: Sequence[str], job: Job) -> Iterator[Change]:
        """The same request with images decoded in tiles, where its decoder can."""
        evaluation = job.config.evaluation
        if not evaluation.tiled_decoding and hasattr(self.outline.components.get("vae"), "enable_tiling"):
            tiled = replace(job.config, evaluation=replace(evaluation, tiled_decoding=True))
            yield (*words, "evaluation.tiled_decoding=true"), replace(job, config=tiled)

    def _other_schemes(self, job: Job) -> Iterator[Change]:
        modules, done = self.outline.components, job.components(self.outline.quantized)
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in modules.items() if n not in done and n != "vae"}
        largest = max(sizes, key=lambda n: sizes[n], default="")
        for key, scheme in job.schemes.items():
            if scheme.native.needs_data and scheme.axes.algorithm != scheme.row.algorithms[0]:
                yield from _with_axes(job, key, {"algorithm": "auto"})  # what needs no data is streamed
            if largest:
                yield from _wider((), job, key, largest, list(done))
            changed = [change for dtype in _narrower(scheme) for change in _with_dtype(job, key, dtype)]
            yield from changed
            for words, narrow in changed:
                if largest:
                    yield from _wider(words, narrow, key, largest, list(done))


def _narrower(scheme: Scheme) -> list[str]:
    if scheme.axes.dtype not in DTYPES:  # of a pasted config that no axes spell
        return []
    rows, bits = offers()[scheme.axes.backend].rows, DTYPES[scheme.axes.dtype].bits
    return sorted((d for d in rows if DTYPES[d].bits < bits), key=lambda d: -DTYPES[d].bits)


def _with_dtype(job: Job, key: str, dtype: str) -> Iterator[Change]:
    """The job with another dtype beside all else that was typed; then with what belongs to the old one let go of."""
    dropped = [name for name in _OF_THE_DTYPE if getattr(_node(job, key), name) != "auto"]
    for names in ([], dropped) if dropped else ([],):
        yield from _with_axes(job, key, {"dtype": dtype, **dict.fromkeys(names, "auto")})


def _with_axes(job: Job, key: str, axes: Mapping[str, Any]) -> Iterator[Change]:
    """The job with other axes of a scheme, where there is such a scheme."""
    start = f"{COMPONENTS}.{key}." if key else ""
    try:
        found = decided(replace(_node(job, key), **axes), ("backend", "dtype"))
    except (ConfigError, MissingPackage):
        return
    if found.scheme is not None:
        schemes = {**job.schemes, key: found.scheme}
        yield tuple(f"{start}{name}={value}" for name, value in axes.items()), _with_node(job, key, found, schemes)


def _node(job: Job, key: str) -> QuantizationAxes:
    """The node of a scheme as it was typed: of a component's, in which axes are spelled out, the dtype's own choices
    are open again."""
    if key == DEFAULT:
        return job.config.quantization
    node, row = component_nodes(job.config)[key], job.schemes[key].row
    usual = {"activation_dtype": row.activation_dtypes[0], "algorithm": row.algorithms[0]}
    is_open: dict[str, Any] = {name: "auto" for name, value in usual.items() if getattr(node, name) == value}
    return replace(node, **is_open)


def _with_node(job: Job, key: str, found: Decided, schemes: Mapping[str, Scheme]) -> Job:
    if key == DEFAULT:
        return replace(job, config=replace(job.config, quantization=found.axes), schemes=schemes)
    said = {**job.config.components[key], "dtype": found.axes.dtype}
    said |= {name: getattr(found.axes, name) for name in _OF_THE_DTYPE}
    return replace(job, config=replace(job.config, components={**job.config.components, key: said}), schemes=schemes)


def _wider(words: Sequence[str], job: Job, key: str, name: str, done: Sequence[str]) -> Iterator[Change]:
    """The job with one more component, quantized as that of ``key`` is."""
    config = job.config
    if key == DEFAULT:
        names = [*(config.model.components or [n for n in done if n not in config.components]), name]
        wide = replace(config, model=replace(config.model, components=names))
        yield (*words, f"model.components=[{','.join(names)}]"), replace(job, config=wide)
        return
    axes = job.schemes[key].axes
    said: dict[str, Any] = {"backend": axes.backend, "dtype": axes.dtype}
    try:
        found = decided(node_class(axes.backend)(**said), ("backend", "dtype"))
    except (ConfigError, MissingPackage):
        return
    if found.scheme is not None:
        own = replace(config, components={**config.components, name: said})
        word = f"{COMPONENTS}.{name}={{backend: {axes.backend}, dtype: {axes.dtype}}}"
        yield (*words, word), replace(job, config=own, schemes={**job.schemes, name: found.scheme})
